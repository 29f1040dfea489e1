"""What every exit layer would be worth to a draft: all candidates fitted in one pass over the model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from selfspec.lazy import torch
from selfspec.model.base import Model
from selfspec.progress import progress
from selfspec.speculation import fit as fitting
from selfspec.speculation.choice import Odds
from selfspec.speculation.draft.layerskip import EarlyExit, ExitOptions
from selfspec.speculation.fit import Trace
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head

if TYPE_CHECKING:
    from torch import Tensor

WIDEST = 16
"""Of a draft's likeliest tokens, how many are looked at."""


def candidates(layers: int) -> list[int]:
    """Exit layers of a model that has so many: all of the first few, then each half as deep again as the last.

    None in the last third: there, what a draft runs, and verification again for what it proposes, is nearly a pass.
    """
    found = [1]
    while 3 * (further := max(found[-1] + 1, found[-1] * 3 // 2)) <= 2 * layers:
        found.append(further)
    return found


Seen: TypeAlias = "dict[int, list[Trace]]"
"""Traces of the same answers, by exit layer."""


def states(model: Model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Seen:
    """Every candidate's states of answers to prompts, from one pass over each."""
    seen: Seen = {layer: [] for layer in candidates(model.shape.layers)}
    with progress("states", len(pairs)) as advance:
        for pair in pairs:
            for layer, trace in fitting.traces(model, *pair, [*seen]).items():
                seen[layer].append(trace.answer())
            advance()
    return seen


def fit(model: Model, draft: ExitOptions, train: Seen) -> Head:
    """Every candidate's head in closed form, in one: the names of its tensors begin with its layer."""
    tensors = fitting.vocabulary(model, next(iter(train.values())), draft.vocab)
    for layer, traces in train.items():
        tensors |= {f"{layer}.{name}": t for name, t in draft.closed_form(traces).items()}
    return Head(tensors, {"previous": draft.get("previous", False)})


def drafts(model: Model, draft: ExitOptions, fitted: Head | None) -> dict[int, EarlyExit]:
    """The draft at every candidate, by layer; ``fitted``: what :func:`fit` made, in the model's dtype."""
    made = {}
    for layer in candidates(model.shape.layers):
        head, own = None, f"{layer}."
        if fitted is not None:
            named = {name.removeprefix(own): t for name, t in fitted.tensors.items() if name.startswith((own, "ids"))}
            head = Head(named, fitted.facts)
        made[layer] = draft.at(layer).make(model, head)
    return made


def odds(draft: EarlyExit, gate: Gate, traces: Sequence[Trace], k: int) -> Odds:
    """Of drafts begun at every position of the answers, each looked at for as long as its tokens stand."""
    model, readout = draft.model, draft.readout
    asked, passed, ranks = [0] * k, [0] * k, torch.zeros(k, WIDEST)
    for trace in traces:
        assert trace.exit is not None, "an early exit"
        at = trace.at
        states: Tensor = trace.final[at - 1].to(model.device)
        for step in range(k):
            inside = at < len(trace.tokens) - 1
            at, states = at[inside], states[inside.to(states.device)]
            if not len(at):
                break
            states = draft.head(trace.exit[at].to(model.device), states)
            logits = readout(states)
            stopped = [gate.stops(signal) for signal in gate.signal(logits).tolist()] or [False] * len(at)
            goes = ~torch.tensor(stopped)
            found = readout.likeliest(logits, WIDEST).cpu() == trace.tokens[at + 1, None]
            asked[step] += len(at)
            passed[step] += int(goes.sum())
            ranks[step, : found.shape[1]] += found[goes].sum(0)
            stood = found[:, 0] & goes
            at, states = at[stood] + 1, states[stood.to(states.device)]
    reached = [step for step in range(k) if asked[step]]
    return Odds(
        tuple(passed[step] / asked[step] for step in reached),
        tuple(tuple((ranks[step] / max(1, passed[step])).tolist()) for step in reached),
    )
