"""What attention is told of a pass: where its tokens go, and what each may look at; and attention itself.

Shapes: R rows, N new tokens of all rows together, T new tokens of the widest row, S slots that attention reads,
H query heads, G key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from selfspec.lazy import F, torch
from selfspec.model.transfer import to_device
from selfspec.model.tree import Tree

if TYPE_CHECKING:
    from torch import Tensor


class AttentionMetadata:
    """Where N new tokens go, and what they may look at; made once and used by a range of layers.

    Tokens of a row stand together, rows after each other. Tensors are made when they are first asked for: a pass
    that is replayed as a graph (``graphs.py``) computes its own from what the host knows.

    Attributes:
        trees: one for each row it covers; of their nodes, those from number ``first`` on are new.
        bases: every row's verified tokens before its tree's root.
        rows: the rows of the cache, a contiguous range.
        width: T, new tokens of the widest row.
        start: the first token's slot where ``rows`` is one row; slots follow each other. -1 of several.
        stop: slots that attention reads, counted from 0.
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        bases: Sequence[int],
        first: int,
        row: int,
        last_position: int,
        device: torch.device,
    ) -> None:
        """``row``: the first of the rows it covers. ``last_position``: the model's."""
        self.trees, self.bases, self.first, self.device = trees, tuple(bases), first, device
        self.rows = slice(row, row + len(trees))
        self._last_position = last_position
        self._stops = [base + len(tree) for base, tree in zip(bases, trees, strict=True)]
        self.counts = [len(tree) - first for tree in trees]
        self.width, self.stop = max(self.counts), max(self._stops)
        self.start = self.bases[0] + first if self._alone else -1

    @property
    def _alone(self) -> bool:
        return len(self.trees) == 1

    @property
    def count(self) -> int:
        """R, the rows it covers."""
        return len(self.trees)

    @cached_property
    def positions(self) -> Tensor | slice:
        """int64 ``[N]``, or a slice where they are contiguous."""
        if self._alone and self.trees[0].is_chain:
            return slice(self.start, self.stop)
        return self._numbers["positions"]

    @cached_property
    def position_list(self) -> list[int]:
        """Every token's position.

        A row that rides along while others draft on may go past the last one; what it says is dropped.
        """
        return [
            min(base + depth, self._last_position)
            for base, tree in zip(self.bases, self.trees, strict=True)
            for depth in tree.depths()[self.first :]
        ]

    @cached_property
    def slot_list(self) -> list[int]:
        """Every token's slot."""
        return [
            slot for base, stop in zip(self.bases, self._stops, strict=True) for slot in range(base + self.first, stop)
        ]

    @cached_property
    def row(self) -> Tensor | None:
        """int64 ``[N]``, every token's row; ``None`` where it covers one."""
        return None if self._alone else self._numbers["row"]

    @cached_property
    def slot(self) -> Tensor | None:
        """int64 ``[N]``, every token's slot; ``None`` where it covers one row."""
        return None if self._alone else self._numbers["slot"]

    @property
    def pad(self) -> Tensor | None:
        """int64 ``[R * T]``, indices into the N tokens that lay them out as ``[R, T]``; ``None``: they lie so."""
        return self._numbers["pad"] if self._uneven else None

    @property
    def unpad(self) -> Tensor | None:
        """int64 ``[N]``, the way back."""
        return self._numbers["unpad"] if self._uneven else None

    @property
    def _uneven(self) -> bool:
        return sum(self.counts) != self.width * len(self.counts)

    @cached_property
    def _numbers(self) -> dict[str, Tensor]:
        """What the device is told of several rows, or of a tree, all in one copy."""
        lists: dict[str, Sequence[int]] = {
            "positions": self.position_list,
            "row": [row for row, count in enumerate(self.counts) for _ in range(count)],
            "slot": self.slot_list,
            "base": self.bases,
            "seen": self._seen(),
            "pad": self._pad_list() if self._uneven else [],
            "unpad": [r * self.width + i for r, count in enumerate(self.counts) for i in range(count)],
        }
        packed = to_device([number for numbers in lists.values() for number in numbers], self.device)
        return dict(zip(lists, torch.split(packed, [len(numbers) for numbers in lists.values()]), strict=True))

    def _pad_list(self) -> list[int]:
        # Padding repeats some token that is there; `unpad` drops what comes of it, so any will do.
        begins = accumulate([0, *self.counts[:-1]])
        within = range(self.width)
        return [begin + min(i, count - 1) for begin, count in zip(begins, self.counts, strict=True) for i in within]

    def _seen(self) -> list[int]:
        """Indices into ``[R, T, S]`` laid flat: the nodes that every token may look at, itself and its ancestors."""
        found: list[int] = []
        for r, (tree, base) in enumerate(zip(self.trees, self.bases, strict=True)):
            ancestors = tree.ancestors()[self.first :]
            for i in range(self.width if ancestors else 0):
                # Padding looks at what its row's last node does: over nothing, its softmax would be NaN.
                bits, begin = ancestors[min(i, len(ancestors) - 1)], (r * self.width + i) * self.stop + base
                found += [begin + node for node in range(bits.bit_length()) if bits >> node & 1]
        return found

    @cached_property
    def causal(self) -> bool:
        """Whether plain causal masking over T = S slots is right (a prefill)."""
        return self._alone and self.start == 0 and self.width > 1 and self.trees[0].is_chain

    @cached_property
    def mask(self) -> Tensor | None:
        """Bool ``[R, 1, T, S]``, true where a token may look.

        ``None`` where it may look at everything, or where :attr:`causal` says it all.
        """
        # With nothing before it, a chain's mask is the plain triangle, for which attention has a kernel of its own.
        if self.causal or (self._alone and self.width == 1 and self.trees[0].is_chain):
            return None
        return self.visible

    @cached_property
    def visible(self) -> Tensor:
        """Bool ``[R, 1, T, S]``, true where a token may look; :attr:`mask`, always there."""
        if self._alone and self.trees[0].is_chain:
            triangle = torch.ones(self.width, self.stop, dtype=torch.bool, device=self.device)
            return triangle.tril(self.start)[None, None]
        verified = torch.arange(self.stop, device=self.device) < self._numbers["base"][:, None]
        mask = verified[:, None, None].repeat(1, 1, self.width, 1)
        mask.view(-1).index_fill_(0, self._numbers["seen"], True)
        return mask

    @cached_property
    def query_positions(self) -> Tensor:
        """int64 ``[R, T]``, every token's position, laid out as attention has them."""
        positions = self._numbers["positions"]
        return (positions if self.pad is None else positions[self.pad]).view(self.count, self.width)

    @cached_property
    def key_positions(self) -> Tensor:
        """int64 ``[R, S]``, the position of what lies in every slot; of slots that no token of the row sees, any."""
        found = torch.arange(self.stop).repeat(self.count, 1)
        for row, (base, tree) in enumerate(zip(self.bases, self.trees, strict=True)):
            if not tree.is_chain:
                found[row, base : base + len(tree)] = base + torch.tensor(tree.depths())
        return found.to(self.device)


def attend(q: Tensor, keys: Tensor, values: Tensor, at: AttentionMetadata, mask: Tensor | None) -> Tensor:
    """Grouped-query attention: ``[N, H, d]`` over ``[R, G, S, d]`` -> ``[N, H * d]``.

    The H / G heads of a group are laid end to end as if they were more tokens, so that each key-value head
    is read once (4x faster on a CPU in bf16); ``mask`` repeats in step. Prefill keeps the causal kernel, unless a
    window gives it a ``mask`` ``[1, 1, T, S]``.
    """
    heads, size = q.shape[1:]
    # Rows are laid out side by side here only; every matrix product runs on packed tokens.
    if at.pad is not None:
        q = q[at.pad]
    q = q.view(at.count, at.width, heads, size).transpose(1, 2)
    if at.causal:
        mixed = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=mask is None, enable_gqa=True)
    else:
        folded = q.reshape(at.count, keys.shape[1], -1, size)
        mixed = F.scaled_dot_product_attention(folded, keys, values, mask).view(q.shape)
    mixed = mixed.transpose(1, 2).reshape(-1, heads * size)
    return mixed if at.unpad is None else mixed[at.unpad]
