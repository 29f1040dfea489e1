"""int8 weights: near the exact product, whatever else is in the pass; and speculation on them is still lossless."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from selfspec.engine.torch.engine import TorchEngine
from selfspec.errors import ConfigError
from selfspec.model.linear import add_linear, linear, packed, plain, rounded
from selfspec.model.weights import Int8
from selfspec.types import Request

REQUESTS = [Request((5, 9, 12, 7, 20 + i), 24, ignore_eos=True) for i in range(5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_near_and_no_row_depends_on_another(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=random).to(dtype)
    x, residual, bias = (torch.randn(*size, generator=random).to(dtype) for size in ((9, 64), (9, 48), (48,)))
    small = rounded(packed(weight, own=True))
    assert small.values.dtype is torch.int8 and small.values.shape == (64, 48)
    found, exact = linear(x, small), x.float() @ weight.float().t()
    assert found.dtype is dtype
    assert float((found.float() - exact).norm() / exact.norm()) < 0.02
    assert torch.equal(torch.cat([linear(row, small) for row in x.split(1)]), found)
    assert torch.equal(linear(x, small, bias), found + bias)
    assert torch.equal(add_linear(residual, x, small), residual + found)
    assert float((plain(small) - weight.float()).abs().max()) <= float(small.scale.max()) / 2 + 1e-2 * (
        dtype.itemsize == 2
    )


def test_a_row_of_zeros_is_zero() -> None:
    small = rounded(torch.zeros(4, 8))
    assert torch.equal(linear(torch.zeros(1, 8), small), torch.zeros(1, 4))


def test_speculation_on_int8_weights_is_lossless(engine: Callable[..., TorchEngine]) -> None:
    made = engine("draft=layerskip", "engine.weights=int8", "engine.max_batch=4")
    spoken = [completion.tokens for completion in made.generate(REQUESTS)]
    assert spoken == [completion.tokens for completion in made.generate(REQUESTS, plain=True)]
    qkv = made.model.layers[0].qkv  # type: ignore[attr-defined]
    assert isinstance(qkv, Int8) or qkv.dtype is torch.int8


def test_it_is_another_model_and_says_so(engine: Callable[..., TorchEngine]) -> None:
    full, small = engine("draft=lsq"), engine("draft=lsq", "engine.weights=int8")
    assert full.plan.id != small.plan.id and full.plan.answers_id != small.plan.answers_id
    assert "int8" in small.plan.label and "int8" not in full.plan.label
    tie = small.ties.compare(REQUESTS[0].tokens, 5, 6)
    assert tie.gap != full.ties.compare(REQUESTS[0].tokens, 5, 6).gap


def test_only_our_own_layers_have_them(engine: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"engine\.weights=int8: only our own layers"):
        assert engine("engine.weights=int8", "engine.layers=hf", "draft=none").model
