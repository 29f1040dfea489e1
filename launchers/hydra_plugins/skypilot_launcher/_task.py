"""What a job of the sweep is to SkyPilot: a task, as its YAML would say it."""

import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from hydra_plugins.selfspec_launcher._jobs import pins
from hydra_plugins.skypilot_launcher.config import SkyPilotConf
from selfspec import checkpoint
from selfspec.config import Resume, TrackerName
from selfspec.errors import ConfigError
from selfspec.plan import Plan
from selfspec.sweep import compose
from selfspec.sweep_context import ALONE, SweepContext

PREFIX = "selfspec-"
"""Of the names of our managed jobs; the plan's identity follows."""
DRY_S = 20.0
"""How long a dry run waits for SkyPilot, which may want to fetch catalogs, and tries for minutes."""
_MLFLOW = tuple(f"MLFLOW_TRACKING_{key}" for key in ("URI", "USERNAME", "PASSWORD", "TOKEN"))

_MACHINE = ("accelerators", "cpus", "memory", "disk_size", "image_id", "use_spot")
"""Settings that are SkyPilot's own words."""


def check(settings: SkyPilotConf, plan: Plan) -> None:
    """Refuses what cannot work elsewhere.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    place, resume = plan.checkpoint.dir, plan.checkpoint.resume
    if "://" not in place and not PurePosixPath(place).is_absolute():
        raise ConfigError(
            f"checkpoint.dir={place}: jobs elsewhere have no such folder; must be a bucket, gs://BUCKET/PREFIX, "
            "or the absolute path of a folder that they and this machine share"
        )
    for key, source in plan.hub_sources.items():
        if not re.search("@[0-9a-f]{40}$", source):
            raise ConfigError(
                f"{key}={source}: names no commit, and the hub does not say here which; jobs elsewhere would be of "
                "other plans: must be hf:<org>/<name>@<commit>"
            )
    if resume is not Resume.auto:
        raise ConfigError(
            f"checkpoint.resume={resume.name}: must be auto: a job that lost its machine carries on from its journal; "
            "another checkpoint.dir begins anew"
        )
    for key, least in (("max_restarts", 0), ("parallelism", 1), ("log_lines", 0), ("poll_s", 0.0)):
        value = getattr(settings, key)
        if value is not None and not value >= least:
            raise ConfigError(f"hydra.launcher.{key}={value}: must be >= {least}")
    if not settings.wait and settings.parallelism is not None:
        raise ConfigError(
            f"hydra.launcher.parallelism={settings.parallelism}: needs somebody who waits, and launches the next; with "
            "hydra.launcher.wait=false use a pool"
        )
    if settings.regions and (settings.infra is None or "/" in settings.infra):
        raise ConfigError(
            f"hydra.launcher.regions={settings.regions}: are of a cloud; hydra.launcher.infra={settings.infra} must "
            "name one, such as gcp"
        )
    for name in settings.secrets:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # perhaps the secret itself: not to be shown
            raise ConfigError("hydra.launcher.secrets: must be names of environment variables, not their values")
        if name not in os.environ:
            raise ConfigError(f"hydra.launcher.secrets={name}: is not set in the environment")


def check_configs(settings: SkyPilotConf, main: Path, more: Iterable[Path]) -> None:
    """Refuses configs that jobs elsewhere would not find.

    Args:
        main: ``--config-path``.
        more: ``--config-dir``.

    Raises:
        ConfigError: some do not lie in what they get a copy of.
    """
    from selfspec.run import CONF

    if main != CONF.resolve():
        raise ConfigError(f"--config-path={main}: jobs elsewhere have selfspec's own; use --config-dir")
    for folder in more:
        if settings.workdir is None or not folder.is_relative_to(Path(settings.workdir).resolve()):
            raise ConfigError(
                f"--config-dir={folder}: jobs elsewhere have no such folder; must lie in "
                f"hydra.launcher.workdir={settings.workdir}, of which they get a copy"
            )


def name(plan: Plan) -> str:
    """Of the managed job that runs a plan for a checkpoint: the same one wherever and whenever it is asked for."""
    place = hashlib.sha256(checkpoint.trimmed(plan.checkpoint.dir).encode()).hexdigest()
    return f"{PREFIX}{plan.id}-{place[:6]}"


def not_copied(settings: SkyPilotConf, plan: Plan) -> list[str]:
    """Which files of this machine a job elsewhere is told to read and has no copy of, each in a line."""
    head = plan.draft.get("head")
    sources = {
        "model.source": plan.model.source,
        "workload.source": plan.workload.source,
        "draft.source": plan.draft.get("source"),
        "draft.head": head and f"file:{head}",
        **{f"quality.data.{task}.source": data.source for task, data in plan.quality.data.items()},
    }
    return [
        f"{key}={head if key == 'draft.head' else source}: jobs elsewhere have it "
        "only if a mount or a file system that is shared does; what lies in "
        f"hydra.launcher.workdir={settings.workdir} is copied, and named from there"
        for key, source in sources.items()
        if source and source.startswith("file:") and not _is_there(settings, Path(source.removeprefix("file:")))
    ]


def _is_there(settings: SkyPilotConf, path: Path) -> bool:
    """Whether a job that runs in a copy of the work folder finds a path there."""
    if any(path.is_relative_to(mount) for mount in settings.mounts):
        return True
    if path.is_absolute() or settings.workdir is None or path.parts[0].startswith("~"):
        return False
    workdir = Path(settings.workdir).resolve()
    return workdir == Path.cwd() and path.resolve().is_relative_to(workdir)


def secrets(settings: SkyPilotConf, plan: Plan) -> list[str]:
    """The names of environment variables whose values jobs are given, a tracking server's credentials among them."""
    tracker = [key for key in _MLFLOW if key in os.environ] if _tracks(plan) else []
    return [*settings.secrets, *(key for key in tracker if key not in settings.secrets)]


