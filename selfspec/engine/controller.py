"""Controllers: how many tokens to draft next? From what came of earlier cycles."""

import math
from collections.abc import Sequence
from typing import Any

from selfspec.config import Controller as ControllerConfig
from selfspec.config import ControllerName
from selfspec.engine.bandit import Arms
from selfspec.types import Cycle

PATIENCE = 64
"""The longest that ``adaptive`` goes without drafting before it tries again, in windows."""
BUCKET = 2.0
"""``autotune``: prompts within this factor in length are of one kind."""
MEMORY = 200
"""``autotune``: requests for which one is remembered."""


class Controller:
    """The same K every time. The base of the others."""

    def __init__(self, k: int) -> None:
        self.k = k

    def ask(self, history: Sequence[Cycle], batch: int) -> int:
        """Positions ahead the draft is to look (>= 0), given this request's cycles and how many are decoded at once."""
        return self.k

    def exit_layer(self, prompt_tokens: int) -> int | None:
        """The exit layer for a request about to begin; ``None``: the draft's own."""
        return None

    def observe(self, cycles: list[Cycle]) -> None:
        """What came of a step, one record a row of the batch."""

    def state(self) -> dict[str, Any]:
        """What it has learned, as JSON values; for the checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what an earlier process had learned."""


Fixed = Controller


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


def make(controller: ControllerConfig, seed: int = 0) -> Controller:
    """The controller a config asks for."""
    match controller.name:
        case ControllerName.fixed:
            return Fixed(controller.K)
        case ControllerName.adaptive:
            low, high, step, window = controller.low, controller.high, controller.step, controller.window
            assert low is not None and high and step and window and controller.target is not None, "see the plan"
            return Adaptive(controller.K, low, high, step, window, controller.target)
        case ControllerName.cost:
            from selfspec.engine.cost import Cost  # it is a Controller, too

            assert controller.window, "checked by the plan"
            return Cost(controller.K, controller.window)
        case ControllerName.autotune:
            assert controller.exits, "checked by the plan"
            return Autotune(controller.K, controller.exits, seed)
