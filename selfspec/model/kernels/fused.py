"""A decode pass on a GPU in nine kernels a layer, in Triton: for a few new tokens, reading the weights is all there is.

Every kernel works on tiles of 16 tokens, whatever their number, and adds up in the same order: what a token comes to
does not depend on its neighbours in the pass, bit by bit. So a draft's tokens are verified by the very numbers that
plain decoding would have seen, and not by numbers that another shape of matrix product has rounded otherwise.

Shapes: N tokens of all rows, padding included; D hidden size, H query heads, G key-value heads, d head size, S slots.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfspec.model.attention import AttentionMetadata
from selfspec.model.cache import KVCache
from selfspec.model.graphs import Layers, Static
from selfspec.model.weights import Layer

TOKENS = 32
"""The most tokens of a pass: with more, tensor cores have something to do, and cuBLAS is better at that."""
_TILE = 16  # tokens: the least that the tensor cores take
_BLOCK = 64  # slots that attention looks at together
_SHARES = 64
"""Of a row of logits, each read by a program of its own."""
_PARTS = 32
"""The most parts that attention over a row's slots is split into, each a program of its own."""


class Fused:
    """A Llama's layers, run in ranges by these kernels."""

    def __init__(
        self, layers: Sequence[Layer], heads: int, norm_eps: float, cos: Tensor, sin: Tensor, otherwise: Layers
    ) -> None:
        """``cos``, ``sin``: ``[positions, d]``, the sine signed. ``otherwise``: what runs passes of more tokens."""
        self._layers, self._heads, self._eps, self._otherwise = layers, heads, norm_eps, otherwise
        self._cos, self._sin = cos, sin

    @staticmethod
    def take(layers: Sequence[Layer], head_dim: int) -> bool:
        """Whether the kernels know layers like these: plain weights, no norms of queries and keys."""
        plain = all(
            isinstance(w, Tensor) for layer in layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down)
        )
        return plain and all(layer.q_norm is None for layer in layers) and head_dim == triton.next_power_of_2(head_dim)

    def run(self, hidden: Tensor, cache: KVCache, at: AttentionMetadata, first: int, last: int) -> Tensor:
        """Layers ``first`` to ``last - 1`` on ``[N, D]``, of a pass of a fixed shape."""
        if len(hidden) > TOKENS:
            return self._otherwise(hidden, cache, at, first, last)
        assert isinstance(at, Static), "made by `Graphs`"
        for index in range(first, last):
            w: Any = self._layers[index]
            qkv = linear(norm(hidden, w.attention_norm, self._eps), w.qkv, w.qkv_bias)
            keys, values = cache.kv[index]
            q = rotate_append(qkv, self._cos, self._sin, at, keys, values, self._heads)
            hidden = linear(attend(q, keys, values, at), w.out, residual=hidden)
            hidden = linear(gated(norm(hidden, w.mlp_norm, self._eps), w.gate_up), w.down, residual=hidden)
        return hidden


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of ``[N, D]``."""
    out = torch.empty_like(x)
    size = x.shape[1]
    warps = 8 if size > 2048 else 4
    _norm[(len(x),)](x, weight, out, eps, size, triton.next_power_of_2(size), num_warps=warps)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W' + b, or r + x W': ``[N, in]`` -> ``[N, out]``, rounded once."""
    return _product(x, weight, len(weight), bias, residual, False)


