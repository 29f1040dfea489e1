"""cache: write at a position, forget by overwriting, and notice what is missing."""

import math

import pytest
import torch
from torch import Tensor

from selfspec.engine.cache import KVCache

LAYERS, HEADS, SIZE = 3, 2, 4


def empty(rows: int = 1, capacity: int = 8) -> KVCache:
    return KVCache(LAYERS, rows, HEADS, capacity, SIZE, torch.float32, torch.device("cpu"))


def filled(count: int, value: float, rows: int = 1) -> Tensor:
    return torch.full((rows, HEADS, count, SIZE), value)


def write(cache: KVCache, start: int | Tensor, keys: Tensor, *layers: int) -> list[tuple[Tensor, Tensor]]:
    at = cache.place(start, keys.shape[2])
    return [cache.append(layer, keys, -keys, at) for layer in layers or range(LAYERS)]


def held(keys: Tensor) -> list[list[float]]:
    """Of each row, the value at each position; all heads hold the same."""
    assert torch.equal(keys, keys[:, :1, :, :1].expand_as(keys))
    return keys[:, 0, :, 0].tolist()


def test_what_is_appended_is_read_back() -> None:
    cache = empty()
    for keys, values in write(cache, 0, filled(3, 1.0)):
        assert held(keys) == [[1, 1, 1]] and torch.equal(values, -keys)
    for keys, values in write(cache, 3, filled(2, 2.0)):
        assert held(keys) == [[1, 1, 1, 2, 2]] and torch.equal(values, -keys)


def test_what_is_rejected_is_overwritten() -> None:
    cache = empty()
    write(cache, 0, filled(2, 1.0))
    cache.advance(2)
    write(cache, cache.length, filled(4, 2.0))  # one verified token, three drafted
    cache.advance(2)  # one of them stands
    assert cache.length == 4
    cache.check_integrity(LAYERS)
    for keys, _ in write(cache, cache.length, filled(1, 3.0)):
        assert held(keys) == [[1, 1, 2, 2, 3]]
    cache.advance(1)
    assert cache.written == [5] * LAYERS
    cache.check_integrity(LAYERS)


def test_a_draft_writes_only_its_own_layers() -> None:
    cache = empty()
    write(cache, 0, filled(2, 1.0))
    cache.advance(2)
    write(cache, 2, filled(1, 2.0), 0)
    write(cache, 3, filled(1, 3.0), 0)
    for keys, _ in write(cache, 2, filled(2, 4.0), 1, 2):
        assert held(keys) == [[1, 1, 4, 4]]
    assert held(cache.keys[0][:, :, :4]) == [[1, 1, 2, 3]]
    cache.advance(2)
    cache.check_integrity(LAYERS)


def test_rows_of_their_own_length() -> None:
    cache = empty(rows=3)
    write(cache, 0, filled(4, 1.0, rows=3))
    for keys, values in write(cache, torch.tensor([4, 1, 2]), filled(2, 2.0, rows=3)):
        assert held(keys) == [[1, 1, 1, 1, 2, 2], [1, 2, 2, 1, 0, 0], [1, 1, 2, 2, 0, 0]]
        assert torch.equal(values, -keys)


def test_rows_that_stay() -> None:
    cache = empty(rows=3)
    write(cache, 0, torch.arange(3.0)[:, None, None, None].expand(3, HEADS, 2, SIZE))
    cache.keep_rows(torch.tensor([2, 0]))
    assert cache.rows == 2
    for keys, values in write(cache, torch.tensor([2, 1]), filled(1, 9.0, rows=2)):
        assert held(keys) == [[2, 2, 9], [0, 9, 0]] and torch.equal(values, -keys)


class TestPlace:
    def test_a_prefill_is_causal(self) -> None:
        at = empty().place(0, 4)
        assert at.causal and at.mask is None and at.index is None and at.stop == 4

    def test_one_token_sees_everything(self) -> None:
        for start in (0, 5):
            at = empty().place(start, 1)
            assert not at.causal and at.mask is None and (at.start, at.stop) == (start, start + 1)

    def test_several_tokens_see_what_is_before_them(self) -> None:
        at = empty().place(2, 3)
        assert at.mask is not None and not at.causal
        assert at.mask[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]

    def test_each_row_sees_its_own(self) -> None:
        at = empty(rows=2).place(torch.tensor([0, 2]), 2)
        assert at.mask is not None and at.index is not None and at.stop == 4
        assert at.index.tolist() == [[0, 1], [2, 3]]
        assert at.mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
        assert at.mask[1, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]

    @pytest.mark.parametrize("start", [6, torch.tensor([0, 6])], ids=["one", "ragged"])
    def test_capacity(self, start: int | Tensor) -> None:
        cache = empty(rows=2, capacity=8)
        assert cache.place(start, 2).stop == 8
        with pytest.raises(ValueError, match="position 9 is beyond the cache's capacity of 8"):
            cache.place(start, 3)


class TestIntegrity:
    @pytest.fixture
    def cache(self) -> KVCache:
        cache = empty()
        write(cache, 0, filled(3, 1.0))
        cache.advance(3)
        cache.check_integrity(LAYERS)
        return cache

    def test_a_layer_that_was_not_run(self, cache: KVCache) -> None:
        write(cache, 3, filled(2, 2.0), 0, 2)
        cache.advance(1)
        cache.check_integrity(1)
        with pytest.raises(AssertionError, match="layer 1: 3 of 4 written"):
            cache.check_integrity(LAYERS)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("part", ["keys", "values"])
    def test_a_value_that_is_not_finite(self, cache: KVCache, part: str, bad: float) -> None:
        stored = getattr(cache, part)[2]
        stored[0, 1, 3, 0] = bad  # beyond what is verified: of no account
        cache.check_integrity(LAYERS)
        stored[0, 1, 2, 3] = bad
        with pytest.raises(AssertionError, match="layer 2: not finite"):
            cache.check_integrity(LAYERS)

    def test_more_than_there_is_room_for(self, cache: KVCache) -> None:
        cache.advance(6)
        with pytest.raises(AssertionError, match="length 9 of 8"):
            cache.check_integrity(0)
