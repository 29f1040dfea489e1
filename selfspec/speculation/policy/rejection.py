"""Lossless sampling: tokens have the target's own distribution at a temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from selfspec.axes import PolicyOptions
from selfspec.errors import ConfigError
from selfspec.options import bounded
from selfspec.speculation.policy.base import Choice, Policy, Verdict, walk
from selfspec.speculation.policy.longest_prefix import longest_prefix
from selfspec.speculation.sampling import Purpose, distribution, draw, likeliest, residual, uniform
from selfspec.types import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from selfspec.model.tree import Tree


@dataclass
class Options(PolicyOptions):
    """How tokens are drawn."""

    name: str = "rejection"
    temperature: float = bounded(0.0, 0, 10)
    """Logits are divided by it; 0 is greedy."""
    top_k: int | None = bounded(None, 1)
    """Only so many of the likeliest tokens may be drawn; ``None``: all."""
    top_p: float | None = bounded(None, 1e-6, 1)
    """Only the fewest likeliest tokens that together have this probability; ``None``: all."""

    @property
    def sampling(self) -> Sampling:
        """As set."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    def check(self) -> None:
        """Refuses a temperature that is neither 0 nor of use."""
        if 0 < self.temperature < 0.01:
            raise ConfigError(f"policy.temperature={self.temperature:g}: must be 0 (greedy) or at least 0.01")

    def make(self) -> Rejection:
        """The policy."""
        return Rejection()


class Rejection:
    """Lossless sampling: tokens have the target's distribution, whatever the draft (:func:`rejection`)."""

    def __call__(self, trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
        """Every row by its own sampling; greedily where its temperature is 0."""
        verdicts = []
        for tree, choice in zip(trees, choices, strict=True):
            own, logits = logits[: len(tree)], logits[len(tree) :]
            greedy = choice.sampling.temperature == 0
            verdicts.append(longest_prefix(tree, likeliest(own)) if greedy else rejection(tree, own, choice))
        return verdicts


def rejection(tree: Tree, logits: Tensor, choice: Choice) -> Verdict:
    """Draws the target's token after each node from its distribution p; :func:`walk` does the rest.

    Where draft tokens were chosen without chance, the draw is p's alone, by a random number that belongs to the
    position. So a node's children are accepted with all the probability that p gives them, which is the most any
    exact policy can do, and the tokens are those of plain sampling with the same seed: neither the draft nor K
    nor the neighbours in a batch show in them.

    Where the next node was drawn from q, the draw is coupled to that: it is the same token with probability
    min(1, p / q), else one from max(0, p - q) normalised. The two together are p again (Leviathan et al.,
    2211.17192; Chen et al., 2302.01318); here it is the distribution alone that is plain sampling's.
    """
    sampling, depths = choice.sampling, tree.depths()

    def wanted(node: int) -> int:
        number = partial(uniform, sampling.seed, choice.position + depths[node])
        # Here, not for all nodes at once: few are reached, and a softmax over the vocabulary is dear (`sampling.py`).
        p = distribution(logits[node], sampling)
        # Only chains are drawn: the child of a node, if it has one, is the next.
        if tree.drawn_from is not None and node + 1 < len(tree):
            q, token = tree.drawn_from[node], tree.tokens[node + 1]
            # u < p / q without dividing; strictly, so that a token with p = 0 never stands, even where u is 0.
            if number(Purpose.accept) * float(q[token]) < float(p[token]):
                return token
            p = residual(p, q)
        return draw(p, number(Purpose.target))

    return walk(tree, wanted)


class Mixed:
    """Requests that sample by :class:`Rejection`, the others by another policy, in one batch."""

    def __init__(self, greedy: Policy) -> None:
        self.greedy, self.sampled = greedy, Rejection()

    def __call__(self, trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
        """A batch that does not sample is judged at once, as without this class."""
        # One argmax over the whole batch in the place of one a row.
        if not any(choice.sampling.temperature for choice in choices):
            return self.greedy(trees, logits, choices)
        verdicts = []
        for tree, choice in zip(trees, choices, strict=True):
            own, logits = logits[: len(tree)], logits[len(tree) :]
            judge = self.sampled if choice.sampling.temperature else self.greedy
            verdicts += judge([tree], own, [choice])
        return verdicts
