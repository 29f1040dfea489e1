"""The exit layer by prompt length, by Thompson sampling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import MISSING

from selfspec.axes import ControllerOptions
from selfspec.errors import ConfigError
from selfspec.speculation.bandit import Arms
from selfspec.speculation.controller.base import Controller
from selfspec.types import Cycle

BUCKET = 2.0
"""Prompts within this factor in length are of one kind."""
MEMORY = 200
"""Requests for which one is remembered."""


@dataclass
class Options(ControllerOptions):
    """K, and what it chooses from."""

    name: str = "autotune"
    exits: list[int] = MISSING
    """Exit layers."""

    adapts: ClassVar[bool] = False

    @property
    def chosen_exits(self) -> Sequence[int]:
        """All of them."""
        return self.exits

    def check(self) -> None:
        """Refuses none at all."""
        if not self.exits:
            raise ConfigError(f"controller.exits={self.exits}: controller=autotune needs one layer or more")

    def make(self, seed: int = 0) -> "Autotune":
        """A controller that has learned nothing yet."""
        return Autotune(self.k, self.exits, seed)


class Autotune(Controller):
    """A fixed K, and the exit layer that has been fastest for prompts of about this length, by Thompson sampling.

    A request is one play of its layer: its cycles say much the same. One request at a time.
    """

    def __init__(self, k: int, exits: Sequence[int], seed: int) -> None:
        super().__init__(k)
        self.exits, self.seed = exits, seed
        self._kinds: dict[int, Arms] = {}
        self._playing: tuple[int, int] | None = None
        self._gained, self._spent = 0, 0.0

    def exit_layer(self, prompt_tokens: int) -> int | None:
        """Pays the request before for what it did, and draws a layer for the next."""
        if self._playing is not None and self._spent > 0:
            kind, arm = self._playing
            self._kinds[kind].observe(arm, self._gained, self._spent)
        kind = int(math.log(prompt_tokens, BUCKET))
        arm = self._arms(kind).choose()
        self._playing, self._gained, self._spent = (kind, arm), 0, 0.0
        return self.exits[arm]

    def observe(self, cycles: list[Cycle]) -> None:
        """Counts towards the request's play."""
        self._gained += sum(cycle.new_tokens for cycle in cycles)
        self._spent += cycles[0].draft_ms + cycles[0].verify_ms

    def _arms(self, kind: int) -> Arms:
        return self._kinds.setdefault(kind, Arms(len(self.exits), MEMORY, self.seed + kind))

    def state(self) -> dict[str, Any]:
        """What each layer has earned on each kind of prompt, and the play that is on."""
        return {
            "kinds": {str(kind): arms.state() for kind, arms in self._kinds.items()},
            "playing": self._playing and [*self._playing, self._gained, self._spent],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._kinds.clear()
        for kind, earned in state["kinds"].items():
            self._arms(int(kind)).restore(earned)
        if state["playing"] is not None:
            kind, arm, self._gained, self._spent = state["playing"]
            self._playing = (kind, arm)
