"""The key-value cache: append at a position, read back, roll back by forgetting.

Shapes: R rows (sequences), T new tokens a row, S positions so far, G key-value heads, d head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where the T new tokens of every row go, and what they may look at; made once for a range of layers.

    Attributes:
        start: position of every row's first new token where all rows agree; else -1.
        stop: positions that attention reads, counted from 0.
        index: int64 ``[R, T]``, every new token's position, where rows differ; else ``None``.
        mask: bool ``[R or 1, 1, T, stop]``, true where a new token may look; ``None`` where it may look
            at everything, or where ``causal`` says it all.
        causal: whether plain causal masking over T = stop positions is right (a prefill).
    """

    start: int
    stop: int
    index: Tensor | None
    mask: Tensor | None
    causal: bool


class KVCache:
    """Preallocated keys and values of every layer, each ``[R, G, capacity, d]``.

    ``length`` is the number of verified positions (of row 0; rows of a batch keep their own in the
    caller). Drafts write beyond it, layer by layer; what verification rejects is simply overwritten.
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
    ) -> None:
        shape = (rows, kv_heads, capacity, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.written = [0] * layers
        self.rows = rows
        self.capacity = capacity
        self.length = 0

    def place(self, start: int | Tensor, count: int) -> Place:
        """Where ``count`` new tokens of every row go.

        Args:
            start: the position of the first one: one int, or int64 ``[R]`` where rows differ.
        """
        device = self.keys[0].device
        if isinstance(start, int):
            stop = start + count
            self._check_room(stop)
            if count == 1 or start == 0:
                return Place(start, stop, None, None, causal=count > 1)
            mask = torch.ones(count, stop, dtype=torch.bool, device=device).tril(start)
            return Place(start, stop, None, mask[None, None], causal=False)
        index = start[:, None] + torch.arange(count, device=device)
        stop = int(start.max()) + count
        self._check_room(stop)
        mask = torch.arange(stop, device=device) <= index[:, None, :, None]
        return Place(-1, stop, index, mask, causal=False)

    def append(self, layer: int, keys: Tensor, values: Tensor, at: Place) -> tuple[Tensor, Tensor]:
        """Writes a layer's new keys and values ``[R, G, T, d]``; returns all that attention reads."""
        k, v = self.keys[layer], self.values[layer]
        if at.index is None:
            k[:, :, at.start : at.stop] = keys
            v[:, :, at.start : at.stop] = values
        else:
            rows = torch.arange(self.rows, device=k.device)[:, None]
            k[rows, :, at.index] = keys.transpose(1, 2)
            v[rows, :, at.index] = values.transpose(1, 2)
        self.written[layer] = at.stop
        return k[:, :, : at.stop], v[:, :, : at.stop]

    def advance(self, count: int) -> None:
        """Declares the next ``count`` positions verified; what was written beyond them no longer counts."""
        self.length += count

    def keep_rows(self, rows: Tensor) -> None:
        """Keeps only the given rows (int64 ``[R']``), in that order: a batch whose others have finished."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.rows = len(rows)

    def check_integrity(self, layers: int) -> None:
        """Checks that the first ``layers`` layers hold every verified position, and finite values there.

        Raises:
            AssertionError: with the layer that does not.
        """
        assert 0 <= self.length <= self.capacity, f"length {self.length} of {self.capacity}"
        for layer in range(layers):
            assert self.written[layer] >= self.length, f"layer {layer}: {self.written[layer]} of {self.length} written"
            for stored in (self.keys[layer], self.values[layer]):
                assert bool(stored[:, :, : self.length].isfinite().all()), f"layer {layer}: not finite"

    def _check_room(self, stop: int) -> None:
        if stop > self.capacity:
            raise ValueError(f"position {stop} is beyond the cache's capacity of {self.capacity}")
