"""Early exit through a fitted head: a least-squares map from the exit state to the final one."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selfspec.config import Draft as DraftConfig
from selfspec.model.base import Model
from selfspec.speculation import fit as fitting
from selfspec.speculation.draft.layerskip import EarlyExit, agreement
from selfspec.speculation.fit import Trace
from selfspec.speculation.head import FittedExit, Head, RawExit, features, linear
from selfspec.speculation.readout import Readout


def make(draft: DraftConfig, model: Model, head: Head | None) -> EarlyExit:
    """The same draft as ``layerskip`` with a better readout."""
    assert draft.exit_layer is not None and head is not None, "checked by the plan, fitted by the fit stage"
    exit = FittedExit(head.tensors, head.facts["previous"])
    readout = Readout(model, head.tensors.get("ids"))
    return EarlyExit(model, draft.exit_layer, exit, readout, draft.width, draft.budget, draft.sample)


def fit(model: Model, train: list[Trace], heldout: list[Trace], draft: DraftConfig, seed: int) -> Head:
    """Ridge regression from the exit state to the final one, and SGD on the cross-entropy where asked.

    Returns:
        The head in float32 on the CPU. Its facts hold, on held-out answers, the top-1 agreement with the full
        model by drafted position (``agreement_by_position``; ``agreement`` is the first), the raw exit's
        (``raw_agreement``), and what SGD added to the first (``sgd_gain``).
    """
    begin = time.perf_counter()
    facts: dict[str, Any] = {"previous": draft.previous, "form": draft.form.name if draft.form else None}
    tensors = fitting.ridge(examples(train, draft.previous), draft)
    facts["solve_s"] = round(time.perf_counter() - begin, 3)
    ids = fitting.vocabulary(model, train, draft)
    readout = Readout(model, ids.get("ids"))
    raw = agreement(model, readout, RawExit(model), heldout)

    def measured(tensors: dict[str, Tensor]) -> list[float]:
        there = Head(tensors, facts).to(model.dtype, model.device)
        return agreement(model, readout, FittedExit(there.tensors, draft.previous), heldout)

    further = partial(descend, readout, train, draft, seed) if draft.sgd_epochs else None
    tensors, by_position, gain = fitting.refine(tensors, measured, further)
    facts |= gain | fitting.facts(train, heldout, tensors, by_position) | {"raw_agreement": raw[0]}
    return Head(tensors | ids, facts)


def examples(traces: list[Trace], previous: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Features ``[m, P]`` and final states ``[m, D]`` of every answer, float32."""
    for trace in traces:
        assert trace.exit is not None, "an early exit"
        before = trace.final[trace.at - 1].float() if previous else None
        yield features(trace.exit[trace.at].float(), before), trace.final[trace.at].float()


def descend(
    readout: Readout, traces: list[Trace], draft: DraftConfig, seed: int, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Minimises the cross-entropy to the model's own tokens, from the closed-form solution on."""
    x = torch.cat([x for x, _ in examples(traces, draft.previous)])
    wanted = readout.indices(torch.cat([trace.tokens[trace.at + 1] for trace in traces]).to(readout.weight.device))

    def loss(learned: dict[str, Tensor], rows: Tensor, x: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
        return fitting.cross_entropy(linear(learned, x[rows]).to(weight.device), weight, wanted[rows])

    return fitting.descend(tensors, (x, readout.weight, wanted), loss, len(x), draft.sgd_epochs, seed)
