"""gate: three signals against their definitions in float64, and which side of a threshold stops."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from selfspec.config import Gate as GateConfig
from selfspec.config import GateName
from selfspec.engine.gate import entropy, make, max_prob, var_entropy

Signal = Callable[[Tensor], float]


def definition(signal: Signal, logits: Tensor) -> float:
    p = torch.softmax(logits.double(), -1)
    h = -torch.xlogy(p, p).sum()
    var = (torch.xlogy(p, p) * p.clamp_min(1e-300).log()).sum() - h**2
    return float(p.max() if signal is max_prob else h if signal is entropy else var)


def random(vocab: int, spread: float, seed: int = 0) -> Tensor:
    return spread * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


SIGNALS = pytest.mark.parametrize("signal", [max_prob, entropy, var_entropy])


@SIGNALS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("vocab", [2, 50_000])
def test_signals(signal: Signal, vocab: int, spread: float, dtype: torch.dtype) -> None:
    logits = (random(vocab, spread) - 20).to(dtype)
    rounding = 5e-3 if signal is var_entropy else 1e-5  # the former is a difference of squares
    assert signal(logits) == pytest.approx(definition(signal, logits), rel=1e-4, abs=rounding)


def test_one_of_three_by_hand() -> None:
    logits = torch.tensor([0.5, 0.25, 0.25]).log() + 7
    assert max_prob(logits) == pytest.approx(0.5)
    assert entropy(logits) == pytest.approx(1.5 * math.log(2))
    assert var_entropy(logits) == pytest.approx((0.5 * 1 + 0.5 * 4 - 1.5**2) * math.log(2) ** 2)


@pytest.mark.parametrize("gap", [200.0, 3e4])
def test_a_certain_distribution(gap: float) -> None:
    logits = torch.zeros(1000)
    logits[17] = gap
    assert (max_prob(logits), entropy(logits), var_entropy(logits)) == (1, 0, 0)


@pytest.mark.parametrize("vocab", [2, 1000, 49_152])
def test_a_uniform_distribution(vocab: int) -> None:
    logits = torch.full((vocab,), -3.0)
    assert max_prob(logits) == pytest.approx(1 / vocab, rel=1e-4)
    assert entropy(logits) == pytest.approx(math.log(vocab), rel=1e-4)
    assert 0 <= var_entropy(logits) < 2e-3


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        (GateName.maxp, (True, False, False)),
        (GateName.entropy, (False, False, True)),
        (GateName.varH, (False, False, True)),
    ],
)
def test_thresholds(name: GateName, stops: tuple[bool, ...]) -> None:
    """Below, at and above: what is as sure as the threshold asks is proposed."""
    gate = make(GateConfig(name, 0.4))
    assert tuple(gate.stops(value) for value in (0.39, 0.4, 0.41)) == stops


@pytest.mark.parametrize(
    ("name", "signal"), [(GateName.maxp, max_prob), (GateName.entropy, entropy), (GateName.varH, var_entropy)]
)
def test_a_gate_reads_its_own_signal(name: GateName, signal: Signal) -> None:
    made = make(GateConfig(name, 0.4)).signal
    assert made is not None and made(random(50, 3)) == signal(random(50, 3))


def test_none_never_stops() -> None:
    gate = make(GateConfig())
    assert gate.signal is None
    assert not any(gate.stops(value) for value in (-math.inf, 0.0, math.inf, math.nan))
