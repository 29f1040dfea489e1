"""Heads that predict several positions at once from the last final state (Medusa, 2401.10774).

With f the normed final state that gave the verified token, head j estimates the final state j positions later
as f + M_j(x), which the frozen language-model head reads: the token j positions after the verified one. x is f
and, as that token is known (Hydra, 2402.05109), its embedding, each scaled to unit root-mean-square. What M_j is:

- ``tie``: zero, so that every head reads f itself.
- ``lsq``: the affine map that ridge regression gives.
- ``copy``: Medusa's own residual block, SiLU(W x + b), W and b zero to begin with.
- ``random``: the same block begun at random, W uniform in +-1/sqrt(P).

``draft.sgd_epochs`` trains on from there, on the cross-entropy to the model's own tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from selfspec.lazy import F, torch
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.transfer import to_device
from selfspec.model.tree import Tree
from selfspec.options import bounded, setting
from selfspec.speculation import beam
from selfspec.speculation import fit as fitting
from selfspec.speculation.beam import Beam
from selfspec.speculation.draft.base import Draft, FittedOptions, Proposal, stack
from selfspec.speculation.fit import Trace
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head, features
from selfspec.speculation.readout import Readout
from selfspec.speculation.sequence import Seq

if TYPE_CHECKING:
    from torch import Tensor


HeadInit = Enum("HeadInit", "tie copy random lsq")


@dataclass
class Options(FittedOptions):
    """How many heads, and what they start from."""

    name: str = "medusa"
    heads: int = bounded(MISSING, 1, 16, fact=True)
    """How many positions ahead there is a head for."""
    init: HeadInit = setting(MISSING, fact=True)
    """What its heads start from."""

    def make(self, model: Model, head: Head | None) -> Medusa:
        """The heads that the fit stage made."""
        assert head is not None, "fitted by the fit stage"
        return Medusa(model, head, self)

    def fit(self, model: Model, train: list[Trace], heldout: list[Trace], seed: int) -> Head:
        """The heads from where ``init`` says, trained on where asked; facts as of every fitted head."""
        begin = time.perf_counter()
        facts: dict[str, Any] = {"heads": self.heads, "block": self.init in (HeadInit.copy, HeadInit.random)}
        tensors = _start(model, train, self, seed)
        facts["solve_s"] = round(time.perf_counter() - begin, 3)
        ids = fitting.vocabulary(model, train, self.vocab)
        readout = Readout(model, ids.get("ids"))

        def measured(tensors: dict[str, Tensor]) -> list[float]:
            return _agreement(model, readout, Head(tensors, facts), heldout)

        def trained(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return _descend(model, readout, Head(tensors, facts), train, self.sgd_epochs, seed)

        tensors, by_position, gain = fitting.refine(tensors, measured, trained if self.sgd_epochs else None)
        facts |= gain | fitting.facts(train, heldout, tensors, by_position)
        return Head(tensors | ids, facts | _temperature(model, readout, Head(tensors, facts), heldout))


class Medusa(Draft):
    """One product for all heads, one readout of all their estimates."""

    def __init__(self, model: Model, head: Head, draft: Options) -> None:
        super().__init__(model)
        self.heads, self.block = int(head.facts["heads"]), bool(head.facts["block"])
        self.weight, self.bias = head.tensors["weight"], head.tensors["bias"]
        self.readout = Readout.of(model, head)
        self.width, self.budget, self.sample, self.worth = draft.width, draft.budget, draft.sample, draft.worth

    def nodes(self, k: int) -> int:
        """The root, and what a beam over k positions, or as many as there are heads, may hold."""
        return beam.most(min(k, self.heads), self.width, self.budget)

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        """All positions at once; those from the first that the gate doubts on are not proposed."""
        ks = [min(k, self.heads) for k in ks]
        most = max(ks)
        if most == 0:
            return super().propose(rows, ks, gate, cache)
        verified = self.model.embedding[to_device([row.tokens[-1] for row in rows], self.model.device)]
        states = estimate(self.weight, self.bias, self.block, stack(rows), verified, most)
        logits = self.readout(states.view(len(rows) * most, -1))
        tokens, log_p, signals = self.readout.candidates(logits, self.width, gate.signal(logits))
        trees = []
        for r, (row, k) in enumerate(zip(rows, ks, strict=True)):
            first, seen = r * most, signals[r * most : r * most + k]
            sure = next((i for i, signal in enumerate(seen) if gate.stops(signal)), k)
            grown = Beam(row.tokens[-1], self.width, self.worth)
            for i in range(first, first + sure):
                grown.grow([tokens[i]] * len(grown.frontier), [log_p[i]] * len(grown.frontier))
            tree = grown.tree(self.budget)
            if self.sample and row.request.sampling.temperature > 0:
                tree = self._drawn(row, logits[first : first + sure])
            tree.signals = seen[: sure + 1]
            trees.append(tree)
        return Proposal(trees)

    def _drawn(self, row: Seq, logits: Tensor) -> Tree:
        """A chain of tokens each drawn from its row of ``[k, V]``."""
        tree, drawn_from = Tree.chain(row.tokens[-1:]), []
        for ahead, own in enumerate(logits[: self.budget]):
            token, q = self.readout.draw(own, row.request.sampling, len(row.tokens) + ahead, ahead)
            tree.add(ahead, token)
            drawn_from.append(q)
        tree.drawn_from = torch.stack(drawn_from) if drawn_from else None
        return tree


def estimate(weight: Tensor, bias: Tensor, block: bool, state: Tensor, verified: Tensor, heads: int) -> Tensor:
    """The first heads' estimates ``[R, heads, D]`` from final states and the verified tokens' embeddings ``[R, D]``."""
    size = state.shape[-1]
    change = F.linear(features(state, verified), weight[: heads * size], bias[: heads * size])
    if block:
        change = F.silu(change)
    return state[:, None] + change.view(-1, heads, size)


def _start(model: Model, traces: Sequence[Trace], draft: Options, seed: int) -> dict[str, Tensor]:
    """``weight`` ``[heads * D, P]`` and ``bias`` ``[heads * D]``, those of a head together."""
    heads, size = draft.heads, model.shape.hidden
    if draft.init is HeadInit.lsq:
        parts = (_example(model, trace, heads) for trace in traces)
        changes = ((features(state, verified), (later - state[:, None]).flatten(1)) for state, verified, later in parts)
        return fitting.ridge(changes, draft.ridge)
    weight, bias = torch.zeros(heads * size, 2 * size), torch.zeros(heads * size)
    if draft.init is HeadInit.random:
        weight.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed)).mul_((2 * size) ** -0.5)
    return {"weight": weight, "bias": bias}


def _example(model: Model, trace: Trace, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """States, embeddings ``[m, D]`` and later states ``[m, heads, D]``, wherever an answer has so many; float32."""
    at = trace.at[: max(len(trace.at) - heads + 1, 0)]
    later = trace.final[at[:, None] + torch.arange(heads)]
    return trace.final[at - 1].float(), model.embedding[trace.tokens[at]].float().cpu(), later.float()


def _agreement(model: Model, readout: Readout, head: Head, traces: Sequence[Trace]) -> list[float]:
    there = head.to(model.dtype, model.device)
    weight, bias, block, heads = *there.tensors.values(), head.facts["block"], head.facts["heads"]

    def guess(trace: Trace, at: Tensor, step: int, states: Tensor) -> tuple[Tensor, Tensor]:
        verified = model.embedding[trace.tokens[at - step]]
        later = estimate(weight, bias, block, states.to(model.device), verified, step + 1)[:, step]
        return readout.likeliest(readout(later))[:, 0], states

    return fitting.agreement(traces, guess, heads)


def _temperature(model: Model, readout: Readout, head: Head, traces: Sequence[Trace]) -> dict[str, float]:
    """Of the first head."""
    there = head.to(model.dtype, model.device)
    weight, bias, block = *there.tensors.values(), head.facts["block"]

    def first(trace: Trace) -> Tensor:
        verified, state = model.embedding[trace.tokens[trace.at]], trace.final[trace.at - 1].to(model.device)
        return estimate(weight, bias, block, state, verified, 1)[:, 0]

    return fitting.temperature(readout, ((first(trace), trace.tokens[trace.at + 1]) for trace in traces))


def _descend(
    model: Model, readout: Readout, head: Head, traces: Sequence[Trace], epochs: int, seed: int
) -> dict[str, Tensor]:
    """Minimises the heads' mean cross-entropy to the model's own tokens."""
    heads, block, device = head.facts["heads"], head.facts["block"], model.device
    parts = [_example(model, trace, heads) for trace in traces]
    state, verified = (torch.cat([part[i] for part in parts]) for i in range(2))
    said = [trace.tokens[trace.first + 1 :] for trace in traces]
    wanted = readout.indices(torch.cat([t.unfold(0, heads, 1) for t in said if len(t) >= heads])).to(device)

    def loss(learned: dict[str, Tensor], rows: Tensor, readout: Tensor, *examples: Tensor) -> Tensor:
        state, verified, wanted = (t[rows] for t in examples)
        later = estimate(learned["weight"], learned["bias"], block, state, verified, heads).flatten(0, 1)
        return fitting.cross_entropy(later.to(device), readout, wanted.flatten())

    return fitting.descend(head.tensors, (readout.weight, state, verified, wanted), loss, len(state), epochs, seed)
