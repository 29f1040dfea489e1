"""What may be set of ``hydra.launcher`` where it is ``skypilot``; the values stand in ``conf/hydra/launcher/``."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf


@dataclass
class SkyPilotConf:
    """One managed job of SkyPilot's for each job of the sweep."""

    _target_: str = "hydra_plugins.skypilot_launcher.launcher.SkyPilotLauncher"
    python: str | None = None
    """The Python of the environment SkyPilot is installed in; ``None``: that of the ``sky`` on ``PATH``."""

    infra: str | None = None
    """Where: ``gcp``, ``gcp/us-central1``, ``slurm/<cluster>/<partition>``, ...; ``None``: wherever it is cheapest."""
    regions: list[str] = field(default_factory=list)
    """Of ``infra``, those that will do; none: all."""
    accelerators: str | None = None
    """Of one job, such as ``H100:1``."""
    use_spot: bool = False
    cpus: str | None = None
    """Such as ``8`` or ``8+``."""
    memory: str | None = None
    """In GB, such as ``32`` or ``32+``."""
    disk_size: int | None = None
    """In GB."""
    image_id: str | None = None
    recovery: str | None = None
    """How a job that lost its machine gets another: ``EAGER_NEXT_REGION``, ``FAILOVER``; ``None``: as SkyPilot does."""
    max_restarts: int = 0
    """How often a job that fails by itself is started again."""
    recover_on: list[int] = field(default_factory=list)
    """Exit codes after which it always is."""

    workdir: str | None = None
    """The folder that jobs get a copy of and start in, less what its ``.gitignore`` names."""
    mounts: dict[str, Any] = field(default_factory=dict)
    """Path there: what SkyPilot's ``file_mounts`` takes, such as ``gs://bucket`` or ``{source: ..., mode: MOUNT}``."""
    setup: str | None = None
    """Shell commands, run once on each machine."""
    command: str = "python -m selfspec.run"
    """What the overrides of a job are given to."""
    envs: dict[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)
    """Names of environment variables: jobs get their values from here, and nothing that is written does."""

    pool: str | None = None
    """A pool of machines (``sky jobs pool apply``) to run in; ``None``: machines of their own."""
    parallelism: int | None = None
    """The most jobs that are under way at once; ``None``: all."""
    wait: bool = True
    """Until all are done; ``False``: only launch them. The same command comes back to them."""
    poll_s: float = 10.0
    """How often SkyPilot is asked, in seconds."""
    log_lines: int = 20
    """The last lines of a failed job's log that are shown."""
    dryrun: bool = False
    """Only show what would be launched, and what it would cost an hour."""


_OPEN = OmegaConf.structured(SkyPilotConf)
for _dictionary in (_OPEN.envs, _OPEN.mounts):
    OmegaConf.set_struct(_dictionary, False)  # Hydra would let nobody add a key: envs={A: b}
ConfigStore.instance().store(group="hydra/launcher", name="skypilot_launcher", node=_OPEN, provider="skypilot_launcher")
