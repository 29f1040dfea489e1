"""Sweeps of three jobs, killed at random moments and carried on with: what does it cost, and is anything lost?

    python tests/benchmarks/kills.py [--kills 50] [--seconds 1e9] [--seed 0] [--work fake|torch|quality|soak]
                                     [--launcher basic|local|slurm] [--bucket] [--keep FOLDER]
                                     [--clock SECONDS] [--disk full|readonly]

``fake``: a bench of virtual time. ``torch``: fit and bench of a real, tiny model; three jobs share the answers and the
head. ``quality``, ``soak``: those stages on the fake engine; a soak is a real gateway under a real Locust. Each sweep
is launched, loses processes (kill -9 or SIGTERM; on Slurm also scancel, requeue, and a node's loss: slurmstepd and all
below it), is launched again until it has lost some, then left alone; and is then held against one that nobody disturbed
(``tests/disturbed.py``). ``--bucket``: checkpoints lie in one of an emulator of Google Cloud Storage's; their leases
last for four seconds. ``--clock``: the time of day of each process jumps by up to so many seconds, at every call.
``--disk``, as root: nothing is killed, but the disk that the checkpoints are on fills up, or fails and turns read-only.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from disturbed import Sweep, violations
from gcs import emulator

NAME = f"kills-{os.getpid()}"
SETTINGS = {
    "basic": [],
    "local": ["hydra.launcher.poll_s=0.05"],
    "slurm": [f"hydra.launcher.name={NAME}", "hydra.launcher.cpus_per_task=1", "hydra.launcher.poll_s=0.5"],
}
Strike = Callable[["subprocess.Popen[bytes]", random.Random], str | None]
"""Kills something of a sweep that was launched so; says what, if there was something to kill."""


def work(kind: str, folder: Path) -> list[str]:
    """The overrides of a sweep of three jobs."""
    prompts = tiny.prompts(folder / "prompts.json")
    if kind == "fake":
        return [*tiny.fake_job(prompts), "K=1,2,3", "scale.prompts=20", "scale.warmup=0", "tracking=mlflow"]
    if kind == "quality":
        size = ["quality.tasks=[]", "quality.chunk=2", "quality.prompts=24", "quality.gate_prompts=16"]
        return [*tiny.fake_job(prompts), "stages=[quality]", "K=1,2,3", *size, "tracking=mlflow"]
    if kind == "soak":
        size = ["soak.users=3", "soak.interval=0.7", "soak.seconds=4.2", "soak.warmup=1", "soak.sentinels=2"]
        held = ["soak.prompts=6", "soak.new_tokens=24", "soak.max_drift=1", "soak.max_memory_slope=100000"]
        return [*tiny.fake_job(prompts), "stages=[soak]", "K=1,2", *size, *held, "tracking=mlflow"]
    (folder / "model").mkdir()
    fitted = [
        "engine.kernels=torch",
        "draft=lsq",
        "gate=varH",
        "tau_v=4,5,6",
        "scale.fit_prompts=256",
        "scale.prompts=8",
    ]
    return [*tiny.torch_job(tiny.model(folder / "model"), prompts), *fitted, "scale.warmup=0", "tracking=mlflow"]


class Disk:
    """A small file system of its own, which can fail."""

    def __init__(self, place: Path, how: str) -> None:
        self.how, self.image, self.folder = how, place / "disk.img", place / "disk"
        self.folder.mkdir()
        with self.image.open("wb") as file:
            file.truncate(16 * 2**20)
        subprocess.run(["mkfs.ext4", "-q", str(self.image)], check=True)
        self._mount()

    def strike(self, process: "subprocess.Popen[bytes]", chance: random.Random) -> str | None:
        """Breaks it, unless it is broken."""
        if self.broken:
            return None
        self.broken = True
        if self.how == "readonly":
            subprocess.run(["mount", "-o", "remount,abort", str(self.folder)], check=True)
        else:
            with suppress(OSError), (self.folder / "hog").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**12))
        return self.how

    def mend(self) -> None:
        """As whoever looks after it would."""
        (self.folder / "hog").unlink(missing_ok=True) if self.how == "full" else self._again()
        self.broken = False

    def close(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)

    def _again(self) -> None:
        self.close()
        subprocess.run(["fsck.ext4", "-y", str(self.image)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._mount()

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.folder)], check=True)
        self.broken = False


def strike_here(process: "subprocess.Popen[bytes]", chance: random.Random) -> str | None:
    """Kills a launcher on this machine or, where it has some, one of its jobs; says how, unless it has just ended."""
    try:
        victims = [psutil.Process(process.pid)]
        victims += [child for child in victims[0].children() if "selfspec.run" in child.cmdline()]
        victim, signum = chance.choice(victims), chance.choice([signal.SIGKILL, signal.SIGTERM])
        victim.send_signal(signum)
    except psutil.Error:
        return None
    return f"{signum.name} to {'the launcher' if victim.pid == process.pid else 'a job'}"


def strike_on_slurm(process: "subprocess.Popen[bytes]", chance: random.Random) -> str | None:
    """A job of the array, in one of the ways in which a cluster takes one away; or the launcher."""
    listed = subprocess.run(
        ["squeue", "-h", "--array", f"--name={NAME}", "-t", "RUNNING", "-o", "%i %A"], capture_output=True, text=True
    )
    running = [line.split() for line in listed.stdout.splitlines()]
    way = chance.choice(["scancel", "requeue", "node loss", "kill -9", "launcher"])
    if way == "launcher":
        return strike_here(process, chance)
    if not running:
        return None
    job, number = chance.choice(running)
    if way in ("scancel", "requeue"):
        command = ["scancel", job] if way == "scancel" else ["scontrol", "requeue", job]
        return way if subprocess.run(command).returncode == 0 else None
    found = [each for each in psutil.process_iter() if _step_of(each, number)]
    for step in found:
        with suppress(psutil.NoSuchProcess):
            for each in [*step.children(recursive=True), *([step] if way == "node loss" else [])]:
                each.kill()
    return way if found else None


def _step_of(process: psutil.Process, number: str) -> bool:
    try:
        return process.name() == "slurmstepd" and f"[{number}." in " ".join(process.cmdline())
    except psutil.Error:
        return False


def disturb(
    sweep: Sweep, kills: int, calls: int, strike: Strike, chance: random.Random, mend: Callable[[], None] = lambda: None
) -> Counter[str]:
    """Launches the sweep until so many of its processes were killed, or it is done; says how they died."""
    died = Counter[str]()
    while (deaths := died.total()) < kills:
        before, began = len(sweep.calls()), time.monotonic()
        after = chance.randint(1, max(1, calls // 4)) if chance.random() < 0.8 else None
        patience = chance.uniform(0, 8)
        with sweep.launch() as process:
            while process.poll() is None:
                if len(sweep.calls()) >= before + after if after else time.monotonic() > began + patience:
                    time.sleep(chance.random() * sweep.sleep)
                    how = strike(process, chance)
                    died.update([how] if how else [])
                    after, patience = None, time.monotonic() - began + chance.uniform(0.5, 8)
                    if died.total() >= kills:
                        break
                time.sleep(0.01)
            code = process.wait()
        mend()
        assert code == 0 or died.total() > deaths, f"exit code {code}, and nothing was killed:\n{sweep.said()}"
        if code == 0 and died.total() < kills:
            break  # it was through before it could be killed again
    return died


@contextmanager
def bucket() -> Iterator[None]:
    """``gs://kills``, for this process and those it starts."""
    with emulator() as url:
        more = {"STORAGE_EMULATOR_HOST": url, "FSSPEC_GS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        os.environ.update(more)
        import gcsfs

        gcsfs.GCSFileSystem().mkdir("kills")
        yield


def run(asked: argparse.Namespace) -> list[str]:
    """All sweeps; the violations that were found."""
    chance, place = random.Random(asked.seed), asked.keep or Path(tempfile.mkdtemp(prefix="kills-"))
    place.mkdir(parents=True, exist_ok=True)
    strike = strike_on_slurm if asked.launcher == "slurm" else strike_here
    disk = Disk(place, asked.disk) if asked.disk else None
    overrides, cache = work(asked.work, place), {"SELFSPEC_CACHE": str(place / "cache")}
    launched = [f"hydra/launcher={asked.launcher}", *SETTINGS[asked.launcher]]

    def sweep(name: str, more: list[str]) -> Sweep:
        leased = ["checkpoint=gcs", "checkpoint.lease_s=4"] if asked.bucket else []
        checkpoint = f"gs://kills/{name}" if asked.bucket else str(disk.folder / name) if disk else ""
        return Sweep(
            place / name, [*overrides, *leased, *more], checkpoint, 0.1, asked.work in ("fake", "quality"), cache
        )

    undisturbed = sweep("undisturbed", []).finish()
    calls = len(undisturbed.calls())
    died, again, wrong, rounds = Counter[str](), 0, list[str](), 0
    end = time.monotonic() + asked.seconds
    while died.total() < asked.kills and time.monotonic() < end:
        one = sweep(f"sweep-{rounds:02d}", launched)
        if asked.clock:
            one.environment = cache | {"ENGINE_CLOCK": str(asked.clock)}
        kills = min(chance.randint(2, 6), asked.kills - died.total())
        lost = disturb(one, kills, calls, disk.strike if disk else strike, chance, disk.mend if disk else lambda: None)
        one.finish()
        died, again, rounds = died + lost, again + len(one.calls()) - calls, rounds + 1
        if asked.launcher == "slurm":
            subprocess.run(["scancel", f"--name={NAME}"], check=True)  # what launchers that were killed have left
        found = violations(one, undisturbed)
        if asked.clock:  # when a call began and when its unit was finished is by two clocks
            found = [each for each in found if "began when that was finished" not in each]
        found += ["a traceback"] if disk and "Traceback" in one.said() else []
        if one.tracked() != undisturbed.tracked():
            found.append(f"MLflow has {one.tracked()}")
        wrong += found
        print(f"{one.folder}: {dict(lost)}; {len(found)} violations", *found, sep="\n", flush=True)
    if disk:
        disk.close()
    print(f"{rounds} sweeps of {calls} calls, {died.total()} kills: {dict(died)}")
    print(f"{again} calls made again, {again / max(died.total(), 1):.2f} a kill; {len(wrong)} violations")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1e9, help="after so many, no further sweep is begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", choices=("fake", "torch", "quality", "soak"), default="fake")
    parser.add_argument("--launcher", choices=("basic", "local", "slurm"), default="basic")
    parser.add_argument("--bucket", action="store_true")
    parser.add_argument("--clock", type=int)
    parser.add_argument("--disk", choices=("full", "readonly"))
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    with bucket() if asked.bucket else nullcontext(""):
        sys.exit(bool(run(asked)))


if __name__ == "__main__":
    main()
