"""K by how many requests are decoded at once: what a bench recommends, as ``speculation_profile.json`` has it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from selfspec.axes import ControllerOptions
from selfspec.errors import ConfigError
from selfspec.options import within
from selfspec.speculation.controller.base import Controller
from selfspec.types import Cycle


@dataclass
class Options(ControllerOptions):
    """From how many requests on which K is asked for."""

    name: str = "schedule"
    by_batch: list[list[int]] = field(default_factory=list)
    """Pairs of a number of requests, and the K from there on; of fewer than the first, K itself."""

    adapts: ClassVar[bool] = False

    @property
    def constant(self) -> bool:
        """It changes with the batch."""
        return False

    @property
    def label(self) -> str:
        """Such as ``K=4/4:2/8:0``."""
        return "/".join([f"K={self.K}", *(f"{batch}:{k}" for batch, k in self.by_batch)])

    def check(self) -> None:
        """Refuses what is no schedule."""
        before = 0
        for pair in self.by_batch:
            if len(pair) != 2 or pair[0] <= before:
                raise ConfigError(f"controller.by_batch={self.by_batch}: must be [[requests, K], ...], requests rising")
            within(f"controller.by_batch, K of {pair[0]}", pair[1], 0, self.k)
            before = pair[0]

    def make(self, seed: int = 0) -> "Schedule":
        """A controller that learns nothing."""
        return Schedule(self.k, self.by_batch)


class Schedule(Controller):
    """Asks for the K of the last entry that is not for a larger batch."""

    def __init__(self, k: int, by_batch: Sequence[Sequence[int]]) -> None:
        super().__init__(k)
        self._by_batch = [(0, k), *((batch, own) for batch, own in by_batch)]

    def num_draft_tokens(self, history: Sequence[Cycle], batch: int) -> int:
        """By the batch alone."""
        return next(k for least, k in reversed(self._by_batch) if least <= batch)
