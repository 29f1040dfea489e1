"""What happens once for all jobs: checks before anything is written, the sweep's run, its table at the end.

Hydra calls this as a callback, in the process that the user started. The jobs, wherever they run, are told of their
sweep by :class:`selfspec.sweep_context.SweepContext`.
"""

import hashlib
import os
import secrets
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from selfspec import checkpoint, credentials, job, plan, tracking
from selfspec.config import HANDLES, Resume, home
from selfspec.errors import ConfigError, Interrupted, LaunchError, SelfspecError
from selfspec.files import storing
from selfspec.interrupt import shield
from selfspec.plan import Plan
from selfspec.refusal import exit_with
from selfspec.report import results, tables
from selfspec.sweep import compose
from selfspec.sweep_context import SweepContext


class Sweep(Callback):
    """Hydra turns what a callback raises into a warning, so refusals leave by ``sys.exit``."""

    def __init__(self) -> None:
        self._first: Plan | None = None
        """Of its plans. The sweep's own config need be no job's: what it leaves open may be swept over."""
        self._folders: list[Path] = []
        """Of its jobs, in order, where they are known from the start. An earlier sweep may have had them, and more."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """One job: refuses a plan that cannot work, before Hydra makes its folder."""
        _or_exit(lambda: _begin(config))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A sweep: refuses all of it if one of its plans cannot work; else opens its tracker run."""
        _or_exit(lambda: _pin_folder(config))
        _or_exit(lambda: self._open(config))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Lets go of the job's configs, which every launcher would keep until the last job has ended."""
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """One table over all jobs; exits with 1 if any failed."""
        _or_exit(lambda: self._close(Path(config.hydra.sweep.dir)))

    def _open(self, config: DictConfig) -> None:
        _refuse_chdir(config)
        jobs = list[tuple[Plan, Path]]()
        if config.hydra.sweeper._target_.endswith(".BasicSweeper"):  # another chooses its jobs as it goes
            jobs = _jobs(config)
        if config.hydra.launcher.get("dryrun"):
            return
        folder = Path(config.hydra.sweep.dir)
        self._folders = [own for _, own in jobs]
        with storing(folder):
            used = folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
        for own in self._folders if used else ():
            results.clear(own)
        plans, run_id = tuple(sorted({made.id for made, _ in jobs})), None
        if jobs:
            self._first = jobs[0][0]
            sweep_id = hashlib.sha256(",".join(plans).encode()).hexdigest()[:16]
            tracker = tracking.make(self._first.tracking, self._first.output_dir)
            said = " ".join(compose.given(config.hydra.overrides.task))
            run_id = tracker.sweep_parent(sweep_id, f"{self._first.name}: {said}")
        SweepContext(secrets.token_hex(8), run_id, plans).save(folder)

    def _close(self, folder: Path) -> None:
        found = self._results(folder)
        lost = max(0, len(self._folders) - len(found))
        files = tables.write(folder, found)
        tables.show(found)
        failed = {result["plan_id"] for result in found if result["status"] == "failed"}
        run_id = SweepContext.load(folder).run_id
        if self._first is not None and run_id is not None:
            tracker = tracking.make(self._first.tracking, self._first.output_dir)
            try:
                with shield():
                    tracker.start("", {}, {}, run_id, None)
                tracker.artifacts(files)
                tracker.mark_orphans_failed(run_id, failed)
            except Interrupted:
                tracker.finish("KILLED")
                raise
            tracker.finish("FAILED" if failed or lost else "FINISHED")
        if lost:
            raise LaunchError(f"{folder}: {lost} of {len(self._folders)} jobs have left no result")
        if failed:
            sys.exit(SelfspecError.exit_code)

    def _results(self, folder: Path) -> list[results.Result]:
        if not self._folders:
            return results.find(folder)
        paths = [own / results.FILE for own in self._folders]
        listed = set(folder.rglob(results.FILE))  # what a network file system lists, it may yet say is not there
        return [results.read(path) for path in paths if path in listed or path.exists()]


def _or_exit(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # Hydra would make a warning of it, and go on
        exit_with(error)


def _begin(config: DictConfig) -> None:
    _refuse_alone(config)
    _refuse_chdir(config)
    with compose.hydras(config):
        home("output_dir", config.output_dir)
        folder = Path(home("hydra.run.dir", config.hydra.run.dir))
    with read_write(config), open_dict(config):
        config.hydra.run.dir = str(folder)
    _check([(config, folder)], here=True)
    with storing(folder):  # Hydra makes it next, and would not say why it cannot
        folder.mkdir(parents=True, exist_ok=True)


def _pin_folder(config: DictConfig) -> None:
    """One folder for all jobs: a sweep over experiments would otherwise put each under its own experiment's name."""
    with compose.hydras(config):
        folder = home("hydra.sweep.dir", config.hydra.sweep.dir)
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = folder
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={compose.quoted(folder)}")


def _jobs(config: DictConfig) -> list[tuple[Plan, Path]]:
    """The plan and the folder of every job of a sweep, checked."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None, "a callback is called by it"
    hydra.config_loader = compose.Composer(hydra.config_loader.get_search_path())
    launcher = get_class(config.hydra.launcher._target_)
    dry = bool(config.hydra.launcher.get("dryrun"))
    jobs = _check(_composed(config), here=not getattr(launcher, "elsewhere", False), ask_buckets=not dry)
    if not jobs:
        raise ConfigError(f"{' '.join(compose.given(config.hydra.overrides.task))}: is a sweep over nothing")
    if len({folder for _, folder in jobs}) < len(jobs):
        raise ConfigError("hydra.sweep.subdir: gives jobs a folder in common; ${hydra.job.num} tells them apart")
    inside = os.path.normpath(config.hydra.sweep.dir)
    if outside := [folder for _, folder in jobs if not Path(os.path.normpath(folder)).is_relative_to(inside)]:
        raise ConfigError(f"hydra.sweep.subdir: gives a job the folder {outside[0]}, outside of the sweep's")
    check = getattr(launcher, "check", None)
    if check is not None:  # a launcher of ours
        check(config, [made for made, _ in jobs])
    return jobs


def _composed(config: DictConfig) -> Iterator[tuple[DictConfig, Path]]:
    """The config and the folder of every job of a sweep, in the order in which Hydra's own sweeper has them."""
    loader = GlobalHydra.instance().config_loader()
    params = config.hydra.sweeper.params or {}
    asked = [f"{key}={value}" for key, value in params.items()] + compose.given(config.hydra.overrides.task)
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(asked)
    given = {each.split("=", 1)[0] for each in compose.given(config.hydra.overrides.task)}
    swept = {each.get_key_element() for each in overrides if each.is_sweep_override()}
    for number, job_overrides in enumerate(BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]):
        composed, folder = compose.job(loader, config, job_overrides, number)
        _refuse_dropped(config, composed, [each for each in job_overrides if each.split("=", 1)[0] in swept], given)
        yield composed, folder


