"""The contract of an acceptance policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from selfspec.types import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from selfspec.model.tree import Tree


class Verdict(NamedTuple):
    """What stands of a draft.

    Attributes:
        path: the nodes that stand, in order, the root (0) first: it always does.
        token: the target's own token after the last of them.
    """

    path: list[int]
    token: int


class Choice(NamedTuple):
    """How one row's tokens are chosen, and where: the next token is number ``position`` of its sequence."""

    sampling: Sampling
    position: int


class Policy(Protocol):
    """Judges every row of a batch."""

    def __call__(self, trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
        """Trees of n_1, ..., n_R nodes and the target's logits ``[n_1 + ... + n_R, vocab]`` -> a verdict each."""
        ...


def walk(tree: Tree, wanted: Callable[[int], int]) -> Verdict:
    """From the root on, a child stands where it is the token that the target wants after its parent.

    Args:
        wanted: the target's token after a node; asked once for every node of the path, and for no other.
    """
    path = [0]
    while True:
        token = wanted(path[-1])
        child = tree.child(path[-1], token)
        if child is None:
            return Verdict(path, token)
        path.append(child)
