"""A draft tree while it grows: the likeliest paths go on, the likeliest nodes are proposed (EAGLE-2, 2406.16858).

A cycle that verifies n drafted tokens takes c_0 + n c, and brings one token more than stand of those. So a token pays
that stands with a probability of c times the tokens per second that decoding comes to: its *worth*, which is the same
for all. Probabilities must then be true ones: a readout divides its logits by the temperature that makes them so.
"""

import math
from collections.abc import Sequence

from selfspec.model.tree import Tree

DEEPER = 6.0
"""A further position is looked at where a path is this many times as likely as a token must be to be worth verifying: a
step of SmolLM2-135M's cheapest drafts costs what verifying one token does, and finds one that stands a third of the
time."""


class Beam:
    """One row's pool of candidates, each with the log-probability that the draft gives its path.

    Attributes:
        frontier: the nodes to go on from, at most ``width``, the likeliest first; the root to begin with.
    """

    def __init__(self, root: int, width: int, worth: float = 0.0) -> None:
        """``worth``: the least probability of a node that is proposed."""
        self.width, self.worth, self.frontier = width, worth, [0]
        self._pool, self._scores = Tree.chain([root]), [0.0]

    @property
    def tokens(self) -> list[int]:
        """Of the frontier."""
        return [self._pool.tokens[node] for node in self.frontier]

    def grow(self, tokens: Sequence[Sequence[int]], log_p: Sequence[Sequence[float]]) -> list[int]:
        """One position further.

        Args:
            tokens: for every node of the frontier, those that may follow it, and
            log_p: their log-probabilities after it (at most 0), in the same shape.

        Returns:
            For every node of the new frontier, the place of its parent in the old one.
        """
        born = []
        for place, node in enumerate(self.frontier):
            for token, score in zip(tokens[place], log_p[place], strict=True):
                born.append((self._pool.add(node, token), place))
                self._scores.append(self._scores[node] + min(score, 0.0))
        born.sort(key=lambda child: -self._scores[child[0]])
        self.frontier = [node for node, _ in born[: self.width]]
        return [place for _, place in born[: self.width]]

    @property
    def pays(self) -> bool:
        """Whether to look a position further."""
        return self._scores[self.frontier[0]] >= _log(DEEPER * self.worth)

    def tree(self, budget: int | None) -> Tree:
        """The likeliest ``budget`` nodes below the root: as no child is likelier than its parent, a tree."""
        least = _log(self.worth)
        nodes = [node for node in range(1, len(self._pool)) if self._scores[node] >= least]
        nodes.sort(key=lambda node: -self._scores[node])
        tree, place = Tree.chain(self._pool.tokens[:1]), {0: 0}
        for node in sorted(nodes[:budget]):
            place[node] = tree.add(place[self._pool.parents[node]], self._pool.tokens[node])
        return tree


class Spine:
    """A row's pool where only the likeliest path goes on, and the next likeliest tokens beside it are leaves."""

    def __init__(self, root: int, worth: float = 0.0) -> None:
        """``worth``: the least probability of a node that is proposed."""
        self.worth, self._root, self._score = worth, root, 0.0
        self._pool: list[tuple[float, int, int, bool]] = []  # score, depth of the parent, token, whether a leaf

    def grow(self, depth: int, tokens: Sequence[int], log_p: Sequence[float]) -> None:
        """What may follow the path's token at a depth, the one that it goes on with first."""
        scores = [self._score + min(each, 0.0) for each in log_p]
        self._pool += (
            (score, depth, token, i > 0) for i, (score, token) in enumerate(zip(scores, tokens, strict=True))
        )
        self._score = scores[0]

    @property
    def pays(self) -> bool:
        """Whether to look a position further."""
        return self._score >= _log(DEEPER * self.worth)

    def tree(self, budget: int | None) -> tuple[Tree, int]:
        """The likeliest ``budget`` nodes, those of the path first; and how many are on it, the root included."""
        least = _log(self.worth)
        chosen = sorted((node for node in self._pool if node[0] >= least), key=lambda node: -node[0])[:budget]
        tree = Tree.chain([self._root, *(token for _, _, token, leaf in chosen if not leaf)])
        path = len(tree)
        for _, parent, token, leaf in chosen:
            if leaf:
                tree.add(parent, token)
        return tree, path


def _log(p: float) -> float:
    return math.log(p) if p > 0 else -math.inf


def most(k: int, width: int, budget: int | None) -> int:
    """The most nodes of a tree of depth ``k``, its root included."""
    grown = min(k, 1) * width + max(k - 1, 0) * width**2
    return 1 + (grown if budget is None else min(grown, budget))
