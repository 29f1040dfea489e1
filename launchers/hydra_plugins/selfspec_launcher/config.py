"""What may be set of ``hydra.launcher``; the values stand in ``conf/hydra/launcher/``."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf


@dataclass
class LocalConf:
    """Processes on this machine."""

    _target_: str = "hydra_plugins.selfspec_launcher.local.LocalLauncher"
    n_jobs: int = 2
    """Jobs at once. Each gets its share of the cores (``OMP_NUM_THREADS``, unless that is set)."""
    gpus: list[int] = field(default_factory=list)
    """Each job sees one of these, in turn (``CUDA_VISIBLE_DEVICES``); none: all see what this process sees."""
    poll_s: float = 0.2
    """How often jobs are looked after, in seconds."""


@dataclass
class SlurmConf:
    """An array of Slurm jobs, by submitit; names and meaning of most are ``sbatch``'s."""

    _target_: str = "hydra_plugins.selfspec_launcher.slurm.SlurmLauncher"
    name: str = "selfspec"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    cpus_per_task: int | None = None
    """Of a job; it computes with as many threads."""
    gpus_per_node: int | None = None
    gres: str | None = None
    """Such as ``gpu:h100:1``."""
    mem_gb: float | None = None
    timeout_min: int = 240
    signal_delay_s: int = 90
    """So many seconds before its time is up, a job keeps what it has and has itself queued again."""
    max_num_timeout: int = 20
    """How often a job may run out of time before it has failed; being preempted does not count."""
    array_parallelism: int = 256
    """The most jobs at once."""
    setup: list[str] = field(default_factory=list)
    """Shell commands before a job, such as ``module load cuda``."""
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    """Any other options of ``sbatch``; ``true`` for one without a value."""
    poll_s: float = 5.0
    """How often Slurm is asked how jobs are, in seconds."""


_OPEN = OmegaConf.structured(SlurmConf)
OmegaConf.set_struct(_OPEN.additional_parameters, False)  # Hydra would let nobody add a key: {mail-type: END}
_STORE = ConfigStore.instance()
_STORE.store(group="hydra/launcher", name="local_launcher", node=LocalConf, provider="selfspec")
_STORE.store(group="hydra/launcher", name="slurm_launcher", node=_OPEN, provider="selfspec")
# By the names that hydra-submitit-launcher has made known; where it is installed, ours take their place.
_STORE.store(group="hydra/launcher", name="submitit_local", node={"defaults": ["local"]}, provider="selfspec")
_STORE.store(group="hydra/launcher", name="submitit_slurm", node={"defaults": ["slurm"]}, provider="selfspec")
