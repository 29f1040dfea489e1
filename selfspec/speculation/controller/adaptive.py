"""K by the acceptance of a window of cycles."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from selfspec.axes import ControllerOptions
from selfspec.options import bounded, within
from selfspec.speculation.controller.base import Controller
from selfspec.types import Cycle

PATIENCE = 64
"""The longest that it goes without drafting before it tries again, in windows."""


@dataclass
class Options(ControllerOptions):
    """Between which bounds K moves, and by what."""

    name: str = "adaptive"
    low: int = MISSING
    """The least K."""
    high: int = bounded(MISSING, 1, 64)
    """The most."""
    step: int = bounded(MISSING, 1)
    """By how much K changes at a time."""
    window: int = bounded(MISSING, 1)
    """How many cycles are looked back on."""
    target: float = bounded(MISSING, 0, 1)
    """The acceptance above which K grows, and below which it shrinks."""

    @property
    def least_k(self) -> int:
        """Its lower bound."""
        return self.low

    @property
    def max_k(self) -> int:
        """Its upper bound."""
        return self.high

    def check(self) -> None:
        """Refuses bounds that leave nothing between them."""
        within("controller.low", self.low, 0, self.high)

    def make(self, seed: int = 0) -> "Adaptive":
        """A controller that has seen nothing yet."""
        return Adaptive(self.k, self.low, self.high, self.step, self.window, self.target)


class Adaptive(Controller):
    """After every window of cycles, K goes up a step if the acceptance was above the target, down if it was below.

    At K = 0 there is no acceptance to see: it tries a step again after a window, and waits twice as long each
    time that was in vain. It knows nothing of costs: where drafting does not pay at the target acceptance, it
    drafts all the same.
    """

    def __init__(self, k: int, low: int, high: int, step: int, window: int, target: float) -> None:
        super().__init__(min(max(k, low), high))
        self.low, self.high, self.step, self.window, self.target = low, high, step, window, target
        self._drafted = self._accepted = self._cycles = 0
        self._patience = 1

    def observe(self, cycles: list[Cycle]) -> None:
        """Counts; decides when the window is full."""
        self._drafted += sum(cycle.depth for cycle in cycles)
        self._accepted += sum(cycle.accepted for cycle in cycles)
        self._cycles += len(cycles)
        if self._cycles < self.window * (self._patience if self.k == 0 else 1):
            return
        wanted = self.target * self._drafted
        if self.k == 0 or self._accepted > wanted:
            self._patience = 1 if self.k else self._patience
            self.k = min(self.k + self.step, self.high)
        elif self._accepted < wanted:
            self.k = max(self.k - self.step, self.low)
            self._patience = min(2 * self._patience, PATIENCE) if self.k == 0 else self._patience
        self._drafted = self._accepted = self._cycles = 0

    def state(self) -> dict[str, Any]:
        """K and the window so far."""
        return {"k": self.k, "patience": self._patience, "window": [self._cycles, self._drafted, self._accepted]}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.k, self._patience = state["k"], state["patience"]
        self._cycles, self._drafted, self._accepted = state["window"]
