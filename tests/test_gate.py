"""gate: three signals against their definitions in float64, which side of a threshold stops, what a bandit learns."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from selfspec.axes import GATE, GateOptions
from selfspec.speculation.bandit import Arms
from selfspec.speculation.gate.bandit import Bandit
from selfspec.speculation.gate.base import Gate, Threshold
from selfspec.speculation.gate.entropy import entropy
from selfspec.speculation.gate.maxp import max_prob
from selfspec.speculation.gate.varH import var_entropy
from selfspec.types import Cycle

Signal = Callable[[Tensor], Tensor]


def definition(signal: Signal, logits: Tensor) -> float:
    """Of one row."""
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
    rows = torch.stack([(random(vocab, spread, seed) - 20).to(dtype) for seed in range(3)])
    rounding = 5e-3 if signal is var_entropy else 1e-5  # the former is a difference of squares
    expected = [definition(signal, row) for row in rows]
    assert signal(rows).tolist() == pytest.approx(expected, rel=1e-4, abs=rounding)


def test_one_of_three_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log() + 7
    assert max_prob(logits).item() == pytest.approx(0.5)
    assert entropy(logits).item() == pytest.approx(1.5 * math.log(2))
    assert var_entropy(logits).item() == pytest.approx((0.5 * 1 + 0.5 * 4 - 1.5**2) * math.log(2) ** 2)


@pytest.mark.parametrize("gap", [200.0, 3e4])
def test_a_certain_distribution(gap: float) -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 17] = gap
    assert [signal(logits).tolist() for signal in (max_prob, entropy, var_entropy)] == [[1], [0], [0]]


@pytest.mark.parametrize("vocab", [2, 1000, 49_152])
def test_a_uniform_distribution(vocab: int) -> None:
    logits = torch.full((1, vocab), -3.0)
    assert max_prob(logits).item() == pytest.approx(1 / vocab, rel=1e-4)
    assert entropy(logits).item() == pytest.approx(math.log(vocab), rel=1e-4)
    assert 0 <= var_entropy(logits).item() < 2e-3


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("maxp", (True, False, False)),
        ("entropy", (False, False, True)),
        ("varH", (False, False, True)),
    ],
)
def test_thresholds(name: str, stops: tuple[bool, ...]) -> None:
    """Below, at and above: what is as sure as the threshold asks is proposed."""
    gate = GATE.new(name, threshold=0.4).make()
    assert tuple(gate.stops(value) for value in (0.39, 0.4, 0.41)) == stops


@pytest.mark.parametrize(
    ("gate", "signal"),
    [
        (GATE.new("maxp", threshold=0.4), max_prob),
        (GATE.new("entropy", threshold=0.4), entropy),
        (GATE.new("varH", threshold=0.4), var_entropy),
        (GATE.new("bandit", arms=[0.4]), max_prob),
    ],
)
def test_a_gate_reads_its_own_signal(gate: GateOptions, signal: Signal) -> None:
    made, rows = gate.make(), torch.stack([random(50, 3, seed) for seed in range(4)])
    assert made.reads and made.signal(rows).tolist() == signal(rows).tolist()


def test_none_never_stops() -> None:
    gate = GATE.new("none").make()
    assert type(gate) is Gate and not gate.reads and gate.signal(torch.zeros(2, 5)).tolist() == []
    assert not any(gate.stops(value) for value in (-math.inf, 0.0, math.inf, math.nan))


def cycle(new_tokens: int, ms: float, signals: tuple[float, ...] = (0.5,)) -> Cycle:
    return Cycle(4, len(signals), len(signals), new_tokens - 1, new_tokens, signals, 0.25 * ms, 0.75 * ms)


def bandit(seed: int = 0) -> Bandit:
    made = GATE.new("bandit", arms=[0.2, 0.5, 0.8]).make(seed)
    assert isinstance(made, Bandit)
    return made


def play(gate: Bandit, cycles: int, pays: Callable[[float, int], Cycle]) -> list[float]:
    """The thresholds of so many cycles; ``pays`` says what comes of the nth one."""
    thresholds = []
    for n in range(cycles):
        gate.begin()
        gate.observe([pays(gate.threshold, n)])
        thresholds.append(gate.threshold)
    return thresholds


def test_the_bandit_stops_by_the_arm_of_the_cycle() -> None:
    gate = bandit()
    for threshold in play(gate, 20, lambda threshold, n: cycle(1, 10)):
        gate.threshold = threshold
        assert gate.stops(threshold - 0.01) and not gate.stops(threshold)
    assert isinstance(gate, Threshold)


def test_the_bandit_finds_the_arm_with_the_most_tokens_a_second() -> None:
    """Tokens drawn from 1 to 5: the arms differ by a fifth in what they cost."""
    ms = {0.2: 12.0, 0.5: 10.0, 0.8: 12.0}
    chosen = play(bandit(), 3000, lambda arm, n: cycle(1 + hash((n, arm)) % 5, ms[arm]))
    assert chosen[1500:].count(0.5) > 0.9 * 1500 and {*chosen} == {*ms}


def test_a_rate_is_a_ratio_of_means() -> None:
    """The mean of ratios would be 0.56 tokens a millisecond of the first arm, and 0.25 of the second."""
    chosen = play(bandit(), 2000, lambda arm, n: cycle(1, [1, 9][n % 2] if arm == 0.2 else 4 if arm == 0.5 else 8))
    assert chosen[1000:].count(0.5) > 900


def test_the_bandit_follows_a_change() -> None:
    gate = bandit()
    play(gate, 6000, lambda arm, n: cycle(1 + hash((n, arm)) % 5, 10 if arm == 0.2 else 15))
    chosen = play(gate, 4000, lambda arm, n: cycle(1 + hash((n, arm)) % 5, 10 if arm == 0.8 else 15))
    assert chosen[-500:].count(0.8) > 450
    for plays in gate.state()["plays"]:
        assert 0 < plays < 2000
    assert sum(gate.state()["plays"]) == pytest.approx(2000, rel=0.01), "what is older is forgotten"


def test_one_stall_of_the_machine_condemns_no_arm() -> None:
    gate = bandit()
    ms = {0.2: 15.0, 0.5: 10.0, 0.8: 15.0}
    play(gate, 300, lambda arm, n: cycle(3, ms[arm]))
    gate.begin()
    assert gate.threshold == 0.5
    gate.observe([cycle(3, 10_000)])
    assert play(gate, 100, lambda arm, n: cycle(3, ms[arm])).count(0.5) > 90


def test_rewards_of_a_batch_are_those_of_all_its_rows() -> None:
    one, all_rows = bandit(), bandit()
    for gate, rows in ((one, [cycle(6, 10)]), (all_rows, [cycle(1, 10), cycle(2, 10), cycle(3, 10)])):
        gate.begin()
        gate.observe(rows)
    assert one.state() == all_rows.state() and sum(one.state()["gained"]) == 6 and sum(one.state()["spent"]) == 10


def test_a_cycle_in_which_nothing_was_looked_at_pays_no_arm() -> None:
    gate = bandit()
    before = gate.state()
    play(gate, 5, lambda arm, n: cycle(1, 10, signals=()))
    assert gate.state() == before
    gate.observe([cycle(1, 10, signals=()), cycle(1, 10)])
    assert gate.state() != before, "one of its rows was"


def test_the_bandit_goes_on_where_it_was() -> None:
    pays = lambda arm, n: cycle(1 + n % 3, 10 + 10 * arm)  # noqa: E731
    gate, resumed = bandit(), bandit()
    play(gate, 50, pays)
    resumed.restore(json.loads(json.dumps(gate.state())))
    assert play(gate, 200, pays) == play(resumed, 200, pays)


def test_chance_is_the_seeds() -> None:
    runs = [play(bandit(seed), 100, lambda arm, n: cycle(1 + n % 3, 10)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_nothing_is_drawn_anew_until_something_was_seen() -> None:
    arms = Arms(50, 100, seed=3)
    assert len({arms.choose() for _ in range(10)}) == 1
    arms.observe(0, 1, 1)
    arms.observe(1, 1, 1.5)
    assert len({arms.choose() for _ in range(10)}) == 1
