"""Which exit layer, and how many tokens at a time: by what drafts are worth, and what cycles cost on this machine.

    speed-up(E, K) = plain_ms x (1 + accepted(E, K)) / cycle_ms(E, steps(E, K))

What is accepted is foretold by drafts of held-out answers, what a cycle costs is measured. Pure arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Odds:
    """What becomes of a draft, by position, among those whose earlier tokens all stood.

    Attributes:
        passed: how often the gate has a token proposed.
        ranks: of those, how often the model's own token is the draft's likeliest, its second, ...
    """

    passed: tuple[float, ...]
    ranks: tuple[tuple[float, ...], ...]

    def steps(self, k: int) -> float:
        """The tokens that a draft looks at, of at most ``k``: it goes on until the gate stops it, right or wrong."""
        steps, going = 0.0, 1.0
        for passed in self.passed[:k]:
            steps += going
            going *= passed
        return steps

    def accepted(self, k: int, width: int = 1, budget: int | None = None) -> float:
        """The drafted tokens that stand, of a chain of ``k`` with up to ``width - 1`` leaves beside each token."""
        k = k if budget is None else min(k, budget)
        room = k * width if budget is None else budget - k
        stood, reached = 0.0, 1.0
        for passed, ranks in zip(self.passed[:k], self.ranks[:k], strict=True):
            leaves = max(0, min(width - 1, room))  # the first positions get theirs first
            room -= leaves
            reached *= passed
            stood += reached * sum(ranks[: 1 + leaves])
            reached *= ranks[0]
        return stood


@dataclass(frozen=True)
class Exit:
    """A candidate.

    Attributes:
        odds: of its drafts.
        cycle_ms: what a cycle takes in which it looks at so many tokens, of at least one number of them.
    """

    odds: Odds
    cycle_ms: Mapping[int, float]

    def cost(self, steps: float) -> float:
        """Of a cycle of so many steps, in ms: on the line through the fewest and the most that were measured."""
        least, most = min(self.cycle_ms), max(self.cycle_ms)
        slope = (self.cycle_ms[most] - self.cycle_ms[least]) / (most - least or 1)
        return self.cycle_ms[least] + slope * (steps - least)

    def speedup(self, plain_ms: float, k: int, width: int = 1, budget: int | None = None) -> float:
        """Over plain decoding, a token of which takes ``plain_ms``."""
        return plain_ms * (1 + self.odds.accepted(k, width, budget)) / self.cost(self.odds.steps(k))


def choose(
    exits: Mapping[int, Exit], plain_ms: float, ks: Sequence[int], width: int = 1, budget: int | None = None
) -> dict[str, Any]:
    """The exit layer and the K of the highest speed-up; of equals, the earliest and fewest.

    Returns:
        As JSON values: ``exit_layer``, ``K``, the ``speedup`` foretold, ``plain_ms``, and of every exit the K that is
        its best, the speed-up with that, the acceptance of its first token and the cost of a cycle of one token, in ms.
    """
    curve = {}
    for layer, exit in sorted(exits.items()):
        k = max(ks, key=lambda k, exit=exit: (exit.speedup(plain_ms, k, width, budget), -k))  # type: ignore[misc]
        curve[layer] = {
            "K": k,
            "speedup": exit.speedup(plain_ms, k, width, budget),
            "acceptance": exit.odds.ranks[0][0],
            "cycle_ms": exit.cost(1),
        }
    best = max(curve, key=lambda layer: (curve[layer]["speedup"], -layer))
    chosen = {"exit_layer": best, "K": curve[best]["K"], "speedup": curve[best]["speedup"], "plain_ms": plain_ms}
    return {**chosen, "exits": {str(layer): found for layer, found in curve.items()}}
