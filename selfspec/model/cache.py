"""The key-value cache of a batch: rows are admitted, grow by what is verified, and are evicted.

Shapes: R rows, A active ones, N new tokens of all rows together, T new tokens of the widest row, S slots,
G key-value heads, d head size. Active rows are always the first A, so that attention reads them as a view.

A slot is where a token's keys and values lie; its position is what the model is told. They differ only
among the nodes of a draft tree, where siblings share a position, and only until the tree is verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from selfspec.lazy import torch
from selfspec.model.attention import AttentionMetadata
from selfspec.model.transfer import to_device
from selfspec.model.tree import Tree

if TYPE_CHECKING:
    from torch import Tensor


class KVCache:
    """Preallocated keys and values.

    Attributes:
        kv: ``[layers, 2, R, G, S, d]``, also for a kernel that writes at a place by itself.
        lengths: the number of verified tokens of every active row. Drafts write beyond it, layer by layer; what
            verification rejects is overwritten.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int,
        spare: int = 0,
    ) -> None:
        """``spare``: slots beyond the capacity, which no row comes to."""
        slots = capacity + spare
        self.kv = torch.zeros((layers, 2, rows, kv_heads, slots, head_dim), dtype=dtype, device=device)
        self._read = [(layer[0], layer[1]) for layer in self.kv]
        self._write = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in self._read]  # as tokens come: [R, S, G, d]
        self.rows, self.capacity, self.device = rows, capacity, device
        self._last_position = max_positions - 1
        self.lengths: list[int] = []

    def clear(self) -> None:
        """Evicts all rows."""
        self.lengths.clear()

    def admit(self) -> int:
        """A new, empty row: its index.

        Raises:
            ValueError: every row is taken.
        """
        if len(self.lengths) == self.rows:
            raise ValueError(f"all {self.rows} rows are taken")
        self.lengths.append(0)
        return len(self.lengths) - 1

    def copy_from(self, other: KVCache) -> int:
        """A new row that holds what row 0 of another cache, of as many layers, holds: its index.

        Raises:
            ValueError: every row is taken.
        """
        row, length = self.admit(), other.lengths[0]
        self.kv[:, :, row, :, :length] = other.kv[:, :, 0, :, :length]
        self.lengths[row] = length
        return row

    def evict(self, row: int) -> None:
        """Frees a row; the last one takes its place, so that active rows stay together."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            # All layers, a draft's own included; `Batching._retire` moves the member in the same way.
            self.kv[:, :, row, :, :length] = self.kv[:, :, last, :, :length]
            self.lengths[row] = length
        self.lengths.pop()

    def place(self, trees: Sequence[Tree], first: int = 0, row: int | None = None) -> AttentionMetadata:
        """Where the nodes of every row's tree go, from node ``first`` on; those before have been run already.

        Args:
            trees: one for each active row; or one, for ``row`` alone. A row may have no nodes from ``first`` on
                where another has some.
        """
        bases = self.lengths if row is None else [self.lengths[row]]
        at = AttentionMetadata(trees, bases, first, row or 0, self._last_position, self.device)
        self._check_room(at.stop)
        return at

    def append(self, layer: int, keys: Tensor, values: Tensor, at: AttentionMetadata) -> tuple[Tensor, Tensor]:
        """Writes a layer's new keys and values ``[N, G, d]``; returns all that attention reads, ``[R, G, stop, d]``."""
        k, v = self._write[layer]
        # What a rejected draft left in these slots is overwritten here, before attention reads as far as `stop`.
        if at.slot is None:
            row = at.rows.start
            k[row, at.start : at.stop] = keys
            v[row, at.start : at.stop] = values
        else:
            k[at.row, at.slot] = keys
            v[at.row, at.slot] = values
        k, v = self._read[layer]
        return k[at.rows, :, : at.stop], v[at.rows, :, : at.stop]

    def commit(self, row: int, path: Sequence[int]) -> None:
        """Declares a path through the row's tree verified: its nodes, root first, move up to follow each other."""
        base, count = self.lengths[row], len(path)
        # Nodes increase along a path. `source` is an index, so the right side is a copy and may overlap the left.
        if path[-1] != count - 1:  # else the path is the tree's first nodes: they lie in place
            source = to_device([base + node for node in path], self.device)
            self.kv[:, :, row, :, base : base + count] = self.kv[:, :, row, :, source]
        self.lengths[row] = base + count

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's verified tokens from ``length`` on."""
        assert length <= self.lengths[row], f"row {row} holds {self.lengths[row]} tokens, not {length}"
        self.lengths[row] = length

    def _check_room(self, stop: int) -> None:
        if stop > self.capacity:
            raise ValueError(f"slot {stop} is beyond the cache's capacity of {self.capacity}")
