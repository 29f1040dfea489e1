"""What happens once for all jobs: checks before anything is written, the sweep's run, its table at the end.

Hydra calls this as a callback, in the process that the user started. The jobs, wherever they run, find the
sweep's tracker run in ``sweep.json`` in the sweep's folder.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from selfspec import job, plan, report, results, tracking
from selfspec.config import HANDLES
from selfspec.errors import SelfspecError
from selfspec.plan import Plan
from selfspec.provenance import storing, write_atomic
from selfspec.refusal import leave

FILE = "sweep.json"


class Sweep(Callback):
    """Hydra turns what a callback raises into a warning, so refusals leave by ``sys.exit``."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """One job: refuses a plan that cannot work, before Hydra makes its folder."""
        _or_leave(lambda: _begin(config))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A sweep: refuses all of it if one of its plans cannot work; else opens its tracker run."""
        _pin_folder(config)
        _or_leave(lambda: _open(config))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """One table over all jobs; exits with 1 if any failed."""
        _or_leave(lambda: _close(config))


def parent_run(folder: Path) -> str | None:
    """The tracker run of the sweep in ``folder``."""
    try:
        run_id: str | None = json.loads((folder / FILE).read_text())["run_id"]
        return run_id
    except FileNotFoundError:  # another sweeper than Hydra's own
        return None


def _or_leave(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # Hydra would make a warning of it, and go on
        leave(error)


def has_run(folder: Path, plan_id: str) -> bool:
    """Whether a job of the sweep in ``folder`` has finished this plan: a second one takes its journal."""
    found = map(results.read, folder.glob(f"*/{results.FILE}"))
    return any(result["plan_id"] == plan_id and result["status"] == "finished" for result in found)


def _begin(config: DictConfig) -> None:
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
    plans = _check(list(_jobs(config)), fetch=config.hydra.launcher._target_.endswith(".BasicLauncher"))
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
    failed = any(result["status"] == "failed" for result in found)
    run_id = parent_run(folder)
    if run_id is not None:
        settings = plan.make(_task(config))
        tracker = tracking.make(settings.tracking, settings.output_dir)
        tracker.start("", {}, {}, run_id, None)
        tracker.artifacts(files)
        tracker.finish("FAILED" if failed else "FINISHED")
    if failed:
        sys.exit(SelfspecError.exit_code)


def _jobs(config: DictConfig) -> Iterator[DictConfig]:
    """The config of every job of a sweep, composed as Hydra's own sweeper will compose it."""
    loader = GlobalHydra.instance().config_loader()
    params = config.hydra.sweeper.params or {}
    asked = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(asked)
    for job_overrides in BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]:
        yield loader.load_sweep_config(config, list(job_overrides))


def _task(config: DictConfig) -> DictConfig:
    """The config less Hydra's own part."""
    ours = config.copy()
    with open_dict(ours):
        del ours["hydra"]
    return ours


def _check(configs: list[DictConfig], fetch: bool) -> list[Plan]:
    """The plans of all jobs; those of one identity are checked once."""
    plans = [plan.make(_task(config)) for config in configs]
    for distinct in {p.id: p for p in plans}.values():
        job.check(distinct)
        if fetch:
            job.fetch(distinct)
    asked = {o.split("=", 1)[0] for config in configs for o in config.hydra.overrides.task} & set(HANDLES)
    idle = asked
    for config in configs:
        idle = idle & set(plan.idle_handles(_task(config), idle))
    for handle in sorted(idle):
        print(f"warning: {handle} has no effect in this combination", file=sys.stderr)
    return plans
