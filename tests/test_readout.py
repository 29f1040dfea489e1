"""readout and beam: a smaller vocabulary is rows of the head, and a tree holds the likeliest paths; by brute force."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from selfspec.model.llama import Llama
from selfspec.speculation import beam, sampling
from selfspec.speculation.beam import Beam, Spine
from selfspec.speculation.readout import Readout
from selfspec.types import Sampling

pytestmark = pytest.mark.usefixtures("inference")

IDS = torch.tensor([7, 70, 3, 12, 0])


@pytest.fixture
def model(tiny_folder: Path) -> Llama:
    return Llama.load(tiny_folder, torch.device("cpu"), torch.float32)


@pytest.fixture
def state() -> torch.Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


class TestReadout:
    def test_of_the_whole_head(self, model: Llama, state: torch.Tensor) -> None:
        readout, wanted = Readout(model), model.logits(state)
        assert torch.equal(readout(state), wanted)
        assert readout.likeliest(wanted)[:, 0].tolist() == wanted.argmax(-1).tolist()
        tokens = torch.tensor([5, 79])
        assert torch.equal(readout.tokens(tokens), tokens) and torch.equal(readout.indices(tokens), tokens)

    def test_of_some_rows(self, model: Llama, state: torch.Tensor) -> None:
        readout, wanted = Readout(model, IDS), model.logits(state)[:, IDS]
        assert_close(readout(state), wanted)
        for width, kept in ((1, 1), (3, 3), (9, 5)):
            best = wanted.sort(descending=True).indices[:, :kept]
            assert readout.likeliest(wanted, width).tolist() == IDS[best].tolist()
            tokens, log_p, signals = readout.candidates(wanted, width, state[:, 0])
            assert tokens == IDS[best].tolist() and signals == state[:, 0].tolist()
            if width > 1:
                assert_close(torch.tensor(log_p), wanted.log_softmax(-1).gather(1, best))
        assert readout.candidates(wanted, 1, state[:0])[1] == [[0.0]] * 6
        assert readout.tokens(torch.tensor([[2], [0]])).tolist() == [[3], [7]]
        assert readout.indices(torch.tensor([[12, 1], [7, 79]])).tolist() == [[3, -1], [0, -1]]

    @pytest.mark.parametrize("ids", [None, IDS])
    def test_a_draw_is_from_the_drafts_own_distribution(
        self, model: Llama, state: torch.Tensor, ids: torch.Tensor | None
    ) -> None:
        readout, how = Readout(model, ids), Sampling(9.0, seed=3)
        logits = readout(state)[0]
        wanted = torch.zeros(80)
        wanted[torch.arange(80) if ids is None else ids] = (logits / 9).softmax(-1)
        tokens = set()
        for position, ahead in itertools.product(range(20), range(2)):
            token, q = readout.draw(logits, how, position, ahead)
            assert_close(q, wanted)
            u = sampling.uniform(3, position, sampling.Purpose.draft, ahead)
            assert token == int((wanted.double().cumsum(0) <= u * wanted.double().sum()).sum())
            tokens.add(token)
        assert len(tokens) > 2


class TestBeam:
    @staticmethod
    def likely(path: tuple[int, ...]) -> tuple[list[int], list[float]]:
        """A made-up model of five tokens: their log-probabilities after a path, the likeliest first."""
        random = torch.Generator().manual_seed(hash(path) % 2**31)
        log_p = torch.randn(5, generator=random).mul(2).log_softmax(-1).sort(descending=True)
        return (log_p.indices + 10 * len(path)).tolist(), log_p.values.tolist()

    def grown(self, width: int, depth: int) -> Beam:
        made, paths = Beam(99, width), [(99,)]
        for _ in range(depth):
            nexts = [self.likely(path) for path in paths]
            parents = made.grow([t[:width] for t, _ in nexts], [p[:width] for _, p in nexts])
            paths = [(*paths[parent], token) for parent, token in zip(parents, made.tokens, strict=True)]
        return made

    @pytest.mark.parametrize("budget", [1, 4, 9, 30])
    def test_the_likeliest_nodes_of_all(self, budget: int) -> None:
        """As wide as the vocabulary to the power of the depth, nothing is left out: brute force over every path."""
        made, paths = Beam(99, 10**6), [(99,)]
        scores = {(99,): 0.0}
        for _ in range(3):
            nexts = [self.likely(path) for path in paths]
            parents = made.grow(*(list(part) for part in zip(*nexts, strict=True)))
            for path, (tokens, log_p) in zip(paths, nexts, strict=True):
                scores |= {(*path, t): scores[path] + p for t, p in zip(tokens, log_p, strict=True)}
            paths = [(*paths[parent], token) for parent, token in zip(parents, made.tokens, strict=True)]
            assert scores[paths[0]] == max(scores[p] for p in paths), "the likeliest first"
        tree = made.tree(budget)
        best = sorted((p for p in scores if len(p) > 1), key=lambda p: -scores[p])[:budget]
        assert {path_of(tree, node) for node in range(1, len(tree))} == set(best) and len(tree) == budget + 1

    @pytest.mark.parametrize("width, depth", [(1, 4), (2, 3), (4, 2), (3, 0)])
    def test_only_the_likeliest_paths_are_gone_on_with(self, width: int, depth: int) -> None:
        paths, pool = {(99,): 0.0}, {}
        for _ in range(depth):
            born = {
                (*path, t): score + p
                for path, score in paths.items()
                for t, p in list(zip(*self.likely(path), strict=True))[:width]
            }
            pool |= born
            paths = dict(sorted(born.items(), key=lambda item: -item[1])[:width])
        tree = self.grown(width, depth).tree(None)
        assert {path_of(tree, node) for node in range(1, len(tree))} == set(pool)
        assert len(tree) == beam.most(depth, width, None)
        assert all(parent < node for node, parent in enumerate(tree.parents))
        for budget in (1, 3, 60):
            assert len(self.grown(width, depth).tree(budget)) == beam.most(depth, width, budget)

    def test_what_is_not_worth_it_is_left_out(self) -> None:
        made = Beam(1, 2, worth=0.1)
        made.grow([[2, 3, 4]], [[math.log(p) for p in (0.7, 0.2, 0.05)]])
        assert made.pays and made.tree(None).tokens == [1, 2, 3] and made.tree(1).tokens == [1, 2]
        made.grow([[5, 6], [7, 8]], [[math.log(p) for p in (0.8, 0.1)]] * 2)
        assert not made.pays, "0.56 is less than six times as likely as 0.1"
        assert made.tree(None).tokens == [1, 2, 3, 5, 7]

    def test_a_spine(self) -> None:
        made = Spine(1, worth=0.1)
        assert made.pays and made.tree(None)[0].tokens == [1]
        made.grow(0, [2, 3, 4], [math.log(p) for p in (0.7, 0.2, 0.05)])
        assert made.pays
        made.grow(1, [5, 6], [math.log(p) for p in (0.6, 0.3)])
        assert not made.pays
        tree, path = made.tree(None)
        assert (tree.tokens, tree.parents, path) == ([1, 2, 5, 6, 3], [-1, 0, 1, 1, 0], 3)
        tree, path = made.tree(1)
        assert (tree.tokens, path) == ([1, 2], 2)
        assert len(Spine(1, worth=0.1).tree(None)[0]) == 1

    def test_certain_tokens_and_rounding(self) -> None:
        """A parent comes first among equals, and no rounding makes a child likelier than it."""
        made = Beam(1, 2)
        made.grow([[2, 3]], [[0.0, -50.0]])
        made.grow([[4, 5], [6, 7]], [[1e-6, -30.0], [1e-6, -30.0]])
        for budget in range(7):
            assert len(made.tree(budget)) == budget + 1
        assert made.tree(2).tokens == [1, 2, 4]


def path_of(tree: beam.Tree, node: int) -> tuple[int, ...]:
    """Its tokens from the root on."""
    own = (tree.tokens[node],)
    return own if node == 0 else path_of(tree, tree.parents[node]) + own