def gated(x: Tensor, weight: Tensor) -> Tensor:
    """silu(x A') * x B' of a weight ``[A; B]`` ``[2 * out, in]``: ``[N, in]`` -> ``[N, out]``."""
    return _product(x, weight, len(weight) // 2, None, None, True)


def _product(x: Tensor, weight: Tensor, outs: int, bias: Tensor | None, residual: Tensor | None, gate: bool) -> Tensor:
    tokens, size = x.shape
    out = torch.empty(tokens, outs, dtype=x.dtype, device=x.device)
    block, depth, warps, stages = tiling(outs, size, gate)
    depth = max(16, min(depth * 2 // x.element_size(), triton.next_power_of_2(size)))
    grid = triton.cdiv(tokens, _TILE), triton.cdiv(outs, block)
    exact = "ieee" if x.dtype is torch.float32 else "tf32"  # of bf16 it says nothing
    shapes = tokens, outs, size, gate, block, depth, exact
    _linear[grid](x, weight, bias, residual, out, *shapes, num_warps=warps, num_stages=stages)
    return out


def tiling(outs: int, size: int, gate: bool) -> tuple[int, int, int, int]:
    """Outputs and inputs of a program's tile, its warps and its stages, by what was fastest on an H200.

    Many outputs give every processor some with wide tiles; of few, and many inputs, long tiles keep enough bytes on
    their way.
    """
    if outs >= 12288:
        return 64, 128, 4, 3
    if size >= 4096 and outs <= 4096:
        return 32, 512, 4, 3
    return (32 if gate or outs >= 3072 else 16), 128, 4, 5


def rotate_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, at: Static, keys: Tensor, values: Tensor, heads: int
) -> Tensor:
    """Turns queries and keys ``[N, (H + 2 G) * d]`` by their angles, and writes keys and values ``[R, G, S, d]``.

    Returns:
        The queries, ``[N, H, d]``.
    """
    tokens, (_, groups, _, size) = len(qkv), keys.shape
    q = torch.empty(tokens, heads, size, dtype=qkv.dtype, device=qkv.device)
    where: tuple[Any, ...] = at.positions, at.row, at.slot
    _rotate_append[tokens, heads + 2 * groups](
        qkv, cos, sin, *where, q, keys, values, *keys.stride()[:3], heads, groups, size, num_warps=1
    )
    return q


def attend(q: Tensor, keys: Tensor, values: Tensor, at: Static) -> Tensor:
    """Attention of ``[N, H, d]`` over the slots ``[R, G, S, d]`` that each token may look at: ``[N, H * d]``."""
    (tokens, heads, size), (_, groups, slots, _) = q.shape, keys.shape
    parts = min(_PARTS, triton.cdiv(slots, _BLOCK))
    span = triton.cdiv(slots, parts * _BLOCK) * _BLOCK
    mixed = torch.empty(tokens, heads, parts, size, dtype=torch.float32, device=q.device)
    weight = torch.empty(tokens, heads, parts, 2, dtype=torch.float32, device=q.device)
    out = torch.empty(tokens, heads * size, dtype=q.dtype, device=q.device)
    wide = max(16, triton.next_power_of_2(size))
    together = max(_TILE, triton.next_power_of_2(heads // groups))
    exact = "ieee" if q.dtype is torch.float32 else "tf32"
    _attend[tokens, groups, parts](
        q, keys, values, at.row, at.slot, at.seen, at.base, mixed, weight, *keys.stride()[:3],
        heads // groups, groups, slots, size, size**-0.5, span, parts, _BLOCK, together, wide, exact, num_warps=4,
    )  # fmt: skip
    many = triton.next_power_of_2(parts)
    _join[tokens, heads](mixed, weight, out, heads, parts, many, size, wide, num_warps=4)
    return out


def argmax(logits: Tensor) -> Tensor:
    """The largest of every row of ``[N, V]``, the first of equals; -1 where it is not finite, or one is NaN: int64."""
    tokens, size = logits.shape
    best = torch.empty(tokens, _SHARES, dtype=torch.float32, device=logits.device)
    where = torch.empty(tokens, _SHARES, dtype=torch.int32, device=logits.device)
    out = torch.empty(tokens, dtype=torch.int64, device=logits.device)
    span = triton.cdiv(size, _SHARES * 1024) * 1024
    _largest[tokens, _SHARES](logits, best, where, size, span, _SHARES, 1024)
    _largest_of[(tokens,)](best, where, out, _SHARES, num_warps=1)
    return out


@triton.jit
def _norm(x, weight, out, eps, SIZE: tl.constexpr, WIDE: tl.constexpr):
    n, d = tl.program_id(0), tl.arange(0, WIDE)
    inside = d < SIZE
    value = tl.load(x + n * SIZE + d, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
    tl.store(out + n * SIZE + d, (value * scale * tl.load(weight + d, inside, 0.0).to(tl.float32)), inside)


@triton.jit
def _linear(
    x, weight, bias, residual, out, tokens, outs, SIZE: tl.constexpr, GATED: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # Programs that read the same weights stand next to each other, so that all but the first find them in the cache.
    n = tl.program_id(0) * 16 + tl.arange(0, 16)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, DEPTH)
    some, real = n < tokens, o < outs
    inputs = x + n[:, None] * SIZE + k[None, :]
    rows = weight + o.to(tl.int64)[:, None] * SIZE + k[None, :]
    gates = tl.zeros((16, BLOCK), tl.float32)
    ups = tl.zeros((16, BLOCK), tl.float32)
    for start in range(0, SIZE, DEPTH):
        a = tl.load(inputs + start, some[:, None] & (start + k < SIZE)[None, :], 0.0)
        mask = real[:, None] & (start + k < SIZE)[None, :]
        b = tl.load(rows + start, mask, 0.0)
        gates = tl.dot(a, tl.trans(b), gates, input_precision=EXACT)
        if GATED:
            c = tl.load(rows + outs.to(tl.int64) * SIZE + start, mask, 0.0)
            ups = tl.dot(a, tl.trans(c), ups, input_precision=EXACT)
    if GATED:  # both are rounded first, as they are where they are written down
        gate = gates.to(out.dtype.element_ty).to(tl.float32)
        gates = gate / (1 + tl.exp(-gate)) * ups.to(out.dtype.element_ty).to(tl.float32)
    where = n[:, None] * outs + o[None, :]
    both = some[:, None] & real[None, :]
    if bias is not None:
        gates += tl.load(bias + o, real, 0.0).to(tl.float32)[None, :]
    if residual is not None:
        gates += tl.load(residual + where, both, 0.0).to(tl.float32)
    tl.store(out + where, gates, both)


@triton.jit
def _rotate_append(
    qkv, cos, sin, positions, rows, slots, q, keys, values, row_step, group_step, slot_step,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    n, h = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = SIZE // 2
    d = tl.arange(0, half)
    at = qkv + (n * (HEADS + 2 * GROUPS) + h) * SIZE
    low, high = tl.load(at + d).to(tl.float32), tl.load(at + half + d).to(tl.float32)
    if h < HEADS + GROUPS:
        angle = tl.load(positions + n) * SIZE
        c = tl.load(cos + angle + d).to(tl.float32)
        s = tl.load(sin + angle + half + d).to(tl.float32)  # the half whose sign is plus
        low, high = low * c - high * s, high * c + low * s
    if h < HEADS:
        to = q + (n * HEADS + h) * SIZE
    else:
        where = tl.load(rows + n) * row_step + ((h - HEADS) % GROUPS) * group_step + tl.load(slots + n) * slot_step
        to = (keys if h < HEADS + GROUPS else values) + where
    tl.store(to + d, low.to(q.dtype.element_ty))
    tl.store(to + half + d, high.to(q.dtype.element_ty))


@triton.jit
def _attend(
    q, keys, values, rows, slots, seen, base, mixed, weight, row_step, group_step, slot_step,
    TOGETHER: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr, SCALE: tl.constexpr,
    SPAN: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    # One token and the heads of one group: the same tile for one token of a row and for many.
    n, g, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, own, bits = tl.load(rows + n), tl.load(slots + n), tl.load(seen + n)
    verified = tl.load(base + row)
    h, d = tl.arange(0, TILE), tl.arange(0, WIDE)
    head = g * TOGETHER + h
    mine = (h < TOGETHER)[:, None] & (d < SIZE)[None, :]
    query = tl.load(q + (n * GROUPS * TOGETHER + head)[:, None] * SIZE + d[None, :], mine, 0.0)
    most = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    found = tl.zeros((TILE, WIDE), tl.float32)
    for start in range(0, SPAN, BLOCK):
        s = part * SPAN + start + tl.arange(0, BLOCK)
        offset = s - verified
        related = ((bits >> tl.minimum(tl.maximum(offset, 0), 62)) & 1) == 1
        may = ((offset < 0) | related | (s == own)) & (s < SLOTS)
        if tl.max(may.to(tl.int32), 0) > 0:  # most of a long cache is empty
            at = row * row_step + g * group_step + s[:, None] * slot_step + d[None, :]
            inside = may[:, None] & (d < SIZE)[None, :]
            k = tl.load(keys + at, inside, 0.0)
            v = tl.load(values + at, inside, 0.0)
            score = tl.dot(query, tl.trans(k), input_precision=EXACT) * SCALE
            score = tl.where(may[None, :], score, -1e30)
            higher = tl.maximum(most, tl.max(score, 1))
            kept = tl.exp(most - higher)
            p = tl.where(may[None, :], tl.exp(score - higher[:, None]), 0.0)
            total = total * kept + tl.sum(p, 1)
            found = found * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision=EXACT)
            most = higher
    to = (n * GROUPS * TOGETHER + head) * PARTS + part
    tl.store(weight + to * 2, most, h < TOGETHER)
    tl.store(weight + to * 2 + 1, total, h < TOGETHER)
    tl.store(mixed + to[:, None] * SIZE + d[None, :], found, mine)


@triton.jit
def _join(
    mixed, weight, out, HEADS: tl.constexpr, PARTS: tl.constexpr, MANY: tl.constexpr, SIZE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    n, h = tl.program_id(0), tl.program_id(1)
    part, d = tl.arange(0, MANY), tl.arange(0, WIDE)
    at = (n * HEADS + h) * PARTS + part
    most = tl.load(weight + at * 2, part < PARTS, -1e30)
    total = tl.load(weight + at * 2 + 1, part < PARTS, 0.0)
    share = tl.exp(most - tl.max(most, 0))
    inside = ((part < PARTS) & (total > 0))[:, None] & (d < SIZE)[None, :]
    found = tl.load(mixed + at[:, None] * SIZE + d[None, :], inside, 0.0)
    value = tl.sum(found * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + (n * HEADS + h) * SIZE + d, value, d < SIZE)


@triton.jit
def _largest(logits, best, where, size, SPAN: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    n, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    at = tl.full((BLOCK,), 2147483647, tl.int32)
    none = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, SPAN, BLOCK):
        i = share * SPAN + start + tl.arange(0, BLOCK)
        x = tl.load(logits + n * size + i, i < size, -float("inf")).to(tl.float32)
        none = tl.where(x != x, 1, none)  # NaN is larger than nothing, and would be stepped over
        better = x > top
        top, at = tl.where(better, x, top), tl.where(better, i, at)
    most = tl.max(top, 0)
    tl.store(best + n * SHARES + share, tl.where(tl.max(none, 0) == 1, float("inf"), most))
    tl.store(where + n * SHARES + share, tl.min(tl.where(top == most, at, 2147483647), 0))


@triton.jit
def _largest_of(best, where, out, SHARES: tl.constexpr):
    n, i = tl.program_id(0), tl.arange(0, SHARES)
    most, at = tl.load(best + n * SHARES + i), tl.load(where + n * SHARES + i)
    top = tl.max(most, 0)
    first = tl.min(tl.where(most == top, at, 2147483647), 0)
    tl.store(out + n, tl.where(tl.abs(top) < float("inf"), first, -1).to(tl.int64))
