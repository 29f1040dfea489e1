"""One trained transformer layer that predicts the target's final states: the adapter of Kangaroo (2404.18911),
which reads an early exit; the decoder layer of EAGLE (2401.15077), which reads embedding and previous final state.

Its estimate of the normed final state is a linear map of the features x (see ``head.py``), to which attention
over the features of all positions so far, and a SwiGLU layer, add what they have learned; n is the RMS norm:

    h = W x + b + O attend(Q x, K x, V x),    estimate = h + D (silu(G n(h)) * U n(h))

It has the target's sizes of heads, so that its keys and values can be one more layer of the target's own cache,
where they are moved and dropped together with the target's. When training begins, W and b are the least-squares
solution and O and D are zero: it begins where the linear head ends.

Shapes: N new tokens of all rows (see ``cache.py``), P features, D hidden size, H query heads, G key-value heads,
d head size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from selfspec.lazy import F, torch
from selfspec.model.attention import AttentionMetadata, attend
from selfspec.model.base import Model, Shape
from selfspec.model.cache import KVCache
from selfspec.speculation import fit as fitting
from selfspec.speculation.fit import Trace
from selfspec.speculation.head import Head, features, linear
from selfspec.speculation.readout import Readout

if TYPE_CHECKING:
    from torch import Tensor

_THETA = 10000.0
_EXPANSION = 8 / 3
"""Width of the SwiGLU layer in hidden sizes, as usual in the Llama family."""
_BATCH, _RATE = 8, 1e-3
"""Of training: sequences a step, and the first learning rate."""


class Block:
    """The layer at work, on the cache's layer after the target's last."""

    def __init__(self, tensors: dict[str, Tensor], shape: Shape) -> None:
        self.tensors, self.shape = tensors, shape
        angles = rotation(torch.arange(shape.max_positions), shape.head_dim)
        self._cos, self._sin = (table.to(tensors["qkv"]) for table in angles)

    def __call__(self, x: Tensor, cache: KVCache, at: AttentionMetadata) -> Tensor:
        """Features ``[N, P]`` of new tokens -> the estimates ``[N, D]``; writes their keys and values."""
        s = self.shape
        q, k, v = self._project(x, at)
        keys, values = cache.append(s.layers, k, v, at)
        mask = None if at.mask is None else at.mask.repeat(1, 1, s.heads // s.kv_heads, 1)
        return finish(self.tensors, x, attend(q, keys, values, at, mask))

    def write(self, x: Tensor, cache: KVCache, at: AttentionMetadata) -> None:
        """Writes the keys and values of features ``[N, P]``: all that is needed of tokens that are known."""
        _, k, v = self._project(x, at)
        cache.append(self.shape.layers, k, v, at)

    def _project(self, x: Tensor, at: AttentionMetadata) -> tuple[Tensor, Tensor, Tensor]:
        return project(self.tensors, self.shape, x, self._cos[at.positions], self._sin[at.positions])


def project(t: dict[str, Tensor], s: Shape, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[..., P]`` at angles ``[..., d]`` -> queries ``[..., H, d]``, keys and values ``[..., G, d]``."""
    qkv = F.linear(x, t["qkv"]).view(*x.shape[:-1], -1, s.head_dim)
    qk, v = qkv.tensor_split((s.heads + s.kv_heads,), -2)
    qk = qk * cos[..., None, :] + qk.roll(s.head_dim // 2, -1) * sin[..., None, :]
    q, k = qk.to(v.dtype).tensor_split((s.heads,), -2)
    return q, k, v


def finish(t: dict[str, Tensor], x: Tensor, mixed: Tensor) -> Tensor:
    """Features ``[m, P]`` and what attention made of them, ``[m, H * d]`` -> estimates ``[m, D]``."""
    hidden = linear(t, x) + F.linear(mixed, t["out"])
    gate, up = F.linear(features(hidden), t["gate_up"]).chunk(2, -1)
    return hidden + F.linear(F.silu(gate) * up, t["down"])


def rotation(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine ``[..., d]``, float32, of rotary embedding (2104.09864) in the half-split layout."""
    frequencies = _THETA ** -(torch.arange(0, size, 2, device=positions.device) / size)
    angles = positions[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def inputs(model: Model, trace: Trace, at: Tensor, before: Tensor | None) -> Tensor:
    """Features ``[..., P]`` of the tokens at positions ``at`` ``[...]``, on the model's device.

    Args:
        before: ``[..., D]``, the normed final states of the positions before, true or estimated; ``None``
            where the block does not read them.
    """
    if trace.exit is None:
        hidden = model.embedding[trace.tokens[at].to(model.device)]
    else:
        hidden = trace.exit[at].to(model.device)
    return features(hidden, None if before is None else before.to(model.device))


def whole(model: Model, trace: Trace, previous: bool) -> Tensor:
    """Features ``[n, P]`` of all of a trace; before the first position the state is zero."""
    before = F.pad(trace.final[:-1], (0, 0, 1, 0)) if previous else None
    return inputs(model, trace, torch.arange(len(trace.tokens)), before)


def estimate(t: dict[str, Tensor], s: Shape, sequences: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Whole sequences of features ``[n, P]`` -> estimates ``[m, D]`` at the positions wanted of each."""
    lengths = [len(sequence) for sequence in sequences]
    x = torch.cat(list(sequences))
    cos, sin = rotation(torch.cat([torch.arange(n, device=x.device) for n in lengths]), s.head_dim)
    parts = (torch.split(part, lengths) for part in project(t, s, x, cos, sin))
    mixed = [causal(q, k, v)[at.to(x.device)] for q, k, v, at in zip(*parts, wanted, strict=True)]
    read = [sequence[at.to(x.device)] for sequence, at in zip(sequences, wanted, strict=True)]
    return finish(t, torch.cat(read), torch.cat(mixed))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention within a sequence: ``[n, H, d]`` over ``[n, G, d]`` -> ``[n, H * d]``."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    merged: Tensor = mixed[0].transpose(0, 1).flatten(1)
    return merged


def begin(linear_map: dict[str, Tensor], s: Shape, seed: int) -> dict[str, Tensor]:
    """What training starts from: a linear map of P features, and a layer that adds nothing to it yet."""
    random = torch.Generator().manual_seed(seed)
    reads, width = linear_map["weight"].shape[1], int(_EXPANSION * s.hidden)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=random) / math.sqrt(columns)

    layer = {
        "qkv": normal((s.heads + 2 * s.kv_heads) * s.head_dim, reads),
        "out": torch.zeros(s.hidden, s.heads * s.head_dim),
        "gate_up": normal(2 * width, s.hidden),
        "down": torch.zeros(s.hidden, width),
    }
    return linear_map | layer


def fit(
    model: Model,
    train: list[Trace],
    heldout: list[Trace],
    seed: int,
    *,
    ridge: float,
    sgd_epochs: int,
    vocab: int | None,
) -> Head:
    """Least squares for the linear map, then ``sgd_epochs`` of AdamW on the cross-entropy to the model's tokens.

    Returns:
        The head in float32; its facts hold, on held-out answers, the top-1 agreement with the full model by
        drafted position, and what training added to the first of the linear map alone (``sgd_gain``).
    """
    began = time.perf_counter()
    previous = train[0].exit is None
    pairs = ((whole(model, trace, previous)[trace.at].cpu(), trace.final[trace.at]) for trace in train)
    tensors = begin(fitting.ridge(pairs, ridge), model.shape, seed)
    solved = time.perf_counter() - began
    ids = fitting.vocabulary(model, train, vocab)
    readout = Readout(model, ids["ids"].to(model.device) if ids else None)
    measure = partial(agreement, model, readout, heldout, previous)
    further = partial(_descend, model, readout, train, sgd_epochs, seed, previous)
    tensors, by_position, gain = fitting.refine(tensors, measure, further)
    there = Head(tensors, {}).to(model.dtype, model.device).tensors
    read = ((whole(model, trace, previous), trace.at) for trace in heldout)
    states = (estimate(there, model.shape, [x], [at]) for x, at in read)
    calibration = fitting.temperature(readout, zip(states, [t.tokens[t.at + 1] for t in heldout], strict=True))
    facts = {"form": "block", "solve_s": round(solved, 3)} | gain | calibration
    return Head(tensors | ids, facts | fitting.facts(train, heldout, tensors, by_position))


def _descend(
    model: Model,
    readout: Readout,
    traces: list[Trace],
    epochs: int,
    seed: int,
    previous: bool,
    tensors: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Trains all tensors, in mixed precision where the model is in bf16."""

    def loss(learned: dict[str, Tensor], rows: Tensor, weight: Tensor) -> Tensor:
        chosen = [traces[row] for row in rows.tolist()]
        wanted = torch.cat([trace.tokens[trace.at + 1] for trace in chosen])
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype is torch.bfloat16):
            sequences = [whole(model, trace, previous) for trace in chosen]
            states = estimate(learned, model.shape, sequences, [trace.at for trace in chosen])
            return fitting.cross_entropy(states, weight, readout.indices(wanted).to(model.device))

    there = {name: t.to(model.device) for name, t in tensors.items()}
    learned = fitting.descend(there, [readout.weight], loss, len(traces), epochs, seed, _RATE, _BATCH)
    return {name: t.cpu() for name, t in learned.items()}


def agreement(
    model: Model, readout: Readout, traces: list[Trace], previous: bool, tensors: dict[str, Tensor]
) -> list[float]:
    """Of chains that the block drafts, by position (see :func:`selfspec.speculation.fit.agreement`)."""
    t, s = Head(tensors, {}).to(model.dtype, model.device).tensors, model.shape

    def guess(trace: Trace, at: Tensor, step: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Carries the estimates ``[m, step + 1, D]`` of every start: its attention reads what they were features of."""
        states = states.view(len(at), step + 1, -1).to(model.device)
        drafted = (at - step)[:, None] + torch.arange(step + 1)
        known = torch.arange(len(trace.tokens))
        own = inputs(model, trace, drafted, states if previous else None)
        _, k, v = project(t, s, whole(model, trace, previous), *_angles(model, known))
        q, own_k, own_v = project(t, s, own, *_angles(model, drafted))
        keys, values = (
            torch.cat((one.expand(len(at), -1, -1, -1), two), 1).transpose(1, 2)
            for one, two in ((k, own_k), (v, own_v))
        )
        mask = F.pad(known < drafted[:, :1], (0, step + 1), value=True).to(model.device)[:, None, None]
        mixed = F.scaled_dot_product_attention(q[:, -1:].transpose(1, 2), keys, values, mask, enable_gqa=True)
        found = finish(t, own[:, -1], mixed.flatten(1))
        tokens = readout.tokens(readout(found).max(-1).indices)
        return tokens, torch.cat((states, found[:, None]), 1).cpu()

    return fitting.agreement(traces, guess)


def _angles(model: Model, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rotation(positions.to(model.device), model.shape.head_dim)
    return cos.to(model.dtype), sin.to(model.dtype)
