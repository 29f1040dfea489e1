"""``hydra/launcher=slurm`` on a real Slurm (``tests/slurm/up.sh``): preempted, queued again, cancelled."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from launched import HELD_UNITS, Sweep, rows, tracked, until

from hydra_plugins.selfspec_launcher import slurm as slurm_launcher
from hydra_plugins.selfspec_launcher.slurm import SlurmLauncher

Run = Callable[..., tuple[int, str, str]]

needs_slurm = pytest.mark.skipif(
    "SLURM_TEST" not in os.environ,
    reason="SLURM_TEST is not set: no Slurm was brought up for tests (tests/slurm/up.sh)",
)
pytestmark = pytest.mark.slow
LAUNCHER = ("hydra/launcher=slurm", "hydra.launcher.poll_s=0.5", "hydra.launcher.cpus_per_task=1")
CLOCK = "bench/cpu_utilisation"
"""The one column of the fake engine's that is measured by a real clock."""


def array(sweep: Sweep) -> str:
    """The id of a sweep's Slurm jobs, which are <id>_0, <id>_1, ..."""
    (script,) = (sweep.folder() / ".submitit").glob("[0-9]*_submission.sh")
    return script.name.split("_")[0]


def restarted(sweep: Sweep) -> int:
    """How many of them were queued again."""
    return len(re.findall(r"Restarts=[1-9]", slurm("scontrol", "show", "job", array(sweep))))


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@needs_slurm
def test_a_sweep_that_is_preempted_ends_like_one_that_is_not(run: Run, fake: list[str], tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    common = ["K=1,2,3", "scale.prompts=30", "tracking=mlflow", f"tracking.uri={uri}"]
    ours = [each for each in fake if each != "tracking=none"]
    sweep = Sweep(tmp_path, *LAUNCHER, *ours, *common)
    sweep.hold.touch()
    with sweep.started() as process:
        until(lambda: sweep.held(3), process, sweep.log)
        whole_node = slurm("sinfo", "--noheader", "--format=%c", "--partition=ondemand")
        slurm("sbatch", "--partition=ondemand", f"--cpus-per-task={whole_node}", "--output=/dev/null", "--wrap=true")
        until(lambda: restarted(sweep) == 3, process, sweep.log)
        sweep.hold.unlink()
        assert process.wait() == 0, sweep.log.read_text()
    assert len(sweep.units()) == 3 and sweep.once(30)

    parent, children = tracked(uri, "selfspec")
    assert [each.info.status for each in (parent, *children)] == ["FINISHED"] * 4

    alone = [f"output_dir={tmp_path / 'undisturbed'}" if each.startswith("output_dir=") else each for each in fake]
    assert run("-m", *alone, "K=1,2,3", "scale.prompts=30")[0] == 0
    (table,) = (tmp_path / "undisturbed").rglob("sweeps/*/summary.csv")
    assert [{**row, CLOCK: ""} for row in sweep.rows()] == [{**row, CLOCK: ""} for row in rows(table.parent)]


@needs_slurm
def test_one_that_runs_out_of_time_comes_back_and_one_that_is_cancelled_is_a_failed_row(
    fake: list[str], tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, *LAUNCHER, *fake, "K=1,2", "scale.prompts=30")
    sweep.hold.touch()
    with sweep.started() as process:
        until(lambda: sweep.held(2), process, sweep.log)
        slurm("scancel", "--signal=USR2", f"{array(sweep)}_0")  # as Slurm itself does before the time is up
        slurm("scancel", f"{array(sweep)}_1")
        until(lambda: "job 1 K=2: Slurm job" in sweep.log.read_text(), process, sweep.log)
        sweep.hold.unlink()
        assert process.wait() == 1
        rows = sweep.rows()
        assert [row["status"] for row in rows] == ["finished", "failed"]
        assert "CANCELLED" in rows[1]["error"] and "_1_0_log.out ends in" in rows[1]["error"]
        done, cancelled = sorted(sweep.units(), key=len, reverse=True)
        assert len(done) == len(set(done)) == 30 and len(cancelled) == HELD_UNITS


@needs_slurm
def test_a_sweep_that_is_ended_ends_its_jobs(fake: list[str], tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, *LAUNCHER, "hydra.launcher.array_parallelism=1", *fake, "K=1,2", "scale.prompts=30")
    sweep.hold.touch()
    with sweep.started() as process:
        until(lambda: sweep.held(1), process, sweep.log)
        process.terminate()
        assert process.wait() == 143
        assert slurm("squeue", "--noheader", "--format=%i", "--jobs", array(sweep)) == ""
        (log,) = (sweep.folder() / ".submitit").glob("*_0_0_log.out")
        assert "SIGTERM: finished work is kept" in log.read_text()


@needs_slurm
@pytest.mark.parametrize("asked", ["partition=none_such", "gres=gpu:none_such:1"])
def test_what_sbatch_would_refuse_is_refused_before_anything_is_written(
    run: Run, fake: list[str], tmp_path: Path, asked: str
) -> None:
    code, _, err = run("-m", *LAUNCHER, f"hydra.launcher.{asked}", *fake, "K=1,2")
    assert code == 2 and err.startswith("error: hydra.launcher: sbatch refuses it: ") and err.count("\n") == 1, err
    assert not (tmp_path / "outputs").exists()


def test_what_sbatch_is_told_and_does_not_say(
    run: Run, fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, cat = tmp_path / "commands", shutil.which("cat")
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))  # a real Slurm may be on the other
    for command in ("sbatch", "squeue", "scancel", "srun"):
        assert (code := run("-m", "hydra/launcher=slurm", *fake, "K=1,2"))[0] == 2, code
        (commands / command).write_text("#!/bin/sh\nexit 1\n")
        (commands / command).chmod(0o755)
    code, _, err = run("-m", "hydra/launcher=slurm", *fake, "K=1,2")
    assert (code, err) == (2, "error: hydra.launcher: sbatch refuses it: and says nothing\n")

    asked = (
        "hydra.launcher.setup=[module load cuda]",
        "hydra.launcher.additional_parameters={mail-type: END, x: true}",
    )
    (commands / "sbatch").write_text(f"#!/bin/sh\n{cat} > {tmp_path}/script\nexit 1\n")
    run("-m", "hydra/launcher=slurm", *fake, *asked, "K=1,2")
    lines = (tmp_path / "script").read_text().splitlines()
    assert {"#SBATCH --mail-type=END", "#SBATCH --x", "#SBATCH --requeue", "module load cuda"} <= set(lines)


def test_no_sbatch_is_refused(run: Run, fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    code, _, err = run("-m", "hydra/launcher=slurm", *fake, "K=1,2")
    assert (code, err) == (2, "error: hydra/launcher=slurm: there is no sbatch here; needs a machine of a Slurm\n")
    assert not (tmp_path / "outputs").exists()


def test_a_job_that_came_back_has_its_time_again_when_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = SimpleNamespace(stdout=tmp_path / "log", result_pickle=tmp_path / "none")
    launcher = object.__new__(SlurmLauncher)
    launcher._running, launcher._gone = {0: SimpleNamespace(job_id="7_0", paths=paths)}, {}  # type: ignore[dict-item]
    clock, queue = [0.0], dict[str, tuple[str, str]]()
    monkeypatch.setattr(slurm_launcher, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(launcher, "_squeue", lambda: queue)
    assert not launcher.states([0])  # gone, a moment ago
    clock[0] += 2 * slurm_launcher.PATIENCE_S
    queue["7_0"] = ("RUNNING", "None")
    assert not launcher.states([0])[0].over
    queue.clear()
    assert not launcher.states([0])
    clock[0] += 2 * slurm_launcher.PATIENCE_S
    assert launcher.states([0])[0].over
