"""A sweep's jobs as processes: started, watched, and ended when the launcher is."""

import os
import re
import sys
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from selfspec.plan import Plan

LAST_LINES = 5
"""Of a dead job's log, in its row of the table."""
_NOT_FOR_A_JOB = re.compile(r"[+~]*hydra[./](launcher|sweeper|sweep|mode|run)\b")


@dataclass(frozen=True)
class Job:
    """One job of the sweep.

    Attributes:
        title: its number, and the overrides that tell it from the others.
        arguments: of ``python -m selfspec.run``, to run it alone.
        folder: where it leaves its result.
    """

    number: int
    title: str
    plan: "Plan"
    arguments: list[str]
    folder: Path


@dataclass(frozen=True)
class State:
    """How a job is.

    Attributes:
        words: for the user.
        over: it will not run again by itself.
        died: why it is over, where it has not come to its end.
        log: what it said.
    """

    words: str
    over: bool = False
    died: str | None = None
    log: Path | None = None


class ProcessLauncher(Launcher):
    """What is common to processes here and in a cluster that shares our file system."""

    poll_s: float
    count: int
    """Jobs in all."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See :class:`Launcher`."""
        self.context, self.config = hydra_context, config

    @abstractmethod
    def start(self, todo: Sequence[Job]) -> int:
        """Starts the first of the jobs that wait, as many as there is room for; how many those are."""

    @abstractmethod
    def states(self, numbers: Sequence[int]) -> Mapping[int, State]:
        """How those jobs are; one that nothing is known of is left out."""

    @abstractmethod
    def stop(self) -> None:
        """Has all jobs end, keeping what they have, and waits until they have ended."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs all jobs; each returns its speed-up. One that died is a failed row, and hides no other.

        Raises:
            Interrupted: SIGTERM or SIGINT; no job runs any more, and each can be carried on with.
        """
        from selfspec.errors import one_line
        from selfspec.interrupt import shield
        from selfspec.report import results

        jobs = self._jobs(job_overrides, initial_job_idx)
        todo, running, said = list(jobs), dict[int, Job](), dict[int, str]()
        self.count = len(jobs)
        try:
            while todo or running:
                with shield():  # a job that is started and not known of would be nobody's to end
                    started = todo[: self.start(todo) if todo else 0]
                running.update({job.number: job for job in started})
                del todo[: len(started)]
                for number, state in self.states(list(running)).items():
                    job = running[number]
                    if state.words != said.get(number):
                        print(one_line(f"{job.title}: {state.words}"), file=sys.stderr, flush=True)
                        said[number] = state.words
                    if state.over:
                        del running[number]
                        self._settle(job, state)
                if running:
                    time.sleep(self.poll_s)
        # Also a KeyboardInterrupt: no job may outlive the launcher, whatever ends it.
        except BaseException:
            self.stop()
            raise
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=results.speedup(job.folder)) for job in jobs]

    def _jobs(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        from selfspec import plan
        from selfspec.sweep import compose

        common = set.intersection(*(set(overrides) for overrides in job_overrides))
        jobs = []
        for number, overrides in enumerate(job_overrides, first):
            config, folder = compose.job(self.context.config_loader, self.config, overrides, number)
            title = " ".join([f"job {number}", *(override for override in overrides if override not in common)])
            with compose.hydras(config):
                made = plan.make(compose.task(config))
            told = [*arguments(self.config, overrides), *pins(made), f"hydra.run.dir={compose.quoted(folder)}"]
            jobs.append(Job(number, title, made, told, folder))
        return jobs

    def _settle(self, job: Job, state: State) -> None:
        """Sees to it that a job which is over has a result, if only one that says why there is none."""
        from selfspec.report import results

        if state.died is None or (job.folder / results.FILE).exists():
            return
        from selfspec.errors import LaunchError

        lines = last_lines(state.log)
        for line in lines:
            print(f"job {job.number}: {line}", file=sys.stderr)
        said = f"; {state.log} ends in: {' / '.join(lines)}" if lines else ""
        results.failed(job.plan, job.folder, LaunchError(f"{state.died}{said}"), {})


def arguments(config: DictConfig, overrides: Sequence[str], root: str | None = None) -> list[str]:
    """What ``python -m selfspec.run`` is told to run one job of a sweep alone.

    Args:
        config: of the sweep.
        overrides: of the job.
        root: of a job elsewhere, the folder that it starts in a copy of.
    """
    from selfspec.sweep import compose

    main, more = config_folders(config)
    if root is None:
        found = [f"--config-path={main}", *(f"--config-dir={folder}" for folder in more)]
    else:
        found = [f"--config-dir={folder.relative_to(Path(root).resolve())}" for folder in more]
    found.append(f"--config-name={config.hydra.job.config_name}")
    kept = [override for override in compose.given(config.hydra.overrides.hydra) if not _NOT_FOR_A_JOB.match(override)]
    return [*found, *overrides, *kept, "hydra/launcher=basic", "hydra.mode=RUN"]


def pins(plan: "Plan") -> list[str]:
    """What has a job run the very plan, also where a hub's branch has moved on by the time it starts."""
    from selfspec.sweep import compose

    return [f"{key}={compose.quoted(source)}" for key, source in plan.hub_sources.items()]


def config_folders(config: DictConfig) -> tuple[Path, list[Path]]:
    """Where configs are from: our folder of them, or what was given as ``--config-path``; and as ``--config-dir``."""
    sources = config.hydra.runtime.config_sources
    (main,) = [Path(source.path).resolve() for source in sources if source.provider == "main"]
    return main, [Path(source.path).resolve() for source in sources if source.provider == "command-line"]


def last_lines(log: Path | None) -> list[str]:
    """The end of a log, without empty lines and what submitit notes for itself."""
    if log is None or not log.exists():
        return []
    from selfspec.errors import one_line

    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 10_000))
        lines = file.read().decode(errors="replace").splitlines()
    kept = (one_line(line) for line in lines if line.strip() and not line.startswith("submitit "))
    return [*kept][-LAST_LINES:]
