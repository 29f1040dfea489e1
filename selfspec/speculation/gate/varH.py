"""Stops where the surprisal of the draft's distribution varies much."""

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

    name: str = "varH"
    threshold: float = bounded(MISSING, 0)
    """It stops above this variance of surprisal, in nats squared."""

    def make(self, seed: int = 0) -> VarEntropy:
        """Such a gate."""
        return VarEntropy(self.threshold)


class VarEntropy(Threshold):
    """By the variance of surprisal."""

    low_stops = False
    statistic = "var_entropy"

    def signal(self, logits: Tensor) -> Tensor:
        """In nats squared."""
        return var_entropy(logits)

    def signal_at(self, p: float, others: int) -> float:
        """Small where p is, too, as then nearly all tokens are alike."""
        best, other = surprisals(p, others)
        return p * (1 - p) * (best - other) ** 2


def var_entropy(logits: Tensor) -> Tensor:
    """The variance of surprisal, sum p (ln p)^2 - H^2, of each row, in nats squared: 0 if certain and if uniform."""
    if native.takes_rows(logits):
        return native.statistics(logits).var_entropy
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    centred = log_p - (p * log_p).sum(-1, keepdim=True)  # as a mean of squares: two large numbers leave noise
    return (p * centred.square_()).sum(-1)
