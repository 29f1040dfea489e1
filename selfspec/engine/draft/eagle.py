"""Drafting on the level of final states (EAGLE, 2401.15077): the next one is foretold, read, and gone on from.

Without training (``draft.alpha``) it is extrapolated, h + alpha (h - h_previous), whichever token was read.
Fitted (``draft.form``), it is a linear map of the state and of the token read from it, each scaled to unit
root-mean-square, given by ridge regression; ``draft.sgd_epochs`` trains it on over chains of its own states.
"""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from selfspec.config import Draft as DraftConfig
from selfspec.engine import beam
from selfspec.engine import fit as fitting
from selfspec.engine.beam import Beam
from selfspec.engine.cache import KVCache
from selfspec.engine.draft.base import Draft, Proposal, Row
from selfspec.engine.fit import Trace
from selfspec.engine.gate import Gate
from selfspec.engine.head import Head, features, linear
from selfspec.engine.model import Model
from selfspec.engine.readout import Readout

UNROLL = 3
"""Steps on its own states that training looks ahead."""


class Step(Protocol):
    """Foretells states. What it goes on from is S wide; its first D columns are the state that is read."""

    def begin(self, row: Row) -> Tensor:
        """``[1, S]``, at a row's last token."""
        ...

    def __call__(self, states: Tensor, tokens: Tensor) -> Tensor:
        """``[N, S]`` and the tokens read from them, int64 ``[N]`` -> the next, ``[N, S]``."""
        ...


class Extrapolation:
    """h + alpha (h - h_previous). S is 2 D: both of them."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def begin(self, row: Row) -> Tensor:
        """The row's memory: its last two verified states."""
        memory: Tensor = row.memory
        return memory

    def __call__(self, states: Tensor, tokens: Tensor) -> Tensor:
        """``tokens`` are not looked at."""
        state, previous = states.chunk(2, -1)
        return torch.cat((torch.lerp(previous, state, 1 + self.alpha), state), -1)


class Regression:
    """A fitted linear map of [state, embedding of the token]. S is D."""

    def __init__(self, tensors: dict[str, Tensor], embedding: Tensor) -> None:
        self.tensors, self.embedding = tensors, embedding

    def begin(self, row: Row) -> Tensor:
        """The state that gave the row's last token."""
        return row.state

    def __call__(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The estimate of the normed final states at those tokens."""
        return linear(self.tensors, features(states, self.embedding[tokens]))


class Eagle(Draft):
    """A chain, or a tree that grows from its ``width`` likeliest paths at every position."""

    def __init__(self, model: Model, step: Step, readout: Readout, draft: DraftConfig) -> None:
        super().__init__(model)
        self.step, self.readout = step, readout
        self.width, self.budget, self.sample = draft.width, draft.budget, draft.sample

    def nodes(self, k: int) -> int:
        """The root, and what a beam over k positions may hold."""
        return beam.most(k, self.width, self.budget)

    def observe(self, row: Row, index: int, tokens: Sequence[int], states: Tensor, cache: KVCache) -> None:
        """Keeps the last two states ``[1, 2 D]``, the newer one first."""
        before = states[-2:-1] if len(states) > 1 else states if row.memory is None else row.memory[:, : len(states[0])]
        row.memory = torch.cat((states[-1:], before), -1)

    def propose(self, rows: Sequence[Row], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        """Until every row has its k positions or the gate doubts the likeliest path of one; the others ride along."""
        grown = [Beam(row.tokens[-1], self.width) for row in rows]
        signals: list[list[float]] = [[] for _ in rows]
        depths, going = [0] * len(rows), [k > 0 for k in ks]
        drawn: list[list[Tensor]] = [[] for _ in rows]
        tokens = self.model.tensor
        states = torch.cat([self.step.begin(row) for row in rows])
        raise NotImplementedError
