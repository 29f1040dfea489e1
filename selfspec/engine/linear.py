"""Matrix products with weights laid out once as the CPU's kernel wants them.

In bf16 on a CPU, ``F.linear`` on a plain weight cannot use such a layout. One token's products with all of
SmolLM2-135M's weights take 20 ms that way, 17 ms laid out for oneDNN (through the operators that ``torch.compile``
emits), and 10 ms by our own kernel, which is what reading them takes (``tests/benchmarks/plain.py``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from selfspec.engine.kernels import native


def packed(weight: Tensor, own: bool) -> Tensor:
    """A weight ``[out, in]`` in a kernel's layout; where there is none (other dtypes and devices), as it is.

    Args:
        own: our own kernel's, where the weight's sizes suit it, before oneDNN's.
    """
    if weight.dtype is not torch.bfloat16 or weight.device.type != "cpu":
        return weight
    tiles = native.tiled(weight) if own else None
    if tiles is not None or not torch._C._has_mkldnn:
        return weight if tiles is None else tiles
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
    return laid_out


def plain(weight: Tensor) -> Tensor:
    """A weight as ``[out, in]`` again."""
    if weight.dim() == 4:
        return native.untiled(weight)
    return weight.to_dense() if weight.is_mkldnn else weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b: ``[N, in]`` -> ``[N, out]``, the weight packed or not."""
    if weight.dim() == 4:
        product: Tensor = torch.ops.selfspec.product(x, weight, bias, None)
        return product
    if weight.is_mkldnn:
        product = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def add_linear(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """r + x W', rounded once: ``[N, out]``."""
    if weight.dim() == 4:
        total: Tensor = torch.ops.selfspec.product(x, weight, None, residual)
        return total
    if weight.is_mkldnn:
        total = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, None, "add")
        return total
    return torch.addmm(residual, x, weight.t())
