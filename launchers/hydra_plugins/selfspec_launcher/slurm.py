"""The launcher that Hydra finds: a sweep's jobs as an array of Slurm jobs."""

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from hydra_plugins.selfspec_launcher._jobs import Job, ProcessLauncher, State

if TYPE_CHECKING:
    import submitit

    from selfspec.plan import Plan

ARRAY = 1000
"""The most jobs in an array: Slurm's default limit (``MaxArraySize``)."""
FOLDER = ".submitit"
PATIENCE_S = 30.0
"""How long jobs may take to end once they were told to, and a result to show after its job has ended."""
_OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}
"""States a job does not leave by itself; one that is queued again is PENDING."""
_OURS = ("_target_", "max_num_timeout", "poll_s")


class SlurmLauncher(ProcessLauncher):
    """Hydra imports this file whatever is run, so all that costs time is imported within functions.

    How jobs are is asked of ``squeue`` alone. ``sacct``, which submitit asks, needs accounting: where there is none,
    one waits for ever for a job that was cancelled.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self.poll_s: float = settings["poll_s"]
        self._running: dict[int, submitit.Job[None]] = {}
        self._gone: dict[int, float] = {}
        """When a job was first seen to have ended without a result."""
        self._silent = False

    @staticmethod
    def check(config: DictConfig, plans: "Sequence[Plan]") -> None:
        """Refuses what cannot work.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """
        from selfspec.errors import ConfigError

        launcher = config.hydra.launcher
        for command in ("sbatch", "srun", "squeue", "scancel"):
            if shutil.which(command) is None:
                raise ConfigError(f"hydra/launcher=slurm: there is no {command} here; needs a machine of a Slurm")
        least_of = {"timeout_min": 1, "signal_delay_s": 1, "max_num_timeout": 0, "array_parallelism": 1, "poll_s": 0}
        for key, least in least_of.items():
            if launcher[key] < least:
                raise ConfigError(f"hydra.launcher.{key}={launcher[key]}: must be >= {least}")
        if launcher.signal_delay_s >= 60 * launcher.timeout_min:
            raise ConfigError(
                f"hydra.launcher.signal_delay_s={launcher.signal_delay_s}: must be less than "
                f"hydra.launcher.timeout_min={launcher.timeout_min} minutes"
            )
        script = _executor(launcher, Path(FOLDER))._make_submission_file_text("true", "")
        asked = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
        if asked.returncode != 0:
            raise ConfigError(f"hydra.launcher: sbatch refuses it: {_words(asked.stderr)}")

    def start(self, todo: Sequence[Job]) -> int:
        """Submits all jobs that wait, an array at a time.

        Raises:
            LaunchError: ``sbatch`` refuses; in its words.
        """
        import submitit

        from hydra_plugins.selfspec_launcher._slurm_job import Run
        from selfspec.errors import LaunchError
        from selfspec.sweep_context import SweepContext

        jobs, sweep = todo[:ARRAY], Path(self.config.hydra.sweep.dir)
        told = SweepContext.load(sweep).environment()
        executor = _executor(self._settings, sweep / FOLDER)
        try:
            with executor.batch():  # one array
                submitted = [executor.submit(Run(job.arguments, told)) for job in jobs]
        except (submitit.core.utils.FailedJobError, subprocess.SubprocessError) as error:
            raise LaunchError(f"sbatch refuses: {_words(str(error))}") from error
        self._running.update(zip((job.number for job in jobs), submitted, strict=True))
        return len(jobs)

    def states(self, numbers: Sequence[int]) -> Mapping[int, State]:
        """What Slurm says of those jobs."""
        from submitit.core import utils

        asked, found = self._squeue(), {}
        for number in numbers:
            job = self._running[number]
            name, log = job.job_id, job.paths.stdout
            # The result before Slurm's word: a job may be known as running, or not at all, for a while after it.
            if job.paths.result_pickle.exists():
                outcome, trace = utils.pickle_load(job.paths.result_pickle)
                died = None if outcome == "success" else f"{trace.strip().splitlines()[-1].split(': ', 1)[-1]} ({log})"
                found[number] = State(died or f"finished ({name})", True, died)
                continue
            if asked is None:
                continue
            state, reason = asked.get(name, ("GONE", "Slurm knows it no more"))
            if state not in _OVER and state != "GONE":
                note = f", {reason}" if state == "PENDING" and reason != "None" else ""
                found[number] = State(f"{state.lower()} ({name}{note})", log=log)
                self._gone.pop(number, None)  # requeued: should it be gone again, it has as long as any
            # Completed or gone without a result: a network's file system may show the file later.
            elif state not in ("COMPLETED", "GONE") or self._long_gone(number):
                died = f"Slurm job {name}: {state}" + (f" ({reason})" if reason != "None" else "")
                found[number] = State(died, True, died, log)
        return found

    def stop(self) -> None:
        """Has running jobs end by themselves, which may take them longer than Slurm grants, and cancels the others."""
        if not (left := self._left()):
            return
        print(f"ending {len(left)} Slurm jobs", file=sys.stderr, flush=True)
        # Those that wait first, or they would start as others end; then a word to the others; then by force.
        for how, patience_s in ((["--state=PENDING"], 0.0), (["--signal=TERM"], PATIENCE_S), ([], PATIENCE_S)):
            subprocess.run(["scancel", "--quiet", *how, *left], check=False)
            end = time.monotonic() + patience_s
            while (left := self._left()) and time.monotonic() < end:
                time.sleep(min(1.0, self.poll_s))
            if not left:
                return
        print(f"warning: Slurm still has {' '.join(left)}", file=sys.stderr)

    def _left(self) -> list[str]:
        asked = self._squeue()
        # Where Slurm cannot be asked, all may be left: better told to end twice than not.
        names = [job.job_id for job in self._running.values()]
        return names if asked is None else [name for name in names if name in asked and asked[name][0] not in _OVER]

    def _squeue(self) -> dict[str, tuple[str, str]] | None:
        """State and reason of each of our jobs that Slurm still knows; ``None``: it cannot be asked just now."""
        from selfspec.errors import one_line

        arrays = sorted({job.job_id.split("_")[0] for job in self._running.values()})
        if not arrays:
            return {}
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={','.join(arrays)}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 and "Invalid job id" not in done.stderr:  # that: it knows none of them any more
            if not self._silent:
                print(f"warning: squeue: {one_line(done.stderr)}; asked again", file=sys.stderr)
            self._silent = True
            return None
        self._silent = False
        rows = (line.split("|", 2) for line in done.stdout.splitlines())
        return {name: (state, reason) for name, state, reason in rows}

    def _long_gone(self, number: int) -> bool:
        """Whether a job has ended so long ago that a file of its would be seen here by now."""
        first = self._gone.setdefault(number, time.monotonic())
        return time.monotonic() - first > PATIENCE_S


def _executor(settings: Mapping[str, Any], folder: Path) -> "submitit.SlurmExecutor":
    import submitit

    given = {key: _plain(value) for key, value in settings.items() if key not in _OURS and value not in (None, [], {})}
    setup = ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"] if "cpus_per_task" in given else []
    given["setup"] = [*setup, *given.get("setup", [])]  # since 22.05, srun does not take it over by itself
    given["additional_parameters"] = {"requeue": True, **given.get("additional_parameters", {})}
    executor = submitit.SlurmExecutor(folder, max_num_timeout=settings["max_num_timeout"])
    if "mem_gb" in given:
        given["mem"] = f"{given.pop('mem_gb') * 1024:.0f}M"
    given |= {"job_name": given.pop("name"), "time": given.pop("timeout_min"), "stderr_to_stdout": True}
    executor.update_parameters(**given)
    return executor


def _words(said: str) -> str:
    """The last of what a command of Slurm's says."""
    *_, last = ["and says nothing", *said.strip().splitlines()]
    return last.removeprefix("sbatch: error: ").removeprefix("allocation failure: ")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
