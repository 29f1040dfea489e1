"""How long the parts of a cycle take, on a CPU and on a GPU, which runs behind the host that drives it."""

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments of a cycle."""

    def mark(self) -> Any:
        """Now: when all that was asked for so far is done."""
        ...

    def ms(self, begin: Any, end: Any) -> float:
        """Between two marks, in milliseconds."""
        ...


class HostClock:
    """For devices that are done when a call returns."""

    def mark(self) -> float:
        """See :meth:`Clock.mark`."""
        return time.perf_counter()

    def ms(self, begin: float, end: float) -> float:
        """See :meth:`Clock.ms`."""
        return 1e3 * (end - begin)


class CudaClock:
    """Events in the stream: what a draft has only launched counts as the draft's, and nobody waits for it."""

    def mark(self) -> torch.cuda.Event:
        """See :meth:`Clock.mark`."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def ms(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See :meth:`Clock.ms`; waits for ``end``, which a cycle that has read its verdict has passed."""
        end.synchronize()
        passed: float = begin.elapsed_time(end)
        return passed


def of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()
