"""Thompson sampling of whichever arm earns most per unit of what it costs (tokens a millisecond, here).

A rate is a ratio of means, sum(gained) / sum(spent), by the renewal-reward theorem; a mean of ratios would
favour arms whose cycles are short. Each arm's rate has a Gaussian posterior about that ratio, with the delta
method's variance; what is old is forgotten, so that an arm long unplayed becomes uncertain and is tried again.
"""

import math
import random
from typing import Any

STALL = 3.0
"""What an observation may cost, in means: above that the machine was busy elsewhere, and no arm is to blame."""


class Arms:
    """A bandit over ``count`` arms.

    Attributes:
        memory: for how many observations one counts: sums decay by 1 - 1/memory with each.
    """

    def __init__(self, count: int, memory: int, seed: int) -> None:
        self.memory, self.seed = memory, seed
        self.seen = 0
        self.plays, self.gained, self.spent = [0.0] * count, [0.0] * count, [0.0] * count
        self._moments = [0.0, 0.0, 0.0]  # over all arms: gained squared, gained times spent, spent squared

    def choose(self) -> int:
        """An arm, drawn with the probability that it is the best. The same one until something was observed."""
        chance = random.Random(f"{self.seed}/{self.seen}")
        plays, spent = sum(self.plays), sum(self.spent)
        if spent == 0:
            return chance.randrange(len(self.plays))
        rate, cost = sum(self.gained) / spent, spent / plays
        squares = self._moments[0] - 2 * rate * self._moments[1] + rate * rate * self._moments[2]
        spread = math.sqrt(max(squares, 0.0) / plays) / cost  # of a single observation, in units of the rate

        def draw(arm: int) -> float:
            # One imagined observation at the common rate: an arm never played is as good as the rest, and uncertain.
            mean = (self.gained[arm] + rate * cost) / (self.spent[arm] + cost)
            return chance.gauss(mean, spread / math.sqrt(self.plays[arm] + 1))

        return max(range(len(self.plays)), key=draw)

    def observe(self, arm: int, gained: float, spent: float) -> None:
        """What one play of an arm gained, and what it cost (> 0)."""
        plays = sum(self.plays)
        if self.seen >= len(self.plays):
            spent = min(spent, STALL * sum(self.spent) / plays)
        keep = 1 - 1 / self.memory
        for sums in (self.plays, self.gained, self.spent, self._moments):
            sums[:] = [keep * value for value in sums]
        self.plays[arm] += 1
        self.gained[arm] += gained
        self.spent[arm] += spent
        for i, product in enumerate((gained * gained, gained * spent, spent * spent)):
            self._moments[i] += product
        self.seen += 1

    def state(self) -> dict[str, Any]:
        """All it knows, as JSON values."""
        return {
            "seen": self.seen,
            "plays": [*self.plays],
            "gained": [*self.gained],
            "spent": [*self.spent],
            "moments": [*self._moments],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.seen = state["seen"]
        self.plays, self.gained, self.spent = [*state["plays"]], [*state["gained"]], [*state["spent"]]
        self._moments = [*state["moments"]]
