"""Where logits that are not finite come from."""

from collections.abc import Sequence

from selfspec.errors import AssetError
from selfspec.model.base import Model
from selfspec.model.tree import Tree


def located(model: Model, tokens: Sequence[int]) -> AssetError:
    """What is said of a model whose logits after ``tokens`` are not finite: where the first such value comes from."""
    dtype = str(model.dtype).removeprefix("torch.")
    return AssetError(f"model: its logits are not finite in {dtype}: first {_origin(model, tokens)}")


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
