"""Logits that are not finite: found at the first token, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from selfspec.errors import AssetError
from selfspec.model.base import Model
from selfspec.model.tree import Tree

if TYPE_CHECKING:
    from torch import Tensor


def check(model: Model, tokens: Sequence[int], logits: Tensor) -> None:
    """Refuses to go on from logits ``[1, vocab]`` that are not finite: every comparison with them would be nonsense.

    Args:
        tokens: that they follow.

    Raises:
        AssetError: saying where the first value that is not finite comes from.
    """
    # The largest is NaN or infinite where any is NaN, or +inf; -inf is how some heads forbid a token.
    if not math.isfinite(logits.max()):
        dtype = str(model.dtype).removeprefix("torch.")
        raise AssetError(f"model: its logits are not finite in {dtype}: first {_origin(model, tokens)}")


def _origin(model: Model, tokens: Sequence[int]) -> str:
    cache, layers = model.new_cache(len(tokens)), model.shape.layers
    at = cache.place([Tree.chain(tokens)], row=cache.admit())
    hidden = model.embed(tokens, at)
    if not bool(hidden.isfinite().all()):
        return "in the embedding"
    for layer in range(layers):
        hidden = model.run(hidden, cache, at, layer, layer + 1)
        if not bool(hidden.isfinite().all()):
            return f"after layer {layer + 1} of {layers}"
    return "in the final norm" if not bool(model.norm(hidden).isfinite().all()) else "in the head"
