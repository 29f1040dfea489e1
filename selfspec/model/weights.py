"""What a decoder layer is made of, as our own layers and kernels hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


class Int8(NamedTuple):
    """A weight in 8 bits: ``values`` is ``[in, out]``, ``scale`` ``[out]`` in float32."""

    values: Tensor
    scale: Tensor


Weight: TypeAlias = "Tensor | Int8"


@dataclass(slots=True)
class Layer:
    """One decoder layer's weights, fused: ``[out, in]`` as stored, biases ``[out]`` where the model has them."""

    attention_norm: Tensor
    qkv: Weight
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Weight
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight
