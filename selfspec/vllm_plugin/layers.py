"""The target's first layers and its readout, as vLLM has them.

vLLM splits a model over machines by giving each a stretch of its layers, ``start_layer`` to ``end_layer``. An early
exit is such a stretch: a second view of the same modules (weights, attention, KV cache) that ends early, run by the
model's own ``forward``. So whatever a family does around its layers is done here too.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfspec.errors import ConfigError

FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""Architectures that tests have run: ``forward`` walks ``layers`` from ``start_layer`` to ``end_layer``, then norms."""


class Unnormed(nn.Module):
    """In the place of a model's final norm: the residual stream as it is."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        """Like vLLM's norms: with what is still to be added, the sum and whatever."""
        return hidden if residual is None else (hidden + residual, residual)


class FirstLayers:
    """The target up to an exit: int64 tokens and positions ``[n]`` -> the residual stream ``[n, D]``.

    Runs under vLLM's forward context, and writes its layers' keys and values to the slots given there.

    Args:
        model: a model of vLLM's, whole on this rank.
        exit_layer: how many layers are run.

    Raises:
        ConfigError: the model's family is not known, or has no such layer.
    """

    def __init__(self, model: nn.Module, exit_layer: int) -> None:
        name = type(model).__name__
        if name not in FAMILIES:
            raise ConfigError(f"model={name}: early exit inside vLLM knows the families {', '.join(FAMILIES)}")
        whole: Any = model.model
        if not 1 <= exit_layer <= len(whole.layers):
            raise ConfigError(f"selfspec.exit_layer={exit_layer}: must be from 1 to {len(whole.layers)}")
        body = copy.copy(whole)
        body._modules = {**whole._modules, "norm": Unnormed()}  # a shallow copy would share the dictionary
        body.end_layer = exit_layer
        self.size: int = whole.norm.weight.shape[-1]
        self._run = body.forward  # not `body(...)`: a compiled model would run all of its layers

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """``[n]``, ``[n]`` -> ``[n, D]``."""
        hidden: Tensor = self._run(tokens, positions, None)
        return hidden

    def compile(self, options: dict[str, Any]) -> None:
        """Compiles the stretch, as vLLM does the whole: once, for any number of rows, no guards.

        Args:
            options: inductor's.
        """
        self._run = torch.compile(
            self._run,
            fullgraph=True,
            dynamic=False,
            options={**options, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )


class Readout:
    """Normed states -> logits, through the target's head or its rows of frequent tokens.

    Args:
        ids: int64 ``[V]``, the draft's vocabulary; ``None``: the model's own.

    Raises:
        ConfigError: the head has no plain rows to choose from.
    """

    def __init__(self, model: Any, ids: Tensor | None, ranks: int) -> None:
        self.ids = ids
        self._whole = model.compute_logits
        if ids is not None:
            weight, scale = getattr(model.lm_head, "weight", None), model.logits_processor.scale
            if ranks > 1 or scale != 1.0 or weight is None or not weight.is_floating_point():
                raise ConfigError(
                    "selfspec.head: has a vocabulary of its own, and this model's head no rows to choose from"
                )
            self._rows = weight.data[ids]

    def __call__(self, states: Tensor) -> Tensor:
        """``[n, D]`` -> ``[n, V]``."""
        logits: Tensor = self._whole(states) if self.ids is None else F.linear(states, self._rows)
        return logits

    def likeliest(self, logits: Tensor) -> Tensor:
        """The best token id of each row of ``[n, V]``."""
        best = logits.argmax(-1)
        return best if self.ids is None else self.ids[best]
