"""Greedy and exact: drafted tokens stand as long as each is the target's argmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfspec.axes import PolicyOptions
from selfspec.speculation.policy.base import Choice, Verdict, walk
from selfspec.speculation.sampling import likeliest

if TYPE_CHECKING:
    from torch import Tensor

    from selfspec.model.tree import Tree


@dataclass
class Options(PolicyOptions):
    """Nothing of its own."""

    name: str = "longest_prefix"

    @property
    def label(self) -> str:
        """Nothing: it is what is expected."""
        return ""

    def make(self) -> LongestPrefix:
        """The policy."""
        return LongestPrefix()


def longest_prefix(tree: Tree, wanted: Sequence[int]) -> Verdict:
    """Exact: :func:`walk` where the target's token after every node is known."""
    return walk(tree, wanted.__getitem__)


class LongestPrefix:
    """Greedy and exact: :func:`longest_prefix` under the target's argmax."""

    def __call__(self, trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
        """``choices`` are not looked at."""
        wanted = likeliest(logits)
        verdicts = []
        for tree in trees:
            verdicts.append(longest_prefix(tree, wanted[: len(tree)]))
            wanted = wanted[len(tree) :]
        return verdicts
