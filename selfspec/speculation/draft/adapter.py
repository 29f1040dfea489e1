"""Early exit through a trained layer (Kangaroo, 2404.18911): the model's first layers, then one of the draft's own."""

from collections.abc import Sequence

from torch import Tensor

from selfspec.config import Draft as DraftConfig
from selfspec.model.attention import AttentionMetadata
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.speculation import block
from selfspec.speculation.block import Block
from selfspec.speculation.draft.layerskip import EarlyExit
from selfspec.speculation.fit import Trace
from selfspec.speculation.head import Head, RawExit, features
from selfspec.speculation.readout import Readout
from selfspec.speculation.sequence import Seq


class Adapter(EarlyExit):
    """Every token that is run through the exit layers is run through the block too.

    So, of tokens that come to be accepted, the block's keys and values are complete.
    """

    layers = 1

    remembers = True

    def __init__(self, model: Model, head: Head, draft: DraftConfig) -> None:
        assert draft.exit_layer is not None, "checked by the plan"
        readout, raw = Readout(model, head.tensors.get("ids")), RawExit(model)
        super().__init__(model, draft.exit_layer, raw, readout, draft.width, draft.budget, draft.sample)
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


def make(draft: DraftConfig, model: Model, head: Head | None) -> Adapter:
    """The draft that the fit stage trained."""
    assert head is not None, "trained by the fit stage"
    return Adapter(model, head, draft)


def fit(model: Model, train: list[Trace], heldout: list[Trace], draft: DraftConfig, seed: int) -> Head:
    """Trains the block on its exit layer (see :func:`selfspec.speculation.block.fit`)."""
    return block.fit(model, train, heldout, draft, seed)
