"""cache: rows come, grow by what stands and go, and at every moment a row holds its own tokens and no other's."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import caches
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfspec.model.attention import AttentionMetadata
from selfspec.model.cache import KVCache
from selfspec.model.tree import Tree

LAYERS, HEADS, SIZE = 3, 2, 4
#        0
#      /   \
#     1     2
#    / \    |
#   3   4   5
BUSHY = Tree([9, 7, 8, 7, 8, 7], [-1, 0, 0, 1, 1, 2])


def empty(rows: int = 1, capacity: int = 8, cls: type[KVCache] = KVCache) -> KVCache:
    return cls(LAYERS, rows, HEADS, capacity, SIZE, torch.float32, torch.device("cpu"), max_positions=20)


def chain(count: int) -> Tree:
    return Tree.chain([0] * count)


def write(cache: KVCache, at: AttentionMetadata, marks: Sequence[float], *layers: int) -> list[tuple[Tensor, Tensor]]:
    """Appends tokens whose keys are all one number, and whose values are its negative; layer l adds l / 4."""
    keys = torch.tensor(marks, dtype=torch.float32)[:, None, None].expand(-1, HEADS, SIZE)
    return [cache.append(layer, keys + layer / 4, -keys - layer / 4, at) for layer in layers or range(LAYERS)]


def begun(cache: KVCache, marks: Sequence[float]) -> int:
    """A row that holds these verified tokens."""
    row = cache.admit()
    write(cache, cache.place([chain(len(marks))], row=row), marks)
    cache.commit(row, range(len(marks)))
    return row


def held(keys: Tensor) -> list[list[float]]:
    """Of each row, the mark in each slot; all heads hold the same."""
    assert torch.equal(keys, keys[:, :1, :, :1].expand_as(keys))
    marks: list[list[float]] = keys[:, 0, :, 0].tolist()
    return marks


def looked_at(at: AttentionMetadata, row: int = 0) -> list[list[int]]:
    """For each new token of a row, the slots it may look at."""
    assert at.mask is not None
    return [[slot for slot, may in enumerate(token) if may] for token in at.mask[row, 0].tolist()]


class TestPlace:
    def test_a_prefill_is_causal(self) -> None:
        cache = empty()
        at = cache.place([chain(4)], row=cache.admit())
        assert at.causal and at.mask is None and at.slot is None
        assert (at.start, at.stop, at.width, at.count, at.positions) == (0, 4, 4, 1, slice(0, 4))

    def test_one_token_sees_everything(self) -> None:
        cache = empty()
        row = cache.admit()
        for length in (0, 5):
            cache.lengths[row] = length
            at = cache.place([chain(1)])
            assert not at.causal and at.mask is None and (at.start, at.stop) == (length, length + 1)
            assert at.positions == slice(length, length + 1)

    def test_several_tokens_see_what_is_before_them(self) -> None:
        cache = empty()
        begun(cache, [1, 2])
        at = cache.place([chain(3)])
        assert looked_at(at) == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]] and not at.causal

    @pytest.mark.parametrize("first", [1, 2])
    def test_those_already_run_are_not_placed_again(self, first: int) -> None:
        cache = empty()
        begun(cache, [1, 2])
        at = cache.place([chain(3)], first=first)
        assert (at.start, at.stop, at.width, at.positions) == (2 + first, 5, 3 - first, slice(2 + first, 5))
        assert at.mask is None if first == 2 else looked_at(at) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]

    def test_nodes_of_a_tree_see_their_ancestors_and_share_positions(self) -> None:
        cache = empty(capacity=10)
        begun(cache, [1, 2])
        at = cache.place([BUSHY])
        assert (at.start, at.stop) == (2, 8) and torch.as_tensor(at.positions).tolist() == [2, 3, 3, 4, 4, 4]
        assert looked_at(at) == [[0, 1, 2, *more] for more in ([], [3], [4], [3, 5], [3, 6], [4, 7])]

    def test_a_trees_last_nodes_see_those_that_were_run_before(self) -> None:
        cache = empty(capacity=10)
        begun(cache, [1, 2])
        at = cache.place([BUSHY], first=3)
        assert (at.start, at.stop, at.width) == (5, 8, 3) and torch.as_tensor(at.positions).tolist() == [4, 4, 4]
        assert looked_at(at) == [[0, 1, 2, 3, 5], [0, 1, 2, 3, 6], [0, 1, 2, 4, 7]]

    def test_each_row_sees_its_own(self) -> None:
        cache = empty(rows=3, capacity=12)
        for marks in ([1, 2, 3, 4], [5], [6, 7]):
            begun(cache, marks)
        at = cache.place([chain(1), BUSHY, chain(2)])
        assert (at.width, at.stop, at.count) == (6, 7, 3)
        assert at.row is not None and at.slot is not None
        assert at.row.tolist() == [0, 1, 1, 1, 1, 1, 1, 2, 2]
        assert at.slot.tolist() == [4, 1, 2, 3, 4, 5, 6, 2, 3]
        assert torch.as_tensor(at.positions).tolist() == [4, 1, 2, 2, 3, 3, 3, 2, 3]
        assert looked_at(at, 0) == [[0, 1, 2, 3, 4]] * 6  # one token, and padding that looks where it does
        assert looked_at(at, 1) == [[0, 1, *more] for more in ([], [2], [3], [2, 4], [2, 5], [3, 6])]
        assert looked_at(at, 2) == [[0, 1, 2]] + [[0, 1, 2, 3]] * 5

    def test_beside_others_a_row_may_go_past_the_last_position(self) -> None:
        """It has no place there, but a draft runs it along; a slot of its own it must have."""
        cache = empty(rows=2, capacity=24)
        begun(cache, [1] * 18)
        begun(cache, [1] * 3)
        at = cache.place([chain(4), chain(4)])
        assert torch.as_tensor(at.positions).tolist() == [18, 19, 19, 19, 3, 4, 5, 6]
        assert at.slot is not None and at.slot.tolist() == [18, 19, 20, 21, 3, 4, 5, 6]

    def test_padding_lays_rows_out_side_by_side_and_back(self) -> None:
        cache = empty(rows=3)
        for _ in range(3):
            begun(cache, [1])
        at = cache.place([chain(1), chain(3), chain(2)])
        assert at.pad is not None and at.unpad is not None
        new = torch.arange(6)  # a, b b b, c c
        assert new[at.pad].view(3, 3).tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 5]]
        assert torch.equal(new[at.pad][at.unpad], new)
        even = cache.place([chain(2)] * 3)
        assert even.pad is None and even.unpad is None

    def test_a_row_with_nothing_left_to_run(self) -> None:
        """It is padding only: it looks at what is verified, so that attention has something to look at."""
        cache = empty(rows=3)
        for marks in ([1, 2], [3], [4]):
            begun(cache, marks)
        at = cache.place([chain(1), chain(3), chain(1)], first=1)
        assert at.pad is not None and at.unpad is not None and at.row is not None and at.slot is not None
        assert (at.row.tolist(), at.slot.tolist(), at.width, at.stop) == ([1, 1], [2, 3], 2, 4)
        new = torch.arange(2)
        assert new[at.pad].view(3, 2)[1].tolist() == [0, 1] and torch.equal(new[at.pad][at.unpad], new)
        assert [looked_at(at, row) for row in range(3)] == [[[0, 1]] * 2, [[0, 1, 2], [0, 1, 2, 3]], [[0]] * 2]

    def test_capacity(self) -> None:
        cache = empty(rows=2, capacity=8)
        begun(cache, [1] * 6)
        assert cache.place([chain(2)]).stop == 8
        begun(cache, [1])
        assert cache.place([chain(2), chain(7)]).stop == 8
        for trees, row in (([chain(3)], 0), ([chain(3), chain(1)], None), ([chain(1), chain(8)], None)):
            with pytest.raises(ValueError, match="slot 9 is beyond the cache's capacity of 8"):
                cache.place(trees, row=row)

    def test_a_tree_for_every_row(self) -> None:
        cache = empty(rows=3)
        for _ in range(3):
            begun(cache, [1])
        with pytest.raises(ValueError, match="shorter"):
            cache.place([chain(1), chain(1)])


class TestRows:
    def test_what_is_appended_is_read_back(self) -> None:
        cache = empty()
        row = cache.admit()
        for layer, (keys, values) in enumerate(write(cache, cache.place([chain(3)], row=row), [1, 2, 3])):
            assert held(keys) == [[mark + layer / 4 for mark in (1, 2, 3)]] and torch.equal(values, -keys)
        cache.commit(row, range(3))
        for layer, (keys, values) in enumerate(write(cache, cache.place([chain(2)]), [4, 5])):
            assert held(keys) == [[mark + layer / 4 for mark in (1, 2, 3, 4, 5)]] and torch.equal(values, -keys)

    def test_what_is_rejected_is_overwritten(self) -> None:
        cache = empty()
        begun(cache, [1, 2])
        write(cache, cache.place([chain(4)]), [3, 4, 5, 6])  # the last token, and three drafted
        cache.commit(0, [0, 1])  # one of them stands
        assert cache.lengths == [4]
        caches.check(cache, LAYERS)
        keys, _ = write(cache, cache.place([chain(1)]), [7], 0)[0]
        assert held(keys) == [[1, 2, 3, 4, 7]]

    def test_a_draft_writes_only_its_own_layers(self) -> None:
        cache = empty()
        begun(cache, [1, 2])
        for step, mark in enumerate((3, 4)):
            write(cache, cache.place([chain(step + 1)], first=step), [mark], 0)
        for layer, (keys, _) in enumerate(write(cache, cache.place([chain(2)]), [5, 6], 1, 2), start=1):
            assert held(keys) == [[mark + layer / 4 for mark in (1, 2, 5, 6)]]
        assert held(cache.kv[0, 0, :, :, :4]) == [[1, 2, 3, 4]]
        cache.commit(0, [0, 1])
        caches.check(cache, LAYERS)

    @pytest.mark.parametrize("path", [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5]], ids=str)
    def test_of_a_tree_a_path_is_kept(self, path: list[int]) -> None:
        cache = empty(rows=2, capacity=12)
        begun(cache, [1, 2])
        begun(cache, [3])
        write(cache, cache.place([BUSHY, chain(2)]), [10, 11, 12, 13, 14, 15, 20, 21])
        cache.commit(0, path)
        cache.commit(1, [0, 1])
        assert cache.lengths == [2 + len(path), 3]
        caches.check(cache, LAYERS)
        for layer, (keys, values) in enumerate(write(cache, cache.place([chain(1)] * 2), [30, 40])):
            first, second = held(keys - layer / 4)
            assert first[: cache.lengths[0] + 1] == [1, 2, *(10 + node for node in path), 30]
            assert second[:4] == [3, 20, 21, 40] and torch.equal(values, -keys)

    def test_the_last_row_takes_the_place_of_one_that_leaves(self) -> None:
        cache = empty(rows=3)
        for marks in ([1, 1], [2, 2, 2], [3, 3, 3, 3]):
            begun(cache, marks)
        cache.evict(0)
        assert cache.lengths == [4, 3]
        caches.check(cache, LAYERS)
        (keys, values), *_ = write(cache, cache.place([chain(1)] * 2), [8, 9])
        assert [row[:n] for row, n in zip(held(keys), (5, 4), strict=True)] == [[3, 3, 3, 3, 8], [2, 2, 2, 9]]
        assert torch.equal(values, -keys)
        cache.evict(1)
        assert cache.lengths == [4] and begun(cache, [5]) == 1
        caches.check(cache, LAYERS)

    def test_as_many_as_there_is_room_for(self) -> None:
        cache = empty(rows=2)
        assert [cache.admit(), cache.admit()] == [0, 1]
        with pytest.raises(ValueError, match="all 2 rows are taken"):
            cache.admit()
        cache.evict(0)
        assert cache.admit() == 1


class TestCheck:
    """That ``caches.check``, which other tests rely on, finds what it must."""

    @pytest.fixture
    def cache(self) -> KVCache:
        cache = empty(rows=2)
        begun(cache, [1, 2])
        begun(cache, [3, 4, 5])
        caches.check(cache, LAYERS)
        return cache

    @pytest.mark.parametrize("rejected", [0, 2])
    def test_a_layer_that_was_not_run(self, cache: KVCache, rejected: int) -> None:
        write(cache, cache.place([chain(1 + rejected)], row=1), [6] * (1 + rejected))
        caches.check(cache, LAYERS)  # nothing of it stands
        write(cache, cache.place([chain(2)], row=1), [6, 7], 0, 2)
        cache.commit(1, [0])
        with pytest.raises(AssertionError, match="layer 1, row 1: not written"):
            caches.check(cache, LAYERS)

    def test_a_row_that_left(self, cache: KVCache) -> None:
        cache.evict(0)
        caches.check(cache, LAYERS)
        cache.lengths[cache.admit()] = 1
        with pytest.raises(AssertionError, match="layer 0, row 1: not written"):
            caches.check(cache, 1)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("part", [0, 1], ids=["keys", "values"])
    def test_a_value_that_is_not_finite(self, cache: KVCache, part: int, bad: float) -> None:
        stored = cache.kv[2, part, 1]
        stored[1, 3, 0] = bad  # beyond what is verified: of no account
        caches.check(cache, LAYERS)
        stored[1, 2, 3] = bad
        caches.check(cache, 2)
        with pytest.raises(AssertionError, match="layer 2, row 1: not finite"):
            caches.check(cache, LAYERS)

    def test_more_than_there_is_room_for(self, cache: KVCache) -> None:
        cache.lengths[0] = 9
        with pytest.raises(AssertionError, match="row 0: length 9 of 8"):
            caches.check(cache, 0)


@dataclass
class Reference:
    """What a cache must hold, in plain Python: of every row its tokens, each a number of its own."""

    rows: list[list[float]] = field(default_factory=list)

    def evict(self, row: int) -> None:
        self.rows[row] = self.rows[-1]
        self.rows.pop()


def sprout(rng: random.Random, nodes: int) -> Tree:
    tree = Tree.chain([0])
    straight = rng.random() < 0.3
    while len(tree) < nodes:
        tree.add(len(tree) - 1 if straight else rng.randrange(len(tree)), 0)
    return tree


def path_to(tree: Tree, node: int) -> list[int]:
    """From the root."""
    path = list[int]()
    while node >= 0:
        path.insert(0, node)
        node = tree.parents[node]
    return path


def live(rng: random.Random, steps: int, cls: type[KVCache] = KVCache) -> None:
    """Random admissions, drafts in parts, verifications and evictions; the cache must always read as the reference."""
    cache, model = empty(rows=3, capacity=20, cls=cls), Reference()
    fresh = iter(range(1, 10**6))
    for _ in range(steps):
        full = [r for r, tokens in enumerate(model.rows) if len(tokens) > 12]
        if full or (model.rows and rng.random() < 0.1):
            leaving = rng.choice(full or range(len(model.rows)))
            cache.evict(leaving)
            model.evict(leaving)
        elif len(model.rows) < 3 and (not model.rows or rng.random() < 0.4):
            model.rows.append([next(fresh) for _ in range(rng.randint(1, 5))])
            assert begun(cache, model.rows[-1]) == len(model.rows) - 1
        else:
            trees = [sprout(rng, rng.randint(1, 7)) for _ in model.rows]
            marks = [[next(fresh) for _ in tree.tokens] for tree in trees]
            # The first layer runs some nodes before the others; of some rows, perhaps all.
            drafted = min(rng.randrange(max(map(len, trees))), min(map(len, trees)))
            if drafted:
                parts = [Tree(tree.tokens[:drafted], tree.parents[:drafted]) for tree in trees]
                look(cache, model, parts, marks, 0, 0)
            look(cache, model, trees, marks, drafted, 0)
            look(cache, model, trees, marks, 0, 1, 2)
            for row, tree in enumerate(trees):
                path = path_to(tree, rng.randrange(len(tree)))
                cache.commit(row, path)
                model.rows[row] += [marks[row][node] for node in path]
        assert cache.lengths == [len(tokens) for tokens in model.rows]
        caches.check(cache, LAYERS)
        for layer in range(LAYERS):
            for row, tokens in enumerate(model.rows):
                keys, values = cache.kv[layer, :, row : row + 1, :, : len(tokens)]
                assert held(keys - layer / 4) == [tokens] and torch.equal(values, -keys)


def look(
    cache: KVCache, model: Reference, trees: Sequence[Tree], marks: Sequence[Sequence[float]], first: int, *layers: int
) -> None:
    """Writes nodes from ``first`` on and reads what attention would.

    Every new token must find, in the slots it may look at, its row's verified tokens and its own ancestors,
    in order and nothing else; and its position must be how many came before it.
    """
    at = cache.place(trees, first=first)
    new = [mark for tree, own in zip(trees, marks, strict=True) for mark in own[first : len(tree)]]
    read = [held(keys - layer / 4) for layer, (keys, _) in zip(layers, write(cache, at, new, *layers), strict=True)]
    positions = iter(torch.arange(cache.capacity)[at.positions].tolist())
    for row, tree in enumerate(trees):
        for node in range(first, len(tree)):
            wanted = [*model.rows[row], *(marks[row][above] for above in path_to(tree, node))]
            may = [slot <= at.start + node - first for slot in range(at.stop)]
            if at.mask is not None:
                may = at.mask[row, 0, node - first].tolist()
            assert next(positions) == len(wanted) - 1
            for rows in read:
                assert [mark for mark, seen in zip(rows[row], may, strict=True) if seen] == wanted
    assert next(positions, None) is None


@settings(max_examples=60, derandomize=True, database=None)
@given(rng=st.randoms(use_true_random=False), steps=st.integers(1, 25))
def test_random_lives(rng: random.Random, steps: int) -> None:
    live(rng, steps)


class Forgetful(KVCache):
    """Does not move a path's keys and values up."""

    def commit(self, row: int, path: Sequence[int]) -> None:
        self.lengths[row] += len(path)


class Careless(KVCache):
    """Does not move the last row into the gap."""

    def evict(self, row: int) -> None:
        kept = self.kv.clone()
        super().evict(row)
        self.kv.copy_(kept)


class Flat(KVCache):
    """Takes a slot for a position, and every tree for a chain."""

    def place(self, trees: Sequence[Tree], first: int = 0, row: int | None = None) -> AttentionMetadata:
        return super().place([Tree.chain(tree.tokens) for tree in trees], first, row)


@pytest.mark.parametrize("faulty", [Forgetful, Careless, Flat])
def test_random_lives_find_faults(faulty: type[KVCache]) -> None:
    with pytest.raises(AssertionError):
        for seed in range(20):
            live(random.Random(seed), 25, faulty)
