"""Passes over a range of layers as CUDA graphs.

Run one by one, a layer's dozen small kernels cost the host more time than a GPU needs for them: below about eight
billion parameters an eager pass waits for its launches. A graph is launched as one. It reads and writes the same
addresses every time, so a graph belongs to one cache, to a number of rows and of new tokens in each (buckets: what is
fewer is padded), and to a range of layers; it is captured when it is first needed.

What differs from pass to pass goes in as one packed copy: every token's position and slot, and which nodes of its tree
it descends from, as bits. The mask and the rotary angles are computed from that within the graph.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from selfspec.model.attention import AttentionMetadata
from selfspec.model.cache import KVCache

NODES = (1, 2, 4, 8, 16, 32)
"""New tokens of a row that there are graphs for; wider passes (prompts) are compute-bound, and run eagerly."""
_DEEPEST = 62
"""Nodes of a tree whose ancestors fit into the bits of an int64, with a bit that is never set to spare."""

Layers = Callable[[Tensor, KVCache, AttentionMetadata, int, int], Tensor]
"""Runs layers ``first`` to ``last - 1``, as :meth:`selfspec.model.base.Model.run`."""


class Graphs:
    """The graphs of one model over one cache, which it does not keep alive."""

    def __init__(self, layers: Layers, hidden: int, dtype: torch.dtype, capture: bool) -> None:
        """``capture``: ``False`` runs the same static passes eagerly, for devices without graphs (tests)."""
        self._layers, self._hidden, self._dtype, self._capture = layers, hidden, dtype, capture
        self._passes: dict[tuple[int, int, int, int], _Pass] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if capture else None

    def take(self, at: AttentionMetadata) -> bool:
        """Whether there is, or will be, a graph for such a pass."""
        deepest = max(map(len, at.trees))
        return at.rows.start == 0 and at.first >= 0 and at.width <= NODES[-1] and deepest <= _DEEPEST and not at.causal

    def run(self, hidden: Tensor, cache: KVCache, at: AttentionMetadata, first: int, last: int) -> Tensor:
        """As :meth:`selfspec.model.base.Model.run`, of a pass that it takes: ``[N, D]`` -> ``[N, D]``."""
        rows = min(1 << (at.count - 1).bit_length(), cache.rows)
        nodes = next(size for size in NODES if size >= at.width)
        key = rows, nodes, first, last
        if key not in self._passes:
            self._passes[key] = _Pass(cache, rows, nodes, self._hidden, self._dtype, self._capture)
        made = self._passes[key]
        made.fill(hidden, at)

        def body() -> Tensor:
            return self._layers(made.hidden, cache, made.metadata(), first, last)

        if not self._capture:
            made.imitate(body)
            return made.own()
        if made.graph is None:
            made.capture(body, self._pool)
        made.replay()
        return made.own()


class _Pass:
    """The static inputs of one graph, and the graph once it is captured.

    Attributes:
        hidden: ``[R * T, D]``, the residual stream; padding holds what was there before, which is finite.
        result: ``[R * T, D]``, what the layers made of it.
    """

    graph: torch.cuda.CUDAGraph | None = None
    result: Tensor | None = None

    def __init__(self, cache: KVCache, rows: int, nodes: int, hidden: int, dtype: torch.dtype, pinned: bool) -> None:
        self._rows, self._nodes = rows, nodes
        device, tokens = cache.device, rows * nodes
        self.hidden = torch.zeros(tokens, hidden, dtype=dtype, device=device)
        self._host = torch.zeros(4 * tokens + rows, dtype=torch.int64, pin_memory=pinned)
        self._numbers = self._host.numpy()
        self._packed = torch.zeros(4 * tokens + rows, dtype=torch.int64, device=device)
        self._owner = torch.arange(rows, device=device).repeat_interleave(nodes)
        self._slots = torch.arange(cache.kv.shape[4], device=device)
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def fill(self, hidden: Tensor, at: AttentionMetadata) -> None:
        """Takes over a pass of up to as many rows and tokens: one copy to the device."""
        rows, nodes = self._rows, self._nodes
        tokens, spare = rows * nodes, len(self._slots) - 1  # padding writes to the last slot, which no row comes to
        positions, slots, seen, places = [0] * tokens, [spare] * tokens, [0] * tokens, list[int]()
        begun = 0
        for r, (tree, count) in enumerate(zip(at.trees, at.counts, strict=True)):
            own = slice(r * nodes, r * nodes + count)
            positions[own], slots[own] = at.position_list[begun : begun + count], at.slot_list[begun : begun + count]
            seen[own] = tree.ancestors()[at.first :]
            places += range(own.start, own.stop)
            begun += count
        self._places = len(places)
        # A row that is none has one verified token, so that what it attends to is finite.
        bases = [*at.bases, *[1] * (rows - at.count)]
        if self._copied is not None:
            self._copied.synchronize()  # the host's buffer may still be on its way
        self._numbers[:] = [*positions, *slots, *seen, *places, *[0] * (tokens - self._places), *bases]
        self._packed.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if self._places == tokens:
            self.hidden.copy_(hidden)
        else:
            self.hidden.index_copy_(0, self._where, hidden)

    @property
    def _where(self) -> Tensor:
        """int64 ``[N]``, where each of the pass's own tokens lies among all."""
        begin = 3 * self._rows * self._nodes
        return self._packed[begin : begin + self._places]

    def metadata(self) -> "Static":
        """What attention is told, from the packed input alone."""
        tokens = self._rows * self._nodes
        positions, slots, seen = self._packed[: 3 * tokens].view(3, self._rows, self._nodes)
        base = self._packed[4 * tokens :]
        return Static(self._rows, self._nodes, self._slots, positions, self._owner, slots, seen, base)

    def capture(self, body: Callable[[], Tensor], pool: Any) -> None:
        """Captures the layers. What was filled in last is run on the way, twice: libraries set themselves up then."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                body()
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.result = body()

    def replay(self) -> None:
        """Runs the captured layers on what was filled in."""
        assert self.graph is not None, "captured"
        self.graph.replay()

    def imitate(self, body: Callable[[], Tensor]) -> None:
        """What a replay does, by running the layers: the result lies where it lay before."""
        found = body()
        self.result = found if self.result is None else self.result.copy_(found)

    def own(self) -> Tensor:
        """Of the result, the pass's own tokens: a copy, as the next replay writes over it."""
        result = self.result
        assert result is not None, "the layers have run"
        return result.clone() if self._places == len(result) else result.index_select(0, self._where)


