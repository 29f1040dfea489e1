"""Stops where the entropy of the draft's distribution is large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import MISSING

from selfspec.axes import GateOptions
from selfspec.model.kernels import native
from selfspec.options import bounded
from selfspec.speculation.gate.base import Threshold, surprisals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Options(GateOptions):
    """Of a fixed threshold."""

    name: str = "entropy"
    threshold: float = bounded(MISSING, 0)
    """It stops above this entropy, in nats."""

    def make(self, seed: int = 0) -> Entropy:
        """Such a gate."""
        return Entropy(self.threshold)


class Entropy(Threshold):
    """By the entropy."""

    low_stops = False
    statistic = "entropy"

    def signal(self, logits: Tensor) -> Tensor:
        """In nats."""
        return entropy(logits)

    def signal_at(self, p: float, others: int) -> float:
        """Both kinds of tokens, by their share."""
        best, other = surprisals(p, others)
        return p * best + (1 - p) * other


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy H = -sum p ln p of each row of ``[R, vocab]``, in nats."""
    if native.takes_rows(logits):
        return native.statistics(logits).entropy
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
