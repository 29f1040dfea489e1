"""The key-value cache of a batch: rows are admitted, grow by what is verified, and are evicted.

Shapes: R rows, A active ones, N new tokens of all rows together, T new tokens of the widest row, S slots,
G key-value heads, d head size. Active rows are always the first A, so that attention reads them as a view.

A slot is where a token's keys and values lie; its position is what the model is told. They differ only
among the nodes of a draft tree, where siblings share a position, and only until the tree is verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfspec.lazy import torch
from selfspec.model.tree import Tree

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where N new tokens go, and what they may look at; made once and used by a range of layers.

    Tokens of a row stand together, rows after each other.

    Attributes:
        rows: the rows of the cache, a contiguous range.
        width: T, new tokens of the widest row.
        start: the first token's slot where ``rows`` is one row; slots follow each other.
        stop: slots that attention reads, counted from 0.
        positions: int64 ``[N]``, or a slice where they are contiguous.
        row: int64 ``[N]``, every token's row, and
        slot: int64 ``[N]``, its slot; ``None`` where ``rows`` is one row.
        pad: int64 ``[R * T]``, indices into the N tokens that lay them out as ``[R, T]``, and
        unpad: int64 ``[N]``, the way back; ``None`` where every row has T tokens.
        mask: bool ``[R, 1, T, stop]``, true where a token may look; ``None`` where it may look at everything,
            or where ``causal`` says it all.
        causal: whether plain causal masking over T = stop slots is right (a prefill).
    """

    rows: slice
    width: int
    start: int
    stop: int
    positions: Tensor | slice
    row: Tensor | None
    slot: Tensor | None
    pad: Tensor | None
    unpad: Tensor | None
    mask: Tensor | None
    causal: bool

    @property
    def count(self) -> int:
        """R, the rows it covers."""
        return self.rows.stop - self.rows.start  # type: ignore[no-any-return]

    def each(self) -> tuple[Tensor, Tensor]:
        """Every token's row and slot, int64 ``[N]`` each, also where ``rows`` is one row."""
        if self.row is not None and self.slot is not None:
            return self.row, self.slot
        return torch.full((self.width,), self.rows.start), torch.arange(self.start, self.stop)


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
    ) -> None:
        self.kv = torch.zeros((layers, 2, rows, kv_heads, capacity, head_dim), dtype=dtype, device=device)
        self._read = [(layer[0], layer[1]) for layer in self.kv]
        self._write = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in self._read]  # as tokens come: [R, S, G, d]
        self.rows, self.capacity, self.device = rows, capacity, device
        self._last_position = max_positions - 1
        self.lengths: list[int] = []

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
        start = 0 if row is None else row
        # One row's slots follow each other: slices, which cost less than gathering by index.
        if len(trees) == 1:
            return self._place_one(trees[0], first, start)
        bases, counts = self.lengths, [len(tree) - first for tree in trees]
        width = max(counts)
        stops = [base + len(tree) for base, tree in zip(bases, trees, strict=True)]
        stop = max(stops)
        self._check_room(stop)
        slots, positions, owners = list[int](), list[int](), list[int]()
        for r, (base, tree) in enumerate(zip(bases, trees, strict=True)):
            slots += range(base + first, stops[r])
            # A row that rides along while others draft on may go past the last position; what it says is dropped.
            positions += [min(base + depth, self._last_position) for depth in tree.depths()[first:]]
            owners += [r] * counts[r]
        pad = unpad = None
        if len(slots) < width * len(trees):
            begins = torch.tensor([0, *counts[:-1]]).cumsum(0)
            within = torch.arange(width).expand(len(trees), -1)
            limit = torch.tensor(counts)[:, None]
            # Padding repeats some token that is there; `unpad` drops what comes of it, so any will do.
            pad = (begins[:, None] + torch.minimum(within, limit - 1)).flatten().to(self.device)
            unpad = (within < limit).flatten().nonzero()[:, 0].to(self.device)
        return AttentionMetadata(
            rows=slice(0, len(trees)),
            width=width,
            start=-1,
            stop=stop,
            positions=self._index(positions),
            row=self._index(owners),
            slot=self._index(slots),
            pad=pad,
            unpad=unpad,
            mask=self._mask(trees, bases, first, width, stop),
            causal=False,
        )

    def _place_one(self, tree: Tree, first: int, row: int) -> AttentionMetadata:
        base = self.lengths[row]
        start, stop = base + first, base + len(tree)
        self._check_room(stop)
        count = stop - start
        positions: Tensor | slice = slice(start, stop)
        mask, causal = None, False
        if not tree.is_chain:
            positions = self._index([base + depth for depth in tree.depths()[first:]])
            mask = self._mask([tree], [base], first, count, stop)
        # With nothing before it, a chain's mask is the plain triangle, for which attention has a kernel of its own.
        elif start == 0:
            causal = count > 1
        elif count > 1:
            mask = torch.ones(count, stop, dtype=torch.bool, device=self.device).tril(start)[None, None]
        rows = slice(row, row + 1)
        return AttentionMetadata(rows, count, start, stop, positions, None, None, None, None, mask, causal)

    def _mask(self, trees: Sequence[Tree], bases: Sequence[int], first: int, width: int, stop: int) -> Tensor:
        """Every slot verified, then the node's ancestors; padding looks at what its row's last node does."""
        base = torch.tensor(bases)[:, None, None]
        mask = (torch.arange(stop) < base).repeat(1, width, 1)
        for r, tree in enumerate(trees):
            seen = tree.visible()[first:]
            mask[r, : len(seen), bases[r] : bases[r] + len(tree)] = seen
            # Were padding to look at nothing, its softmax would be over nothing, and NaN.
            mask[r, len(seen) :] = mask[r, len(seen) - 1]
        return mask[:, None].to(self.device)

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
            source = self._index([base + node for node in path])
            self.kv[:, :, row, :, base : base + count] = self.kv[:, :, row, :, source]
        self.lengths[row] = base + count

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's verified tokens from ``length`` on."""
        assert length <= self.lengths[row], f"row {row} holds {self.lengths[row]} tokens, not {length}"
        self.lengths[row] = length

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _check_room(self, stop: int) -> None:
        if stop > self.capacity:
            raise ValueError(f"slot {stop} is beyond the cache's capacity of {self.capacity}")