class Static(AttentionMetadata):
    """Metadata of a fixed shape, all of it on the device.

    Attributes:
        seen: int64 ``[R * T]``, the nodes of its row's tree that a token may look at, as bits.
        base: int64 ``[R]``, verified tokens of every row.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        slots: Tensor,
        positions: Tensor,
        row: Tensor,
        slot: Tensor,
        seen: Tensor,
        base: Tensor,
    ) -> None:
        """``slots``: int64 ``[S]``, all there are. ``positions``, ``slot``, ``seen``: ``[R, T]``."""
        self.rows, self.width, self.start, self.stop, self.causal = slice(0, rows), width, -1, len(slots), False
        self._own = slot.flatten()
        self.positions, self.row, self.slot = positions.flatten(), row, self._own
        self.seen, self.base, self._slots = seen.flatten(), base, slots

    @cached_property
    def mask(self) -> Tensor:
        """Every slot verified, every node it descends from, and itself, which is all that padding sees."""
        offset = self._slots - self.base[:, None, None]
        seen, slot = (each.view(self.count, self.width, 1) for each in (self.seen, self._own))
        related = (seen >> offset.clamp(0, _DEEPEST) & 1).bool()
        mask: Tensor = (related | (offset < 0) | (self._slots == slot))[:, None]
        return mask

    @property
    def count(self) -> int:
        """R, all rows of the bucket."""
        return int(self.rows.stop)

    @property
    def pad(self) -> None:
        """Rows lie side by side."""

    @property
    def unpad(self) -> None:
        """Rows lie side by side."""
