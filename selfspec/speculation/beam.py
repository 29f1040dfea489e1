"""A draft tree while it grows: the likeliest paths go on, the likeliest nodes are proposed (EAGLE-2, 2406.16858)."""

from collections.abc import Sequence

from selfspec.model.tree import Tree


class Beam:
    """One row's pool of candidates, each with the log-probability that the draft gives its path.

    Attributes:
        frontier: the nodes to go on from, at most ``width``, the likeliest first; the root to begin with.
    """

    def __init__(self, root: int, width: int) -> None:
        self.width, self.frontier = width, [0]
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

    def tree(self, budget: int | None) -> Tree:
        """The likeliest ``budget`` nodes below the root: as no child is likelier than its parent, a tree."""
        nodes = sorted(range(1, len(self._pool)), key=lambda node: -self._scores[node])
        tree, place = Tree.chain(self._pool.tokens[:1]), {0: 0}
        for node in sorted(nodes[:budget]):
            place[node] = tree.add(place[self._pool.parents[node]], self._pool.tokens[node])
        return tree


def most(k: int, width: int, budget: int | None) -> int:
    """The most nodes of a tree of depth ``k``, its root included."""
    grown = min(k, 1) * width + max(k - 1, 0) * width**2
    return 1 + (grown if budget is None else min(grown, budget))
