"""What the soak stage is told."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from selfspec.options import bounded

SoakServer = Enum("SoakServer", "selfspec vllm")


@dataclass
class Soak:
    """How a server is put under load, for how long, and what it must keep to."""

    name: str = MISSING
    server: SoakServer = SoakServer.selfspec
    """The gateway, as the job configures it, or ``vllm serve``."""
    arguments: list[str] = field(default_factory=list)
    """``vllm``: further arguments of ``vllm serve``."""
    users: int = bounded(MISSING, 1, 10_000)
    """Callers, each of which asks for one answer after the other."""
    seconds: float = bounded(MISSING, 0, 31_536_000)
    interval: float = bounded(MISSING, 0.1)
    """Seconds of a unit of work: what a soak that is interrupted loses at most."""
    warmup: float = bounded(MISSING, 0)
    """Seconds of load that count for nothing, whenever the server has been started."""
    prompts: int = bounded(MISSING, 1)
    """How many there are to ask with; callers take them in turn."""
    new_tokens: int = bounded(MISSING, 2)
    """The longest answer."""
    sentinels: int = MISSING
    """Prompts that are answered alone before the load and after it, and must be answered alike."""
    max_error_rate: float = bounded(0.0, 0, 1)
    max_memory_slope: float = bounded(MISSING, 0)
    """Of the server's memory, in MiB a minute."""
    max_drift: float = bounded(MISSING, 0, 1)
    """Of the acceptance rate, from the first third to the last."""
    max_ttft_p99_ms: float | None = bounded(None, 0)
    max_inter_token_p99_ms: float | None = bounded(None, 0)
    max_total_p99_ms: float | None = bounded(None, 0)
    start_s: float = bounded(300.0, 0)
    """How long the server may take until it is ready."""
    timeout_s: float = bounded(120.0, 0.1)
    """How long a caller waits for the next piece of an answer before it counts as an error."""

    @property
    def intervals(self) -> int:
        """Units of work."""
        return int(self.seconds / self.interval + 1e-9)
