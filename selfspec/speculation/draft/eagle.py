"""Drafting on the level of final states (EAGLE, 2401.15077): the next one is predicted, read, and gone on from.

Without training (``draft.alpha``) it is extrapolated, h + alpha (h - h_previous), whichever token was read.
Fitted (``draft.form``), it is a linear map of the state and of the token read from it, each scaled to unit
root-mean-square, given by ridge regression; ``draft.sgd_epochs`` trains it on over chains of its own states.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from selfspec.errors import ConfigError
from selfspec.lazy import F, torch
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.transfer import to_device
from selfspec.model.tree import Tree
from selfspec.options import bounded, setting
from selfspec.speculation import beam, block
from selfspec.speculation import fit as fitting
from selfspec.speculation.beam import Beam
from selfspec.speculation.block import Block
from selfspec.speculation.draft.base import Draft, Proposal, ReadoutOptions, check_rank
from selfspec.speculation.fit import Trace
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head, HeadForm, features, laid_out, linear
from selfspec.speculation.readout import Readout
from selfspec.speculation.sequence import Seq

if TYPE_CHECKING:
    from torch import Tensor

UNROLL = 3
"""Steps on its own states that training looks ahead."""


@dataclass
class Options(ReadoutOptions):
    """How the next state is predicted."""

    name: str = "eagle"
    form: HeadForm | None = setting(None, fact=True)
    """A full affine map, one of rank ``rank``, or a trained transformer block."""
    rank: int | None = bounded(None, 1)
    ridge: float | None = bounded(None, 1e-9)
    """Of a form: ridge strength, in units of the mean diagonal of the Gram matrix."""
    sgd_epochs: int = bounded(0, 0, 100)
    """Of a form: passes of SGD on the cross-entropy after the closed-form solution."""
    alpha: float | None = bounded(None, 0, 10)
    """Without training: the next state is h + alpha (h - h_previous)."""

    @property
    def learned_from_states(self) -> bool:
        """A form, or the frequent tokens."""
        return self.form is not None or super().learned_from_states

    @property
    def stem(self) -> str:
        """Name, and rank or block."""
        return self.name + (f"r{self.rank}" if self.rank else "-block" if self.form is HeadForm.block else "")

    def check(self) -> None:
        """Refuses both ways at once, and neither."""
        super().check()
        check_rank(self.form, self.rank)
        if (self.alpha is None) == (self.form is None):
            raise ConfigError(f"draft.alpha={self.alpha}: eagle wants either an alpha or a form")
        if self.alpha is not None and self.sgd_epochs:
            raise ConfigError(f"draft.sgd_epochs={self.sgd_epochs}: with draft.alpha nothing is trained")
        if self.form is not None and self.ridge is None:
            raise ConfigError("draft.ridge=null: a fitted head needs a number >= 1e-09")

    def make(self, model: Model, head: Head | None) -> Eagle:
        """The extrapolation, or what the fit stage made."""
        if self.form is None:
            return Extrapolated(model, Readout.of(model, head), self)
        assert head is not None, "fitted by the fit stage"
        return Trained(model, head, self) if self.form is HeadForm.block else Regressed(model, head, self)

    def fit(self, model: Model, train: list[Trace], heldout: list[Trace], seed: int) -> Head:
        """Ridge regression, and SGD where asked; or nothing but the vocabulary. Facts as of every fitted head."""
        if self.form is HeadForm.block:
            assert self.ridge is not None, "checked by the plan"
            return block.fit(
                model, train, heldout, seed, ridge=self.ridge, sgd_epochs=self.sgd_epochs, vocab=self.vocab
            )
        begin = time.perf_counter()
        ids = fitting.vocabulary(model, train, self.vocab)
        tensors: dict[str, Tensor] = {}
        if self.ridge is not None and self.form is not None:
            tensors = fitting.ridge((_example(model, trace) for trace in train), self.ridge, self.rank)
        facts: dict[str, Any] = {"solve_s": round(time.perf_counter() - begin, 3)}

        def measured(tensors: dict[str, Tensor]) -> list[float]:
            return _agreement(self.make(model, Head(tensors | ids, {}).to(model.dtype, model.device)), heldout)

        readout = Readout(model, ids.get("ids"))
        further = partial(_descend, model, readout, train, self.sgd_epochs, seed) if self.sgd_epochs else None
        tensors, by_position, gain = fitting.refine(tensors, measured, further)
        facts |= gain | fitting.facts(train, heldout, tensors, by_position)
        drafts = self.make(model, Head(tensors | ids, {}).to(model.dtype, model.device))
        return Head(tensors | ids, facts | _temperature(drafts, heldout))


class Eagle(Draft):
    """A chain, or a tree that grows from its ``width`` likeliest paths at every position.

    What it goes on from is S wide; the first D columns are the state that is read.
    """

    def __init__(self, model: Model, readout: Readout, draft: Options) -> None:
        super().__init__(model)
        self.readout, self.worth = readout, draft.worth
        self.width, self.budget, self.sample = draft.width, draft.budget, draft.sample

    def begin(self, row: Seq) -> Tensor:
        """What to go on from at a row's last token, ``[1, S]``."""
        state: Tensor = row.state
        return state

    def ahead(self, states: Tensor, tokens: Tensor) -> Tensor:
        """``[N, S]`` and the tokens read from them, int64 ``[N]`` -> the next, ``[N, S]``."""
        raise NotImplementedError

    def go_on(self, states: Tensor, tokens: Tensor, trees: Sequence[Tree], cache: KVCache) -> Tensor:
        """As :meth:`ahead`; a draft with keys and values of its own also needs where the tokens stand.

        Args:
            trees: for every row of the batch, what it has gone on from in this cycle, these tokens last.
        """
        return self.ahead(states, tokens)

    def nodes(self, k: int) -> int:
        """The root, and what a beam over k positions may hold."""
        return beam.most(k, self.width, self.budget)

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        """Until every row has its k positions or the gate doubts the likeliest path of one; the others ride along."""
        beams, going = [Beam(row.tokens[-1], self.width, self.worth) for row in rows], [k > 0 for k in ks]
        trees = [own.tree(0) for own in beams]
        seen: list[list[float]] = [[] for _ in rows]
        drawn_from: list[list[Tensor]] = [[] for _ in rows]
        gone = [own.tree(0) for own in beams]
        states = torch.cat([self.begin(row) for row in rows]) if any(going) else torch.empty(0)
        for step in range(max(ks)):
            tokens = to_device([token for own in beams for token in own.tokens], states.device)
            states = self.go_on(states, tokens, gone, cache)
            logits, paths = self.readout(states[:, : self.model.shape.hidden]), len(states) // len(rows)
            likely, log_p, signals = self.readout.candidates(logits, self.width, gate.signal(logits[::paths]))
            parents = list[int]()
            for r, (row, own) in enumerate(zip(rows, beams, strict=True)):
                # Before the beam grows: a doubted token is not in the pool that `tree` takes from.
                if going[r] and gate.reads:
                    seen[r].append(signals[r])
                    if gate.stops(signals[r]):
                        trees[r], going[r] = own.tree(self.budget), False
                if going[r] and self.sample and row.request.sampling.temperature > 0:
                    # Row r has one path: the plan refuses to sample trees.
                    likely[r][0], q = self.readout.draw(logits[r], row.request.sampling, len(row.tokens) + step, step)
                    drawn_from[r].append(q)
                at = slice(r * paths, (r + 1) * paths)
                # Rows that are done grow too, so that every row has as many paths and the states stay one tensor.
                places, first = own.grow(likely[at], log_p[at]), len(gone[r]) - paths
                parents += [r * paths + place for place in places]
                for place, token in zip(places, own.tokens, strict=True):
                    gone[r].add(first + place, token)
                if going[r] and (step + 1 == ks[r] or not own.pays):
                    trees[r], going[r] = own.tree(self.budget), False
            if not any(going):
                break
            if self.width > 1:
                states = states[to_device(parents, states.device)]
        for tree, signals, drawn in zip(trees, seen, drawn_from, strict=True):
            tree.signals = signals
            tree.drawn_from = torch.stack(drawn[: len(tree) - 1]) if len(tree) > 1 and drawn else None
        return Proposal(trees)


class Extrapolated(Eagle):
    """h + alpha (h - h_previous). S is 2 D: both of them."""

    def __init__(self, model: Model, readout: Readout, draft: Options) -> None:
        super().__init__(model, readout, draft)
        assert draft.alpha is not None, "checked by the plan"
        self.alpha = draft.alpha

    def observe(self, row: Seq, index: int, tokens: Sequence[int], states: Tensor, cache: KVCache) -> None:
        """Keeps the last two verified states, the newer one first."""
        # The newer half of what is remembered: with one new state, the one before it is from the cycle before.
        known = states if row.memory is None else torch.cat((row.memory[:, : states.shape[1]], states))
        # Of a single state, both: nothing to extrapolate, so it stands still.
        row.memory = torch.cat((known[-1:], known[-2:][:1]), -1)

    def begin(self, row: Seq) -> Tensor:
        """The row's last two verified states."""
        memory: Tensor = row.memory
        return memory

    def ahead(self, states: Tensor, tokens: Tensor) -> Tensor:
        """``tokens`` are not looked at."""
        state, previous = states.chunk(2, -1)
        return torch.cat((torch.lerp(previous, state, 1 + self.alpha), state), -1)


class Regressed(Eagle):
    """A fitted linear map of the state and the token's embedding. S is D."""

    def __init__(self, model: Model, head: Head, draft: Options) -> None:
        super().__init__(model, Readout.of(model, head), draft)
        self.tensors = laid_out(head.tensors, model.native)

    def ahead(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Estimates of the normed final states at those tokens."""
        return linear(self.tensors, features(states, self.model.embedding[tokens]))


class Trained(Eagle):
    """A transformer layer over the token's embedding and the state before it (see ``block.py``). S is D.

    It writes keys and values of its own estimates as it drafts; of what stands, they are written again from
    the true states.
    """

    layers = 1

    def __init__(self, model: Model, head: Head, draft: Options) -> None:
        super().__init__(model, Readout.of(model, head), draft)
        self.block = Block(head.tensors, model.shape)

    def nodes(self, k: int) -> int:
        """What is proposed, or what is gone on from, whichever is more."""
        return max(super().nodes(k), 1 + max(k - 1, 0) * self.width)

    def observe(self, row: Seq, index: int, tokens: Sequence[int], states: Tensor, cache: KVCache) -> None:
        """Keys and values of what is new; before a prompt's first token, the state is zero."""
        if len(states) == cache.lengths[index]:
            tokens, states = row.tokens, F.pad(states, (0, 0, 1, 0))
        # `first` is negative: slots before the root's, where true states now replace the draft's estimates.
        at = cache.place([Tree.chain(tokens[-1:])], first=1 - len(tokens), row=index)
        embedded = self.model.embedding[to_device(tokens, states.device)]
        self.block.write(features(embedded, states), cache, at)

    def go_on(self, states: Tensor, tokens: Tensor, trees: Sequence[Tree], cache: KVCache) -> Tensor:
        """Estimates of the normed final states at those tokens."""
        at = cache.place(trees, first=len(trees[0]) - len(tokens) // len(trees))
        return self.block(features(self.model.embedding[tokens], states), cache, at)


def _example(model: Model, trace: Trace) -> tuple[Tensor, Tensor]:
    """Features ``[m, 2 D]`` and final states ``[m, D]`` of an answer, float32."""
    at = trace.at
    embedded = model.embedding[trace.tokens[at]].float().cpu()
    return features(trace.final[at - 1].float(), embedded), trace.final[at].float()


def _agreement(drafts: Eagle, traces: Sequence[Trace]) -> list[float]:
    size, device = drafts.model.shape.hidden, drafts.model.device

    def guess(trace: Trace, at: Tensor, step: int, states: Tensor) -> tuple[Tensor, Tensor]:
        if step == 0 and isinstance(drafts, Extrapolated):
            states = torch.cat((states, trace.final[(at - 2).clamp(0)]), -1)
        states = drafts.ahead(states.to(device), trace.tokens[at].to(device))
        return drafts.readout.likeliest(drafts.readout(states[:, :size]))[:, 0], states

    return fitting.agreement(traces, guess)


def _temperature(drafts: Eagle, traces: Sequence[Trace]) -> dict[str, float]:
    """Of the first token drafted."""
    size, device = drafts.model.shape.hidden, drafts.model.device

    def first(trace: Trace) -> Tensor:
        at = trace.at
        states = trace.final[at - 1]
        if isinstance(drafts, Extrapolated):
            states = torch.cat((states, trace.final[(at - 2).clamp(0)]), -1)
        return drafts.ahead(states.to(device), trace.tokens[at].to(device))[:, :size]

    return fitting.temperature(drafts.readout, ((first(trace), trace.tokens[trace.at + 1]) for trace in traces))


def _descend(
    model: Model, readout: Readout, traces: Sequence[Trace], epochs: int, seed: int, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Minimises the cross-entropy to the model's own tokens, the mean over chains of ``UNROLL`` steps."""
    state: list[Tensor] = []
    seen: list[Tensor] = []
    for trace in traces:
        at = trace.at[: max(len(trace.at) - UNROLL + 1, 0)]
        state.append(trace.final[at - 1].float())
        seen.append(trace.tokens[at[:, None] + torch.arange(UNROLL + 1)])
    tokens, device = torch.cat(seen), model.device
    frozen = readout.weight, model.embedding, torch.cat(state), tokens, readout.indices(tokens).to(device)

    def loss(learned: dict[str, Tensor], rows: Tensor, readout: Tensor, embedding: Tensor, *examples: Tensor) -> Tensor:
        state, tokens, wanted = (t[rows] for t in examples)
        total = torch.zeros(())
        for step in range(UNROLL):
            state = linear(learned, features(state, embedding[tokens[:, step]].float().cpu()))
            total = total + fitting.cross_entropy(state.to(device), readout, wanted[:, step + 1]).cpu()
        return total / UNROLL

    return fitting.descend(tensors, frozen, loss, len(tokens), epochs, seed)
