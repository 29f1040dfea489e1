"""What happens once for all jobs: checks before anything is written, the sweep's run, its table at the end.

Hydra calls this as a callback, in the process that the user started. The jobs, wherever they run, find the
sweep's tracker run in ``sweep.json`` in the sweep's folder.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from selfspec import job, plan, report, results, tracking
from selfspec.compose import Composer
from selfspec.config import HANDLES, Resume
from selfspec.errors import ConfigError, SelfspecError
from selfspec.plan import Plan
from selfspec.provenance import storing, write_atomic
from selfspec.refusal import leave

FILE = "sweep.json"
RUN = "SELFSPEC_SWEEP_RUN"
"""The environment variable that names a sweep's tracker run to a job that cannot see the sweep's folder."""
LAUNCH = "SELFSPEC_SWEEP"
"""The one that names the sweep itself to it: its folder, which no other sweep has."""


class Sweep(Callback):
    """Hydra turns what a callback raises into a warning, so refusals leave by ``sys.exit``."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """One job: refuses a plan that cannot work, before Hydra makes its folder."""
        _or_leave(lambda: _begin(config))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A sweep: refuses all of it if one of its plans cannot work; else opens its tracker run."""
        _pin_folder(config)
        _or_leave(lambda: _open(config))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Lets go of the job's configs, which every launcher would keep until the last job has ended."""
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """One table over all jobs; exits with 1 if any failed."""
        _or_leave(lambda: _close(config))


def parent_run(folder: Path) -> str | None:
    """The tracker run of the sweep in ``folder``, or of the one that a job elsewhere was told it belongs to."""
    run_id: str | None = os.environ.get(RUN) or _noted(folder).get("run_id")
    return run_id


def _or_leave(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # Hydra would make a warning of it, and go on
        leave(error)


def launch(folder: Path | None = None) -> str | None:
    """What names the sweep in ``folder`` in journals, or the one that a job elsewhere was told it belongs to.

    Jobs of one sweep that come to the same plan, and one that was killed and comes back, carry on with a journal
    that their sweep has begun, even with ``checkpoint.resume=never``.
    """
    return os.environ.get(LAUNCH) or (None if folder is None else str(folder))


def _noted(folder: Path) -> dict[str, Any]:
    """What is in ``sweep.json``."""
    try:
        noted: dict[str, Any] = json.loads((folder / FILE).read_text())
        return noted
    except FileNotFoundError:  # another sweeper than Hydra's own
        return {}


def _begin(config: DictConfig) -> None:
    _refuse_alone(config)
    _check([config], fetch=True)
    folder = Path(config.hydra.run.dir)
    with storing(folder):  # Hydra makes it next, and would not say why it cannot
        folder.mkdir(parents=True, exist_ok=True)


def _pin_folder(config: DictConfig) -> None:
    """One folder for all jobs: a sweep over experiments would otherwise put each under its own experiment's name."""
    quoted = config.hydra.sweep.dir.replace("\\", "\\\\").replace("'", "\\'")
    with read_write(config), open_dict(config):
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")


def _open(config: DictConfig) -> None:
    if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return  # another sweeper chooses its jobs as it goes: they are checked one by one
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None, "a callback is called by it"
    hydra.config_loader = Composer(hydra.config_loader.get_search_path())
    launcher = get_class(config.hydra.launcher._target_)
    plans = _check(_jobs(config), fetch=getattr(launcher, "shares_disk", launcher.__name__ == BasicLauncher.__name__))
    check = getattr(launcher, "check", None)
    if check is not None:  # a launcher of ours
        check(config.hydra.launcher, plans)
    if config.hydra.launcher.get("dryrun"):
        return
    identities = sorted({p.id for p in plans})
    sweep_id = hashlib.sha256(",".join(identities).encode()).hexdigest()[:16]
    folder = Path(config.hydra.sweep.dir)
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tracker = tracking.make(plans[0].tracking, plans[0].output_dir)
    run_id = tracker.sweep_parent(sweep_id, f"{plans[0].name}: {' '.join(config.hydra.overrides.task)}")
    write_atomic(folder / FILE, json.dumps({"sweep": sweep_id, "run_id": run_id, "plans": identities}))


def _close(config: DictConfig) -> None:
    folder = Path(config.hydra.sweep.dir)
    found = results.find(folder)
    files = report.write(folder, found)
    report.show(found)
    failed = {result["plan_id"] for result in found if result["status"] == "failed"}
    run_id = parent_run(folder)
    if run_id is not None:
        settings = plan.make(_task(config))
        tracker = tracking.make(settings.tracking, settings.output_dir)
        tracker.start("", {}, {}, run_id, None)
        tracker.artifacts(files)
        tracker.bury(run_id, failed)
        tracker.finish("FAILED" if failed else "FINISHED")
    if failed:
        sys.exit(SelfspecError.exit_code)


def _jobs(config: DictConfig) -> Iterator[DictConfig]:
    """The config of every job of a sweep, composed as Hydra's own sweeper will compose it."""
    loader = GlobalHydra.instance().config_loader()
    params = config.hydra.sweeper.params or {}
    asked = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(asked)
    swept = {each.get_key_element() for each in overrides if each.is_sweep_override()}
    for job_overrides in BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]:
        composed = loader.load_sweep_config(config, list(job_overrides))
        _refuse_dropped(config, composed, [each for each in job_overrides if each.split("=", 1)[0] in swept])
        yield composed


def _refuse_alone(config: DictConfig) -> None:
    """Hydra uses a launcher with ``-m`` only, and would run the job here without a word."""
    launcher = config.hydra.runtime.choices["hydra/launcher"]
    if launcher != "basic":
        raise ConfigError(f"hydra/launcher={launcher}: launches the jobs of a sweep; add -m, for a single job too")


def _refuse_dropped(config: DictConfig, composed: DictConfig, swept: list[str]) -> None:
    """Hydra takes the launcher from what is not swept, and would drop without a word what a swept option asks for."""
    ours, theirs = (each.hydra.runtime.choices["hydra/launcher"] for each in (config, composed))
    settings, asked = (OmegaConf.to_container(each.hydra.launcher) for each in (config, composed))
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


def _task(config: DictConfig) -> DictConfig:
    """The config less Hydra's own part."""
    ours = config.copy()
    with open_dict(ours):
        del ours["hydra"]
    return ours


def _check(configs: Iterable[DictConfig], fetch: bool) -> list[Plan]:
    """The plan of each job. All are made before the first is checked, and those of one identity are checked once."""
    plans, known = list[Plan](), dict[tuple[str, Resume], Plan]()
    idle: set[str] | None = None
    for config in configs:
        ours = _task(config)
        made = plan.make(ours)
        plans.append(known.setdefault((made.id, made.checkpoint.resume), made))
        if idle is None:
            idle = {o.split("=", 1)[0] for o in config.hydra.overrides.task} & set(HANDLES)
        if idle:
            idle &= set(plan.idle_handles(ours, idle))
    for distinct in known.values():
        job.check(distinct)
        if fetch:
            job.fetch(distinct)
    for handle in sorted(idle or ()):
        print(f"warning: {handle} has no effect in this combination", file=sys.stderr)
    return plans
