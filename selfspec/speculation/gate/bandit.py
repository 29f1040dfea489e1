"""Learns as it decodes which max-probability threshold gives the most tokens per second."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import MISSING

from selfspec.axes import GateOptions
from selfspec.errors import ConfigError
from selfspec.speculation.bandit import Arms
from selfspec.speculation.gate.maxp import MaxProb
from selfspec.types import Cycle

MEMORY = 2000
"""Cycles for which it remembers one."""


@dataclass
class Options(GateOptions):
    """What it chooses from."""

    name: str = "bandit"
    arms: list[float] = MISSING
    """Thresholds, probabilities."""

    learns: ClassVar[bool] = True

    def check(self) -> None:
        """Refuses none at all, and what is no probability."""
        if not self.arms:
            raise ConfigError(f"gate.arms={self.arms}: gate=bandit needs one threshold or more")
        if not all(0 <= arm <= 1 for arm in self.arms):
            raise ConfigError(f"gate.arms={self.arms}: must each be from 0 to 1")

    def make(self, seed: int = 0) -> "Bandit":
        """Such a gate, that has learned nothing yet."""
        return Bandit(self.arms, seed)


class Bandit(MaxProb):
    """An arm a cycle, by Thompson sampling.

    TapOut (2511.02017) plays stop rules against each other for the share of drafted tokens accepted; this pays
    out what counts, the new tokens of all rows per millisecond of drafting and verifying.
    """

    def __init__(self, thresholds: Sequence[float], seed: int) -> None:
        super().__init__(thresholds[0])
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
