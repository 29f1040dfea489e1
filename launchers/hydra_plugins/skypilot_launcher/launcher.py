"""The launcher that Hydra finds: a sweep's jobs as managed jobs of SkyPilot's, wherever there is a machine for them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.selfspec_launcher._jobs import arguments, config_folders
from hydra_plugins.skypilot_launcher.config import SkyPilotConf

if TYPE_CHECKING:
    from hydra_plugins.skypilot_launcher._bridge import Bridge
    from hydra_plugins.skypilot_launcher._fleet import Job
    from selfspec.plan import Plan


class SkyPilotLauncher(Launcher):
    """Hydra imports this file whatever is run, so all that costs time is imported within functions."""

    elsewhere = True
    """Jobs run on machines of their own: what is installed or fetched on this one is nothing to them."""

    def __init__(self, **settings: Any) -> None:
        self._settings = _typed(settings)
        self._config = DictConfig({})
        self._context: HydraContext | None = None

    @staticmethod
    def check(config: DictConfig, plans: "Sequence[Plan]") -> None:
        """Refuses, before anything is written, what cannot work elsewhere or what SkyPilot will not take.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """
        from hydra_plugins.skypilot_launcher import _bridge, _task

        settings = _typed({key: value for key, value in config.hydra.launcher.items() if key != "_target_"})
        _task.check_configs(settings, *config_folders(config))
        for plan in plans:
            _task.check(settings, plan)
        prepared = _prepared(_bridge.connect(settings.python), settings, _task.make(settings, plans[0], []))
        unlikely = (words for plan in plans for words in _task.not_copied(settings, plan))
        notes = [*prepared["said"], _task.left_to_the_pool(settings), *map(_task.untracked, plans), *unlikely]
        for words in dict.fromkeys(filter(None, notes)):
            print(f"note: {words}", file=sys.stderr)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See :class:`Launcher`."""
        self._context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs all jobs; each returns its speed-up, one that failed None, and is told of at the end.

        Raises:
            Interrupted: SIGTERM or SIGINT. Jobs go on.
            LaunchError: SkyPilot cannot be asked any more. Jobs go on.
            SystemExit: where jobs were only to be shown, or not to be waited for.
        """
        from rich.console import Console

        from hydra_plugins.skypilot_launcher import _bridge, _table, _task
        from hydra_plugins.skypilot_launcher._fleet import Fleet
        from selfspec.errors import Interrupted, one_line

        sky, console = _bridge.connect(self._settings.python), Console(stderr=True)
        jobs = self._jobs(job_overrides, initial_job_idx)
        prepared = _prepared(sky, self._settings, jobs[0].task)
        for job in jobs:  # they ask for the same machine each
            job.task["resources"] = prepared["task"]["resources"]
        if self._settings.dryrun:
            _show(jobs, prepared["hourly"])
            sys.exit(0)
        secrets = _task.secrets(self._settings, jobs[0].plan)
        try:
            with _table.live(console) as show:
                fleet = Fleet(sky, self._settings, jobs, show)
                fleet.start(secrets)
                if self._settings.wait:
                    fleet.watch(secrets)
        except Interrupted:
            if commands := _ending(jobs):
                print(f"jobs go on; to end them: {'; '.join(commands)}", file=sys.stderr)
            raise
        for job in jobs:
            for line in job.log:
                console.print(f"job {job.numbers[0]}: {one_line(line)}", soft_wrap=True, markup=False, highlight=False)
        if not all(job.over for job in jobs):
            print("launched, and not waited for: the same command comes back to the jobs, and to their results")
            sys.exit(0)
        by_number = {number: job for job in jobs for number in job.numbers}
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=_speedup(by_number[number]))
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]

    def _jobs(self, job_overrides: Sequence[Sequence[str]], first: int) -> "list[Job]":
        """One for each plan, in the order of the sweep."""
        from hydra_plugins.skypilot_launcher import _task
        from hydra_plugins.skypilot_launcher._fleet import Job
        from selfspec import plan as plans
        from selfspec.sweep import compose
        from selfspec.sweep_context import SweepContext

        assert self._context is not None, "Hydra calls setup() first"
        sweep = SweepContext.load(Path(self._config.hydra.sweep.dir))
        jobs: dict[str, Job] = {}
        for number, overrides in enumerate(job_overrides, first):
            config, folder = compose.job(self._context.config_loader, self._config, overrides, number)
            with compose.hydras(config):
                plan = plans.make(compose.task(config))
            _task.check(self._settings, plan)  # another sweeper than Hydra's own chooses its jobs as it goes
            told = arguments(self._config, overrides, self._settings.workdir)
            task = _task.make(self._settings, plan, told, sweep)
            job = jobs.setdefault(plan.id, Job(plan, task, [], []))
            job.numbers.append(number)
            job.folders.append(folder)
        return list(jobs.values())


def _prepared(sky: "Bridge", settings: SkyPilotConf, task: dict[str, Any]) -> dict[str, Any]:
    """What SkyPilot makes of a task; in a dry run the task as it is, where that cannot be asked.

    Raises:
        ConfigError: it refuses what was asked for.
        LaunchError: it cannot be asked, and jobs are to be launched.
    """
    from hydra_plugins.skypilot_launcher import _task
    from selfspec.errors import LaunchError

    try:
        found: dict[str, Any] = sky.ask("prepare", task=task, patience_s=_task.DRY_S if settings.dryrun else None)
    except LaunchError as error:
        if not settings.dryrun:
            raise
        return {"task": task, "said": [f"hydra.launcher: not checked by SkyPilot: {error}"], "hourly": None}
    return found


def _ending(jobs: "Sequence[Job]") -> list[str]:
    """The commands that end jobs which are under way; of one that is being launched, only the name is known."""
    known = [str(job.id) for job in jobs if job.under_way and job.id is not None]
    named = [f"sky jobs cancel -n {job.task['name']}" for job in jobs if job.under_way and job.id is None]
    return [*([f"sky jobs cancel {' '.join(known)}"] if known else []), *named]


def _show(jobs: "Sequence[Job]", hourly: float | None) -> None:
    import yaml

    for job in jobs:
        print(f"# job {','.join(map(str, job.numbers))}: {job.plan.label}")
        print(yaml.safe_dump(job.task, sort_keys=False, width=120) + "---")
    cost = "unknown: no catalog at hand" if hourly is None else f"from ${hourly:.2f} an hour each"
    print(f"# {len(jobs)} managed jobs, none of them launched; cost {cost}")


def _typed(settings: dict[Any, Any]) -> SkyPilotConf:
    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SkyPilotConf), settings))
    assert isinstance(typed, SkyPilotConf), "it was made of one"
    return typed


def _speedup(job: "Job") -> float | None:
    return None if job.result is None else job.result["measurements"].get("bench/speedup")
