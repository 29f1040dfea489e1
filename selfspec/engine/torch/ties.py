"""Ties: whether rounding explains that one token came before another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfspec.engine.base import Tie, TieJudge
from selfspec.engine.torch.weights import Weights
from selfspec.model.base import Model
from selfspec.model.tree import Tree

_ALONE = (0, 1, 2, 4, 8, 16, 32)
"""Tokens before a tie that are read one by one, the others together: each of these ways rounds otherwise."""


class Float32Judge(TieJudge):
    """Compares by the same weights in float32, whoever runs them; loads them only where there is something to judge."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    @torch.inference_mode()
    def compare(self, context: Sequence[int], a: int, b: int) -> Tie:
        """Two candidates for the token after ``context``.

        What rounding explains is measured where it matters: by how much the working dtype moves these two
        logits, when the tokens before them are read together, as verification does, one by one, as plain
        decoding does, and in ways between. Each may err that far in either pass; at least two units in its last place.
        In float32 nothing is explained.
        """
        candidates, dtype = [a, b], self._weights.dtype
        with self._weights.float32() as model:
            exact = _next_logits(model, context)[candidates]
            del model  # else it would be part of the high-water mark that begins with the block's end
        gap = float(exact.diff().abs())
        if dtype is torch.float32:
            return Tie(gap, 0.0)
        rounded = (_next_logits(self._weights.model, context, alone)[candidates].float() for alone in _ALONE)
        moved = max(float((logits - exact).abs().max()) for logits in rounded)
        return Tie(gap, 2 * max(moved, torch.finfo(dtype).eps * float(exact.abs().max())))


def _next_logits(model: Model, context: Sequence[int], alone: int = 0) -> Tensor:
    """``[vocab]``, the context read in one pass, but for the last ``alone`` of its tokens: they have one each."""
    cache, together = model.new_cache(len(context)), max(1, len(context) - alone)
    row = cache.admit()
    for part in (context[:together], *([token] for token in context[together:])):
        at = cache.place([Tree.chain(part)], row=row)
        hidden = model.run(model.embed(part, at), cache, at, 0, model.shape.layers)
        cache.commit(row, range(len(part)))
    return model.logits(model.norm(hidden[-1:]))[0]
