"""The launcher that Hydra finds: a sweep's jobs as processes on this machine, a few at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from hydra_plugins.selfspec_launcher._jobs import Job, ProcessLauncher, State

if TYPE_CHECKING:
    from selfspec.plan import Plan

LOG = "log.txt"
PATIENCE_S = 30.0
"""How long a job may take to end once it was told to."""


class LocalLauncher(ProcessLauncher):
    """Hydra imports this file whatever is run, so all that costs time is imported within functions."""

    def __init__(self, n_jobs: int, gpus: list[int], poll_s: float) -> None:
        self.n_jobs, self.gpus, self.poll_s = n_jobs, list(gpus), poll_s
        self._running: dict[int, tuple[subprocess.Popen[bytes], Path]] = {}
        self._places = list(range(n_jobs))
        """Those that are free; a job in place k sees the k-th GPU."""
        self._place_of: dict[int, int] = {}

    @staticmethod
    def check(config: DictConfig, plans: "Sequence[Plan]") -> None:
        """Refuses what cannot work.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """
        from selfspec.errors import ConfigError

        for key, least in (("n_jobs", 1), ("poll_s", 0)):
            if config.hydra.launcher[key] < least:
                raise ConfigError(f"hydra.launcher.{key}={config.hydra.launcher[key]}: must be >= {least}")

    def start(self, todo: Sequence[Job]) -> int:
        """Starts jobs while there is a place for one more."""
        from selfspec.files import open_regular, storing

        started = todo[: len(self._places)]
        for job in started:
            place, log = self._places.pop(0), job.folder / LOG
            with storing(log):
                job.folder.mkdir(parents=True, exist_ok=True)
                file = os.fdopen(open_regular(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")
            with file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "selfspec.run", *job.arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment(place),
                    start_new_session=True,  # a Ctrl-C is for us; jobs are told by us, once
                    preexec_fn=_die_with_parent(),
                )
            self._running[job.number], self._place_of[job.number] = (process, log), place
        return len(started)

    def states(self, numbers: Sequence[int]) -> Mapping[int, State]:
        """How those processes are."""
        found = {}
        for number in numbers:
            process, log = self._running[number]
            code = process.poll()
            if code is None:
                found[number] = State(f"running, process {process.pid}, {log}")
                continue
            del self._running[number]
            self._places.append(self._place_of.pop(number))
            died = None if code == 0 else _why(code)
            found[number] = State(died or "finished", True, died, log)
        return found

    def stop(self) -> None:
        """Tells all jobs to end; those that do not are killed."""
        processes = [process for process, _ in self._running.values()]
        for process in processes:
            process.terminate()
        # One deadline for all: they were told at the same time.
        end = time.monotonic() + PATIENCE_S
        for process in processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    # The group: a job that hangs may have started others, which would outlive it.
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _environment(self, place: int) -> dict[str, str]:
        """Two OpenMP processes that both compute on all cores slow each other many times over: each gets its share.

        The last job too, alone as it may be: what is compared in one table is measured with as many threads.
        """
        from selfspec.provenance import hardware
        from selfspec.sweep_context import SweepContext

        cores = hardware()["physical_cores"]
        assert isinstance(cores, int), "it is a number"
        threads = {"OMP_NUM_THREADS": str(max(1, cores // min(self.n_jobs, self.count)))}
        gpu = {"CUDA_VISIBLE_DEVICES": str(self.gpus[place % len(self.gpus)])} if self.gpus else {}
        told = SweepContext.load(Path(self.config.hydra.sweep.dir)).environment()
        # In this order: a user's number of threads stands, a place's GPU does not give way to the environment's.
        return {**threads, **os.environ, **gpu, **told}


def _why(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"failed with exit code {code}"


def _die_with_parent() -> Callable[[], None] | None:
    """For the new process: should we die without a word (SIGKILL, a lost terminal), the system sends it SIGTERM."""
    if sys.platform != "linux":
        return None
    import ctypes

    # Looked up here: between fork and exec, the new process had better load nothing.
    prctl, of_parents_death, parent = ctypes.CDLL(None).prctl, 1, os.getpid()

    def die_with_parent() -> None:
        prctl(of_parents_death, signal.SIGTERM)
        if os.getppid() != parent:  # it died before that: nobody will send the signal
            os._exit(128 + signal.SIGTERM)

    return die_with_parent
