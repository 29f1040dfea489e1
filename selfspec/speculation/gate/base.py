"""The contract of a gate: a function of the draft's distribution, chosen once, outside the hot loop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from selfspec.types import Cycle

if TYPE_CHECKING:  # tensors bring their own operations: the fake engine has gates, and does without torch
    from torch import Tensor


class Gate:
    """Never stops a draft, and reads nothing. The base of the others."""

    reads = False
    """Whether it has a signal."""
    statistic: ClassVar[Literal["max_prob", "entropy", "var_entropy"] | None] = None
    """Which of the statistics that our own kernels give of a distribution its signal is, if it is one."""

    def signal(self, logits: Tensor) -> Tensor:
        """The draft's logits ``[R, vocab]`` -> ``[R]``; ``[0]`` of a gate that reads nothing."""
        return logits.new_empty(0)

    def signal_at(self, p: float, others: int) -> float:
        """The signal of a distribution in which one token has probability p, and so many others share the rest."""
        return p

    def stops(self, signal: float) -> bool:
        """Whether a signal says that the token is not to be proposed."""
        return False

    def begin(self) -> None:
        """A cycle begins: a gate that learns chooses its threshold now."""

    def observe(self, cycles: list[Cycle]) -> None:
        """What came of the cycle, one record a row of the batch."""

    def state(self) -> dict[str, Any]:
        """What it has learned, as JSON values; for the checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what an earlier process had learned."""


class Threshold(Gate):
    """Stops where a signal is on the wrong side of a fixed threshold."""

    reads = True
    low_stops: ClassVar[bool]
    """Whether it stops below the threshold, or above it."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def signal(self, logits: Tensor) -> Tensor:
        """The draft's logits ``[R, vocab]`` -> ``[R]``."""
        raise NotImplementedError

    def stops(self, signal: float) -> bool:
        """Below the threshold, or above it."""
        return signal < self.threshold if self.low_stops else signal > self.threshold


def surprisals(p: float, others: int) -> tuple[float, float]:
    """-ln of a token's probability p, and of each of the others' that share the rest."""
    p = min(max(p, 1e-9), 1 - 1e-9)
    return -math.log(p), -math.log((1 - p) / others)
