"""Matrix products with weights laid out once as the CPU's kernel wants them.

In bf16 on a CPU, ``F.linear`` on a plain weight cannot use such a layout. One token's products with all of
SmolLM2-135M's weights take 23 ms that way, 14 ms laid out for oneDNN (through the operators that ``torch.compile``
emits), and 7 ms by our own kernel, which is what reading them takes (``tests/benchmarks/plain.py``).

Weights that a GGUF file packs can stay packed (``blocks.py``): a third of the bytes, the very same products.

Weights can be rounded to int8, too, with a scale for each output; activations then are, with a scale for each 32
inputs of a token, so that what it comes to does not depend on its neighbours in a pass (``docs/weights.md``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfspec.lazy import F, torch
from selfspec.model import blocks
from selfspec.model.kernels import native
from selfspec.model.kernels.native import INT8_GROUP
from selfspec.model.weights import Int8, Weight

if TYPE_CHECKING:
    from torch import Tensor


def rounded(weight: Weight) -> Int8:
    """A weight ``[out, in]`` in 8 bits, each output by the largest of its own."""
    exact = plain(weight).float()
    scale = exact.abs().amax(1).clamp(min=1e-9) / 127
    return Int8((exact / scale[:, None]).round().to(torch.int8).t(), scale)


def packed_int8(weight: Weight, own: bool) -> Weight:
    """A weight in 8 bits, for our own kernel where that is asked for and the weight's sizes suit it."""
    small = rounded(weight)
    tiles = native.tiled_int8(small.values.t(), small.scale) if own else None
    return small if tiles is None else tiles


def packed(weight: Weight, own: bool) -> Tensor:
    """A weight ``[out, in]`` in a kernel's layout; where there is none (other dtypes and devices), as it is.

    Args:
        own: our own kernel's, where the weight's sizes suit it, before oneDNN's.
    """
    if own and not isinstance(weight, Int8) and weight.dtype is torch.uint8 and len(weight) % 2 == 0:
        return native.in_huge_pages(weight)
    weight = plain(weight)
    if weight.dtype is not torch.bfloat16 or weight.device.type != "cpu":
        return weight
    tiles = native.tiled(weight) if own else None
    if tiles is not None or not torch._C._has_mkldnn:
        return weight if tiles is None else tiles
    # 1: of the batch sizes that oneDNN may lay a weight out for, the one of decoding.
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
    return laid_out


def plain(weight: Weight) -> Tensor:
    """A weight as ``[out, in]`` again."""
    if isinstance(weight, Int8):
        return (weight.values * weight.scale).t()
    if weight.dtype is torch.uint8:
        return blocks.values(weight)
    if weight.dim() > 2:
        return native.untiled(weight)
    return weight.to_dense() if weight.is_mkldnn else weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x W' + b: ``[N, in]`` -> ``[N, out]``, the weight packed, in 8 bits, or as it is."""
    if isinstance(weight, Int8):
        found = _int8(x, weight)
        return found if bias is None else found + bias
    if weight.dim() > 2:
        product: Tensor = torch.ops.selfspec.product(x, weight, bias, None)
        return product
    if weight.is_mkldnn:
        product = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def add_linear(residual: Tensor, x: Tensor, weight: Weight) -> Tensor:
    """r + x W', rounded once: ``[N, out]``."""
    if isinstance(weight, Int8):
        return residual + _int8(x, weight)
    if weight.dim() > 2:
        total: Tensor = torch.ops.selfspec.product(x, weight, None, residual)
        return total
    if weight.is_mkldnn:
        total = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, None, "add")
        return total
    return torch.addmm(residual, x, weight.t())


def _int8(x: Tensor, weight: Int8) -> Tensor:
    # By row: a scale for the whole pass would make a token depend on its neighbours in the batch.
    total = torch.zeros((), dtype=torch.float32)
    for inputs, values in zip(
        torch.split(x.float(), INT8_GROUP, 1), torch.split(weight.values, INT8_GROUP), strict=True
    ):
        scale = inputs.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
        total = total + torch._int_mm((inputs / scale).round_().to(torch.int8), values) * scale
    return (total * weight.scale).to(x.dtype)
