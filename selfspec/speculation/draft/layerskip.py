"""Early exit: the model's own first layers draft (LayerSkip, 2404.16710; Draft & Verify, 2309.08168).

Weights, KV and hidden states are shared with verification, which starts where the draft left off: the
exit layers are never run twice for a token of a chain.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from omegaconf import MISSING

from selfspec.lazy import torch
from selfspec.model.attention import AttentionMetadata
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.kernels import native
from selfspec.model.tree import Tree
from selfspec.options import bounded
from selfspec.speculation import fit as fitting
from selfspec.speculation.beam import Spine
from selfspec.speculation.draft.base import Draft, Proposal, ReadoutOptions, stack
from selfspec.speculation.fit import Trace
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import ExitHead, Head, RawExit
from selfspec.speculation.readout import Readout
from selfspec.speculation.sequence import Seq

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ExitOptions(ReadoutOptions):
    """What drafts have in common whose exit layer may be chosen by the fit stage."""

    chooses_exit: ClassVar[bool] = True

    @property
    def layer(self) -> int:
        """The exit layer of one that is not open."""
        assert not self.open, "chosen by the fit stage"
        return int(self.get("exit_layer"))

    def closed_form(self, train: Sequence[Trace]) -> dict[str, Tensor]:
        """What is fitted to an exit before any gradient step, as a head's tensors; here, nothing."""
        return {}


@dataclass
class Options(ExitOptions):
    """Where the exit is, and how it is read out."""

    name: str = "layerskip"
    exit_layer: int | str = bounded(MISSING, 1, auto=True, fact=True)
    """The draft reads the hidden state after this many layers; ``auto``: the fit stage chooses."""

    can_go_unverified: ClassVar[bool] = True
    inside_vllm: ClassVar[bool] = True
    engines: ClassVar[Mapping[str, tuple[str, ...]]] = {"fake": ("exit_layer",), "hf": ("exit_layer",), "vllm": ()}

    @property
    def raw_exits(self) -> bool:
        """Unless it is read out over tokens that are frequent."""
        return self.vocab is None

    @property
    def stem(self) -> str:
        """Name and layer."""
        return f"{self.name}{self.exit_layer}"

    def make(self, model: Model, head: Head | None) -> EarlyExit:
        """Read out through the model's own norm and head, or its rows of frequent tokens."""
        readout = Readout.of(model, head)
        return EarlyExit(model, self.layer, RawExit(model), readout, self.width, self.budget, self.sample, self.worth)

    def fit(self, model: Model, train: list[Trace], heldout: list[Trace], seed: int) -> Head:
        """Nothing but the draft's vocabulary; its facts hold the held-out agreement by drafted position."""
        begin = time.perf_counter()
        tensors = fitting.vocabulary(model, train, self.vocab)
        solved = time.perf_counter() - begin
        readout, exit = Readout(model, tensors["ids"]), RawExit(model)
        facts = fitting.facts(train, heldout, tensors, agreement(model, readout, exit, heldout))
        return Head(tensors, facts | temperature(readout, exit, heldout) | {"solve_s": round(solved, 3)})


class Exit(NamedTuple):
    """N tokens run as far as the exit, and read out there.

    Attributes:
        hidden: exit states, and
        states: estimates of the normed final ones, both ``[N, D]``.
        logits: ``[N, V]``.
        tokens: the likeliest of each, best first, and
        log_p: their log-probabilities.
        signals: the gate's of each, if it reads any.
    """

    hidden: Tensor
    states: Tensor
    logits: Tensor
    tokens: list[list[int]]
    log_p: list[list[float]]
    signals: list[float]


