"""Gates: keep drafting, or stop now? Functions of the draft's distribution.

A gate looks at each token the draft is about to propose; a token it doubts is not proposed, nor any after it.
Chosen once, outside the hot loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from selfspec.config import Gate as GateConfig
from selfspec.config import GateName
from selfspec.speculation.bandit import Arms
from selfspec.types import Cycle

if TYPE_CHECKING:  # tensors bring their own operations: the fake engine has gates, and does without torch
    from torch import Tensor

MEMORY = 2000
"""Cycles for which the bandit remembers one."""


class Gate:
    """Never stops a draft, and reads nothing. The base of the others."""

    reads = False
    """Whether :meth:`signals` is to be called: what need not be computed is not."""

    def signals(self, logits: Tensor) -> list[float]:
        """The draft's logits ``[R, vocab]`` -> R numbers."""
        return []

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

    def __init__(self, signal: Callable[[Tensor], Tensor], threshold: float, low_stops: bool) -> None:
        self.signal, self.threshold, self.low_stops = signal, threshold, low_stops

    def signals(self, logits: Tensor) -> list[float]:
        """One number a row."""
        numbers: list[float] = self.signal(logits).tolist()
        return numbers

    def stops(self, signal: float) -> bool:
        """Below the threshold, or above it."""
        return signal < self.threshold if self.low_stops else signal > self.threshold


class Bandit(Threshold):
    """Learns which max-probability threshold gives the most tokens per second: an arm a cycle, by Thompson sampling.

    TapOut (2511.02017) plays stop rules against each other for the share of drafted tokens accepted; this pays
    out what counts, the new tokens of all rows per millisecond of drafting and verifying.
    """

    def __init__(self, thresholds: Sequence[float], seed: int) -> None:
        super().__init__(max_prob, thresholds[0], low_stops=True)
        self.thresholds = thresholds
        self.arms = Arms(len(thresholds), MEMORY, seed)
        self._arm = 0

    def begin(self) -> None:
        """Draws an arm."""
        self._arm = self.arms.choose()
        self.threshold = self.thresholds[self._arm]

    def observe(self, cycles: list[Cycle]) -> None:
        """Pays the arm, unless no token was looked at: then its threshold had no part in what came of it."""
        if any(cycle.signals for cycle in cycles):
            # Of the first row alone: the rows of a cycle share its times, and each record has all of them.
            spent = cycles[0].draft_ms + cycles[0].verify_ms
            self.arms.observe(self._arm, sum(cycle.new_tokens for cycle in cycles), spent)

    def state(self) -> dict[str, Any]:
        """What each arm has earned."""
        return self.arms.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.arms.restore(state)


def max_prob(logits: Tensor) -> Tensor:
    """The largest probability of each row of ``[R, vocab]``, in [0, 1]."""
    # One exp a row: a softmax would write the whole vocabulary to find one number.
    x = logits.float()
    return (x.amax(-1) - x.logsumexp(-1)).exp()


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy H = -sum p ln p of each row of ``[R, vocab]``, in nats."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def var_entropy(logits: Tensor) -> Tensor:
    """The variance of surprisal, sum p (ln p)^2 - H^2, of each row, in nats squared: 0 if certain and if uniform."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    centred = log_p - (p * log_p).sum(-1, keepdim=True)  # as a mean of squares: two large numbers leave noise
    return (p * centred.square_()).sum(-1)


def make(gate: GateConfig, seed: int = 0) -> Gate:
    """The gate a config asks for."""
    threshold = gate.threshold if gate.threshold is not None else math.nan
    match gate.name:
        case GateName.none:
            return Gate()
        case GateName.maxp:
            return Threshold(max_prob, threshold, low_stops=True)
        case GateName.entropy:
            return Threshold(entropy, threshold, low_stops=False)
        case GateName.varH:
            return Threshold(var_entropy, threshold, low_stops=False)
        case GateName.bandit:
            assert gate.arms, "checked by the plan"
            return Bandit(gate.arms, seed)
