"""Early exit through a trained layer (Kangaroo, 2404.18911): the model's first layers, then one of the draft's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from selfspec.model.attention import AttentionMetadata
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.options import bounded
from selfspec.speculation import block
from selfspec.speculation.block import Block
from selfspec.speculation.draft.base import FittedOptions
from selfspec.speculation.draft.layerskip import EarlyExit
from selfspec.speculation.fit import Trace
from selfspec.speculation.head import Head, HeadForm, RawExit, features
from selfspec.speculation.readout import Readout
from selfspec.speculation.sequence import Seq

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Options(FittedOptions):
    """Where the exit is, and how its block is trained."""

    name: str = "adapter"
    exit_layer: int = bounded(MISSING, 1, fact=True)
    """The block reads the hidden state after this many layers."""

    @property
    def stem(self) -> str:
        """Name and layer, and that there is a block."""
        return f"{self.name}{self.exit_layer}-block"

    def make(self, model: Model, head: Head | None) -> Adapter:
        """The draft that the fit stage trained."""
        assert head is not None, "trained by the fit stage"
        return Adapter(model, head, self)

    def fit(self, model: Model, train: list[Trace], heldout: list[Trace], seed: int) -> Head:
        """Trains the block on its exit layer (see :func:`selfspec.speculation.block.fit`)."""
        return block.fit(model, train, heldout, seed, ridge=self.ridge, sgd_epochs=self.sgd_epochs, vocab=self.vocab)

    def facts(self) -> dict[str, Any]:
        """And that it is a block."""
        return super().facts() | {"form": HeadForm.block.name}


class Adapter(EarlyExit):
    """Every token that is run through the exit layers is run through the block too.

    So, of tokens that come to be accepted, the block's keys and values are complete.
    """

    layers = 1

    remembers = True

    def __init__(self, model: Model, head: Head, draft: Options) -> None:
        trees = draft.width, draft.budget, draft.sample, draft.worth
        super().__init__(model, draft.exit_layer, RawExit(model), Readout.of(model, head), *trees)
        self.block = Block(head.tensors, model.shape)

    def prefill(self, tokens: Sequence[int], cache: KVCache, at: AttentionMetadata, row: Seq) -> tuple[Tensor, int]:
        """The exit layers, and the block's keys and values."""
        hidden = self.model.run(self.model.embed(tokens, at), cache, at, 0, self.exit_layer)
        self.remember(hidden, cache, at)
        return hidden, self.exit_layer

    def estimate(self, hidden: Tensor, previous: Tensor, cache: KVCache, at: AttentionMetadata) -> Tensor:
        """Through the block; ``previous`` is not looked at."""
        return self.block(features(hidden), cache, at)

    def remember(self, hidden: Tensor, cache: KVCache, at: AttentionMetadata) -> None:
        """Keys and values alone."""
        self.block.write(features(hidden), cache, at)