def untracked(plan: Plan) -> str | None:
    """Why a job elsewhere is not tracked, where it was to be."""
    if plan.tracking.name is TrackerName.none or _tracks(plan):
        return None
    uri = plan.tracking.uri or "null, without MLFLOW_TRACKING_URI"
    return (
        f"tracking.uri={uri}: jobs elsewhere cannot write to a file of this machine, so they are not tracked; their "
        "results come back all the same. tracking.uri=http(s)://<server>, or null and MLFLOW_TRACKING_URI, tracks them"
    )


def left_to_the_pool(settings: SkyPilotConf) -> str | None:
    """What a pool's machines do not do for a job of ours, where it was to be done."""
    idle = [key for key in ("setup", "mounts") if settings.pool is not None and getattr(settings, key)]
    said = f"hydra.launcher.pool={settings.pool}: its machines are set up by its own YAML; left out: {', '.join(idle)}"
    return said if idle else None


def make(settings: SkyPilotConf, plan: Plan, arguments: Sequence[str], sweep: SweepContext = ALONE) -> dict[str, Any]:
    """The task of one job.

    Args:
        arguments: of ``python -m selfspec.run``, to run it alone: the job is composed from them again.
        sweep: the one that it is part of.
    """
    there = [f"checkpoint.dir={compose.quoted(plan.checkpoint.dir)}"]  # it may be of the environment, which is another
    there += [] if untracked(plan) is None else ["tracking.name=none"]
    there += pins(plan)
    there += ["output_dir=outputs"]  # no folder of ours: what counts is in the store
    recovery = {
        "strategy": settings.recovery,
        "max_restarts_on_errors": settings.max_restarts or None,
        "recover_on_exit_codes": settings.recover_on or None,
    }
    resources = {
        "infra": None if settings.regions else settings.infra,
        "any_of": [{"infra": f"{settings.infra}/{region}"} for region in settings.regions],
        **{key: getattr(settings, key) for key in _MACHINE},
        "job_recovery": _given(recovery),
    }
    task = {
        "name": name(plan),
        "workdir": settings.workdir,
        "resources": _given(resources),
        "file_mounts": settings.mounts if settings.pool is None else None,
        "envs": {**settings.envs, **(sweep.environment() if _tracks(plan) else {})},
        "setup": settings.setup if settings.pool is None else None,
        "run": f"{settings.command} {shlex.join([*arguments, *there])}",
    }
    return _given(task)


def _tracks(plan: Plan) -> bool:
    """Whether a job elsewhere can log where it is to."""
    if plan.tracking.name is TrackerName.none:
        return False
    uri = plan.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    return uri != "" and not uri.startswith(("sqlite:", "file:"))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, False, [], {}, "")}