class EarlyExit(Draft):
    """Drafts with layers below ``exit_layer`` and a readout of their hidden state.

    A chain, or with a ``width`` a tree of which the likeliest path goes on (see :class:`Spine
    <selfspec.speculation.beam.Spine>`). Leaves are run together with the path's last token, and so cost little.
    """

    remembers = False
    """Whether :meth:`remember` does anything: else, where nothing is asked for, nothing need be run apart."""

    def __init__(
        self,
        model: Model,
        exit_layer: int,
        head: ExitHead,
        readout: Readout | None = None,
        width: int = 1,
        budget: int | None = None,
        sample: bool = False,
        worth: float = 0.0,
    ) -> None:
        super().__init__(model)
        self.exit_layer, self.head, self.readout = exit_layer, head, readout or Readout(model)
        self.width, self.budget, self.sample, self.worth = width, budget, sample, worth

    def estimate(self, hidden: Tensor, previous: Tensor, cache: KVCache, at: AttentionMetadata) -> Tensor:
        """Exit states and the previous positions' final states -> estimates of the final ones, all ``[N, D]``."""
        return self.head(hidden, previous)

    def exit(
        self, tokens: Sequence[int], previous: Tensor, cache: KVCache, at: AttentionMetadata, layer: int, gate: Gate
    ) -> Exit:
        """Runs N tokens through the first layers and reads them out: by one call where our own kernels do.

        Args:
            previous: the positions' before final states, or estimates of them, ``[N, D]``.
        """
        whole = not self.remembers and native.whole(len(self.readout.weight))
        stack = self.model.stack(cache, at) if whole else None
        if stack is not None:
            head, readout, also = self.head, self.readout, previous if self.head.previous else None
            how = head.weights, readout.packed, readout.ids, self.width, readout.temperature
            read = stack.exit(tokens, also, cache, at, layer, *how)
            own = gate.signal(read.logits).tolist() if gate.statistic is None else getattr(read, gate.statistic)
            return Exit(*read[:5], own)
        hidden = self.model.run(self.model.embed(tokens, at), cache, at, 0, layer)
        states = self.estimate(hidden, previous, cache, at)
        logits = self.readout(states)
        return Exit(hidden, states, logits, *self.readout.candidates(logits, self.width, gate.signal(logits)))

    def remember(self, hidden: Tensor, cache: KVCache, at: AttentionMetadata) -> None:
        """Exit states ``[N, D]`` that are not read out: a draft with keys and values of its own writes them now."""

    def nodes(self, k: int) -> int:
        """The root, and ``width`` candidates at each of k positions or as many as the budget allows."""
        return 1 + (k * self.width if self.budget is None else min(k * self.width, self.budget))

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        """Drafts until every row has its k positions or the gate doubts the likeliest token of one.

        What is proposed last is run through the exit layers too: verification goes on from its hidden state.
        Rows that are done ride along, and what they draft is dropped.
        """
        # Then verification runs all layers in one pass: a plain cycle of an early exit costs what plain decoding does.
        if not any(ks) and not self.remembers:
            return Proposal([Tree.chain(row.tokens[-1:]) for row in rows])
        exit_layer = rows[0].exit_layer or self.exit_layer
        spines, seen = [Spine(row.tokens[-1], self.worth) for row in rows], [list[float]() for _ in rows]
        drawn_from: list[list[Tensor]] = [[] for _ in rows]
        ks = [min(k, self.budget or k) for k in ks]
        going = [k > 0 for k in ks]
        tokens, states = [row.tokens[-1] for row in rows], stack(rows)
        hidden: list[Tensor] = []
        while any(going):
            step = len(hidden)
            # Zeros stand for tokens that have been run: places depend on how many there are, not on which.
            at = cache.place([Tree.chain([0] * step + [token]) for token in tokens], first=step)
            left, states, logits, best, log_p, signals = self.exit(tokens, states, cache, at, exit_layer, gate)
            hidden.append(left)
            for r, spine in enumerate(spines):
                if gate.reads and going[r]:
                    seen[r].append(signals[r])
                    going[r] = not gate.stops(signals[r])
                if going[r] and self.sample and rows[r].request.sampling.temperature > 0:
                    number = len(rows[r].tokens) + step
                    best[r][0], q = self.readout.draw(logits[r], rows[r].request.sampling, number, step)
                    drawn_from[r].append(q)
                if going[r]:
                    spine.grow(step, best[r], log_p[r])
                    going[r] = step + 1 < ks[r] and spine.pays
            tokens = [token for token, *_ in best]
        grown = [spine.tree(self.budget) for spine in spines]
        trees = [tree for tree, _ in grown]
        for tree, drawn, signals in zip(trees, drawn_from, seen, strict=True):
            tree.drawn_from, tree.signals = torch.stack(drawn) if drawn else None, signals
        # A path's last token has been proposed and not run, unless its row rode along while others drafted on.
        ran = [min(path, len(hidden)) for _, path in grown]
        missing = any(len(tree) > count for tree, count in zip(trees, ran, strict=True))
        # One pass from the shortest row's end on: rows that went further run those tokens again.
        first = min(ran) if missing else len(hidden)
        if missing:
            at = cache.place(trees, first)
            tokens = [token for tree in trees for token in tree.tokens[first:]]
            rest = self.model.run(self.model.embed(tokens, at), cache, at, 0, exit_layer)
            self.remember(rest, cache, at)
        else:
            rest = hidden[0][:0]
        return Proposal(trees, by_row(hidden[:first], rest, trees), exit_layer)


def by_row(steps: Sequence[Tensor], rest: Tensor, trees: Sequence[Tree]) -> Tensor:
    """All nodes of all trees, row after row, ``[N, D]``.

    Args:
        steps: of ``[R, D]``: every row's first nodes and, where it has fewer, what is to be dropped.
        rest: the nodes after those, row after row.
    """
    parts: list[Tensor] = []
    begun = [min(len(tree), len(steps)) for tree in trees]
    later = torch.split(rest, [len(tree) - count for tree, count in zip(trees, begun, strict=True)])
    for r, count in enumerate(begun):
        parts += (*(step[r : r + 1] for step in steps[:count]), later[r])
    return torch.cat(parts)


def agreement(model: Model, readout: Readout, head: ExitHead, traces: Sequence[Trace]) -> list[float]:
    """Of chains drafted through an exit head, by position (see :func:`selfspec.speculation.fit.agreement`)."""

    def guess(trace: Trace, at: Tensor, step: int, states: Tensor) -> tuple[Tensor, Tensor]:
        assert trace.exit is not None, "an early exit"
        states = head(trace.exit[at].to(model.device), states.to(model.device))
        return readout.likeliest(readout(states))[:, 0], states

    return fitting.agreement(traces, guess)


def temperature(readout: Readout, head: ExitHead, traces: Sequence[Trace]) -> dict[str, float]:
    """The fact that says at which temperature its first tokens are as likely as an exit head says they are."""

    def first(trace: Trace) -> Tensor:
        assert trace.exit is not None, "an early exit"
        device = readout.weight.device
        return head(trace.exit[trace.at].to(device), trace.final[trace.at - 1].to(device))

    return fitting.temperature(readout, ((first(trace), trace.tokens[trace.at + 1]) for trace in traces))
