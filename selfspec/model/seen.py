"""What a transformers model is made of, by its config and by one pass of it: no list of architectures says it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selfspec.errors import ConfigError

_UNBOUNDED = 1 << 17
"""Positions of a model that names no limit."""


def kind(lm: Any) -> str:
    """What to call it in an error."""
    return f"architecture {lm.config.model_type!r}"


def stack_of(lm: nn.Module, layers: int) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the decoder's layers, and the list of them."""
    for module in lm.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == layers:
                return module, child
    raise ConfigError(f"model: {kind(lm)} has no list of its {layers} layers")


class Seen:
    """What one pass of a model over two tokens shows of it.

    Attributes:
        tuples: whether layers give tuples, whose first is the residual stream.
        after: what runs after the last layer: the final norm, mostly.
        kv_heads, head_dim: of the keys and values that layers keep.
    """

    is_compileable = False

    def __init__(self, lm: Any, cache_name: str, stack: nn.Module, layers: nn.ModuleList) -> None:
        """Runs it.

        Args:
            lm: a ``PreTrainedModel``, and
            cache_name: what its ``stack`` of ``layers`` calls the cache that it takes.

        Raises:
            ConfigError: its layers keep no keys and values, or of several sizes.
        """
        self.tuples, self.after = False, list[nn.Module]()
        self._kept: dict[int, tuple[int, ...]] = {}
        hooks = [layers[-1].register_forward_hook(self._last)]
        hooks += [child.register_forward_hook(self._other) for child in stack.children() if child is not layers]
        ids = torch.tensor([[0, 1]], device=lm.device)
        try:
            # The stack alone: what a wrapper around it would refuse of such a cache is none of our business.
            stack(input_ids=ids, use_cache=True, **{cache_name: self})
        finally:
            for hook in hooks:
                hook.remove()
        sizes = set(self._kept.values())
        if len(self._kept) < len(layers):
            raise ConfigError(f"model: {kind(lm)} has layers that keep no keys and values of their own")
        if len(sizes) > 1:
            raise ConfigError(f"model: {kind(lm)} keeps keys and values of several sizes")
        ((self.kv_heads, self.head_dim),) = sizes

    def _last(self, layer: nn.Module, given: Any, out: Any) -> None:
        self.tuples, self.after = isinstance(out, tuple), []

    def _other(self, module: nn.Module, given: Any, out: Any) -> None:
        self.after.append(module)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As a cache that is empty."""
        self._kept[layer] = (keys.shape[1], max(keys.shape[3], values.shape[3]))
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        """Nothing is before."""
        return 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, count: Any, *_: Any) -> tuple[int, int]:
        """Two tokens, and the first of them."""
        return 2, 0


def epsilon_of(after: Sequence[nn.Module]) -> float:
    """Of the final norm."""
    found = (getattr(module, name, None) for module in after for name in ("variance_epsilon", "eps"))
    return next((epsilon for epsilon in found if epsilon is not None), 0.0)


def max_positions(config: Any) -> int:
    """As many as its rules for positions are the same in every pass."""
    limits = [getattr(config, "max_position_embeddings", None)]
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4's grows from here on; before it is 1
        limits.append(config.floor_scale - 1)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # one set of frequencies up to here, another beyond
        limits.append(rope.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=_UNBOUNDED)
