"""A draft as a tree: the verified token at its root, and below every node the tokens that may follow it.

A chain is a tree whose nodes have one child each. Nodes are in an order in which parents come before
children; node i is run at cache slot ``length + i`` and at position ``length + depth(i)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Tree:
    """What a draft proposes for one row.

    Attributes:
        tokens: of every node; the first is the root, the last emitted token.
        parents: the index of every node's parent; -1 for the root.
        drawn_from: float32 ``[nodes - 1, vocab]``, the distribution that each node but the root was *sampled*
            from (chains only); ``None`` where tokens were chosen without chance, as the likeliest, or looked up.
        signals: the gate's signal for each token looked at, the doubted one included.
    """

    tokens: list[int]
    parents: list[int]
    drawn_from: Tensor | None = None
    signals: list[float] = field(default_factory=list)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Tree:
        """The root, then tokens that follow each other."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)))

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int) -> int:
        """A new node's index."""
        self.tokens.append(token)
        self.parents.append(parent)
        return len(self.tokens) - 1

    @property
    def is_chain(self) -> bool:
        """Whether every node has at most one child, and follows it directly."""
        return all(parent == i - 1 for i, parent in enumerate(self.parents))

    def depths(self) -> list[int]:
        """Every node's distance from the root."""
        found: list[int] = []
        for parent in self.parents:
            found.append(found[parent] + 1 if parent >= 0 else 0)
        return found

    def child(self, node: int, token: int) -> int | None:
        """The child of ``node`` that holds ``token``."""
        for i in range(node + 1, len(self.tokens)):
            if self.parents[i] == node and self.tokens[i] == token:
                return i
        return None

    def ancestors(self) -> list[int]:
        """Of every node, itself and the nodes it descends from, which it may look at, as bits: bit i is node i."""
        found: list[int] = []
        for node, parent in enumerate(self.parents):
            found.append((found[parent] if parent >= 0 else 0) | 1 << node)
        return found
