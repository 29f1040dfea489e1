"""Early exit through a fitted head: a least-squares map from the exit state to the final one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from selfspec.errors import ConfigError
from selfspec.lazy import torch
from selfspec.model.base import Model
from selfspec.options import bounded, setting
from selfspec.speculation import fit as fitting
from selfspec.speculation.draft.base import FittedOptions, check_rank
from selfspec.speculation.draft.layerskip import EarlyExit, ExitOptions, agreement, temperature
from selfspec.speculation.fit import Trace
from selfspec.speculation.head import FittedExit, Head, HeadForm, RawExit, features, laid_out, linear
from selfspec.speculation.readout import Readout

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Options(FittedOptions, ExitOptions):
    """Where the exit is, and what is fitted to it."""

    name: str = "lsq"
    exit_layer: int | str = bounded(MISSING, 1, auto=True, fact=True)
    """The draft reads the hidden state after this many layers; ``auto``: the fit stage chooses."""
    form: HeadForm = setting(MISSING, fact=True)
    """A full affine map, or one of rank ``rank``."""
    rank: int | None = bounded(None, 1)
    previous: bool = setting(False, fact=True)
    """Also read the final hidden state of the previous position."""

    can_go_unverified: ClassVar[bool] = True
    inside_vllm: ClassVar[bool] = True
    engines: ClassVar[Mapping[str, tuple[str, ...]]] = {"vllm": ()}

    @property
    def stem(self) -> str:
        """Name and layer, and the rank where it is low."""
        return f"{self.name}{self.exit_layer}" + (f"r{self.rank}" if self.rank else "")

    def check(self) -> None:
        """Refuses what is no linear map."""
        super().check()
        check_rank(self.form, self.rank)
        if self.form is HeadForm.block:
            raise ConfigError("draft.form=block: draft=lsq is a linear map; draft=adapter has a block")

    def make(self, model: Model, head: Head | None) -> EarlyExit:
        """The same draft as ``layerskip`` with a better readout."""
        assert head is not None, "fitted by the fit stage"
        exit = FittedExit(laid_out(head.tensors, model.native), head.facts["previous"])
        readout = Readout.of(model, head)
        return EarlyExit(model, self.layer, exit, readout, self.width, self.budget, self.sample, self.worth)

    def closed_form(self, train: Sequence[Trace]) -> dict[str, Tensor]:
        """Ridge regression from the exit state to the final one."""
        return fitting.ridge((example(trace, self.previous) for trace in train), self.ridge, self.rank)

    def fit(self, model: Model, train: list[Trace], heldout: list[Trace], seed: int) -> Head:
        """Ridge regression from the exit state to the final one, and SGD on the cross-entropy where asked.

        Returns:
            The head in float32 on the CPU. Its facts hold, on held-out answers, the top-1 agreement with the full
            model by drafted position (``agreement_by_position``; ``agreement`` is the first), the raw exit's
            (``raw_agreement``), and what SGD added to the first (``sgd_gain``).
        """
        begin = time.perf_counter()
        facts: dict[str, Any] = {"previous": self.previous, "form": self.form.name}
        tensors = self.closed_form(train)
        facts["solve_s"] = round(time.perf_counter() - begin, 3)
        ids = fitting.vocabulary(model, train, self.vocab)
        readout = Readout(model, ids.get("ids"))
        raw = agreement(model, readout, RawExit(model), heldout)

        def measured(tensors: dict[str, Tensor]) -> list[float]:
            there = Head(tensors, facts).to(model.dtype, model.device)
            return agreement(model, readout, FittedExit(there.tensors, self.previous), heldout)

        further = partial(descend, readout, train, self, seed) if self.sgd_epochs else None
        tensors, by_position, gain = fitting.refine(tensors, measured, further)
        facts |= gain | fitting.facts(train, heldout, tensors, by_position) | {"raw_agreement": raw[0]}
        exit = FittedExit(Head(tensors, facts).to(model.dtype, model.device).tensors, self.previous)
        facts |= temperature(readout, exit, heldout)
        return Head(tensors | ids, facts)


def example(trace: Trace, previous: bool) -> tuple[Tensor, Tensor]:
    """Features ``[m, P]`` and final states ``[m, D]`` of an answer, float32."""
    assert trace.exit is not None, "an early exit"
    before = trace.final[trace.at - 1].float() if previous else None
    return features(trace.exit[trace.at].float(), before), trace.final[trace.at].float()


def descend(
    readout: Readout, traces: list[Trace], draft: Options, seed: int, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Minimises the cross-entropy to the model's own tokens, from the closed-form solution on."""
    x = torch.cat([example(trace, draft.previous)[0] for trace in traces])
    wanted = readout.indices(torch.cat([trace.tokens[trace.at + 1] for trace in traces]).to(readout.weight.device))

    def loss(learned: dict[str, Tensor], rows: Tensor, x: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
        return fitting.cross_entropy(linear(learned, x[rows]).to(weight.device), weight, wanted[rows])

    return fitting.descend(tensors, (x, readout.weight, wanted), loss, len(x), draft.sgd_epochs, seed)
