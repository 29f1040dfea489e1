"""Matrix products with weights laid out once as the CPU's kernel wants them.

In bf16 on a CPU, ``F.linear`` on a plain weight cannot use that layout: one token's products with all of SmolLM2-135M's
weights take 18.5 ms that way and 13.2 ms packed (``tests/benchmarks/plain.py``). Packing is oneDNN's, through the
operators that ``torch.compile`` emits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def packed(weight: Tensor) -> Tensor:
    """A weight ``[out, in]`` in the kernel's own layout; where there is none (other dtypes and devices), as it is."""
    if weight.dtype is not torch.bfloat16 or weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return weight
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
    return laid_out


def plain(weight: Tensor) -> Tensor:
    """A weight as ``[out, in]`` again."""
    return weight.to_dense() if weight.is_mkldnn else weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b: ``[N, in]`` -> ``[N, out]``, the weight packed or not."""
    if weight.is_mkldnn:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def add_linear(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """r + x W', rounded once: ``[N, out]``."""
    if weight.is_mkldnn:
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, None, "add")
        return total
    return torch.addmm(residual, x, weight.t())