def _refuse_chdir(config: DictConfig) -> None:
    """A job would look for its checkpoint, and for what paths in its config name, in a folder that is new each time."""
    if config.hydra.job.chdir:
        raise ConfigError("hydra.job.chdir=true: paths are meant from where the command is given; must be false")


def _refuse_key(config: DictConfig) -> None:
    """Hydra keeps a job's config as it was given in the job's folder, which the tracker is given."""
    if not OmegaConf.is_interpolation(config.serve, "api_key") and config.serve.api_key is not None:
        raise ConfigError(
            "serve.api_key: would be kept with the results; give it as SELFSPEC_API_KEY, in the environment"
        )
    for key in ("hydra.job.env_set", "hydra.launcher.envs"):
        for name in OmegaConf.select(config, key) or ():
            if credentials.named(name):
                raise ConfigError(
                    f"{key}.{name}: would be kept with the results; set it in the environment, and name it in "
                    "hydra.launcher.secrets where SkyPilot is to hand it on"
                )


def _refuse_alone(config: DictConfig) -> None:
    """Hydra uses a launcher with ``-m`` only, and would run the job here without a word."""
    launcher = config.hydra.runtime.choices["hydra/launcher"]
    if launcher != "basic":
        raise ConfigError(f"hydra/launcher={launcher}: launches the jobs of a sweep; add -m, for a single job too")


def _refuse_dropped(config: DictConfig, composed: DictConfig, swept: list[str], given: Collection[str]) -> None:
    """Hydra takes launcher and sweeper from what is not swept, and would drop without a word what a swept option asks.

    Args:
        swept: the job's own choices.
        given: keys that have values on the command line, which an option's own sweep over them gives way to.
    """
    ours, theirs = (each.hydra.runtime.choices["hydra/launcher"] for each in (config, composed))
    settings, asked = (OmegaConf.to_container(each.hydra.launcher) for each in (config, composed))
    params, inner = ({**(each.hydra.sweeper.get("params") or {})} for each in (config, composed))
    if lost := [f"{key}={value}" for key, value in inner.items() if params.get(key) != value and key not in given]:
        raise ConfigError(
            f"{' '.join(swept)}: is a sweep over {' '.join(lost)}, which would be dropped; run it alone, or sweep over "
            "that here as well"
        )
    if settings == asked:
        return
    asking = " ".join(swept)
    if ours != theirs:
        raise ConfigError(
            f"{asking}: asks for hydra/launcher={theirs}, which a swept option cannot; all jobs would be launched by "
            f"{ours}: give hydra/launcher={theirs} as well, or do not sweep over it"
        )
    assert isinstance(settings, dict) and isinstance(asked, dict), "a launcher is a mapping"
    key = next(str(key) for key in asked if asked[key] != settings.get(key))
    raise ConfigError(
        f"{asking}: asks for hydra.launcher.{key}={asked[key]}, which a swept option cannot; all jobs are launched "
        f"with {settings.get(key)}: do not sweep over it"
    )


def _check(jobs: Iterable[tuple[DictConfig, Path]], here: bool, ask_buckets: bool = True) -> list[tuple[Plan, Path]]:
    """The plan of each job, and its folder.

    All are made before the first is checked, and those of one identity are checked once.

    Args:
        here: on this machine they run, so what they need must be on it.
        ask_buckets: for what is kept there. A dry run does not: one that is out of reach is asked for minutes.
    """
    made, known = list[tuple[Plan, Path]](), dict[tuple[str, Resume], Plan]()
    idle: set[str] | None = None
    for config, folder in jobs:
        _refuse_key(config)
        with compose.hydras(config):
            one = plan.make(ours := compose.task(config))
        made.append((known.setdefault((one.id, one.checkpoint.resume), one), folder))
        if idle is None:
            idle = {o.split("=", 1)[0] for o in compose.given(config.hydra.overrides.task)} & set(HANDLES)
        if idle:
            with compose.hydras(config):
                idle &= set(plan.idle_handles(ours, idle))
    job.check(*known.values(), here=here, ask_buckets=ask_buckets)
    places = () if ask_buckets else dict.fromkeys(one.checkpoint.dir for one in known.values())
    for place in places:
        if checkpoint.on_disk(place) is None:
            print(f"note: checkpoint.dir={place}: a dry run does not ask what is there", file=sys.stderr)
    for distinct in known.values() if here else ():
        job.fetch(distinct)
    for handle in sorted(idle or ()):
        print(f"warning: {handle} has no effect in this combination", file=sys.stderr)
    return made
