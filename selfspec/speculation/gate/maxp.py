"""Stops where the draft's largest probability is small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import MISSING

from selfspec.axes import GateOptions
from selfspec.model.kernels import native
from selfspec.options import bounded
from selfspec.speculation.gate.base import Threshold

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Options(GateOptions):
    """Of a fixed threshold."""

    name: str = "maxp"
    threshold: float = bounded(MISSING, 0, 1)
    """It stops below this probability."""

    def make(self, seed: int = 0) -> MaxProb:
        """Such a gate."""
        return MaxProb(self.threshold)


class MaxProb(Threshold):
    """By the largest probability."""

    low_stops = True
    statistic = "max_prob"

    def signal(self, logits: Tensor) -> Tensor:
        """In [0, 1]."""
        return max_prob(logits)


def max_prob(logits: Tensor) -> Tensor:
    """The largest probability of each row of ``[R, vocab]``, in [0, 1]."""
    if native.takes_rows(logits):
        return native.statistics(logits).max_prob
    # One exp a row: a softmax would write the whole vocabulary to find one number.
    x = logits.float()
    return (x.amax(-1) - x.logsumexp(-1)).exp()
