"""Controllers: what they do by hand-made cycles, and on the fake engine how near they come to the best fixed choice."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from benchmarks import regret
from benchmarks.regret import ADAPTIVE, BANDIT, COST, ENVIRONMENTS, EXITS, Environment, Exits, fixed, rate, stream
from hydra.core.global_hydra import GlobalHydra

from selfspec.axes import CONTROLLER, GATE, ControllerOptions, GateOptions
from selfspec.engine.fake.session import World
from selfspec.speculation.controller import cost
from selfspec.speculation.controller.adaptive import PATIENCE, Adaptive
from selfspec.speculation.controller.autotune import Autotune
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.controller.cost import Costs
from selfspec.types import Cycle

REQUESTS = stream(24, 96)


@pytest.fixture(autouse=True)
def hydra() -> None:
    GlobalHydra.instance().clear()


def cycle(k: int, accepted: int, ms: float = 10.0, depth: int | None = None, batch: int = 1) -> Cycle:
    depth = k if depth is None else depth
    return Cycle(k, depth, depth, accepted, accepted + 1, (), 0.25 * ms, 0.75 * ms, batch)


def drive(controller: Controller, cycles: int, outcome: Callable[[int], Cycle], new_request: int = 10**9) -> list[int]:
    """The K asked for in so many cycles of one row; ``outcome`` makes a cycle of it."""
    history, asked = list[Cycle](), list[int]()
    for n in range(cycles):
        if n % new_request == 0:
            history = []
        asked.append(controller.num_draft_tokens(history, 1))
        history.append(outcome(asked[-1]))
        controller.observe([history[-1]])
    return asked


def through_json(controller: Controller, other: Controller) -> Controller:
    """The other one, with what the first has learned."""
    other.restore(json.loads(json.dumps(controller.state())))
    return other


@pytest.mark.parametrize("made", [fixed(3), ADAPTIVE, COST, CONTROLLER.new("autotune", K=3, exits=EXITS)])
def test_every_controller_is_made(made: ControllerOptions) -> None:
    controller = made.make(1)
    assert (controller.exit_layer(12) in EXITS) == (made.name == "autotune")
    assert all(0 <= k <= made.max_k for k in drive(controller, 50, lambda k: cycle(k, k)))
    assert through_json(controller, made.make(1)).state() == controller.state()


def test_fixed() -> None:
    assert drive(fixed(3).make(), 5, lambda k: cycle(k, 0)) == [3] * 5


def adaptive(**settings: float) -> Adaptive:
    made = {"k": 3, "low": 1, "high": 6, "step": 2, "window": 4, "target": 0.5} | settings
    return Adaptive(**made)  # type: ignore[arg-type]


def test_adaptive_climbs_where_the_acceptance_is_above_its_target() -> None:
    assert drive(adaptive(), 14, lambda k: cycle(k, k)) == [3] * 4 + [5] * 4 + [6] * 6


def test_adaptive_comes_down_where_it_is_below() -> None:
    assert drive(adaptive(), 14, lambda k: cycle(k, 0)) == [3] * 4 + [1] * 10


def test_adaptive_stays_at_its_target_and_where_nothing_is_drafted() -> None:
    assert drive(adaptive(k=4), 12, lambda k: cycle(k, 2)) == [4] * 12
    assert drive(adaptive(k=4), 12, lambda k: cycle(k, 0, depth=0)) == [4] * 12


def test_adaptive_counts_tokens_and_not_cycles() -> None:
    """Four of five drafts of one token stand, but none of the long one's: 4 of 11 tokens."""
    outcomes = iter([*[cycle(6, 1, depth=1)] * 3, cycle(6, 0, depth=6)])
    assert drive(adaptive(k=6), 4, lambda k: next(outcomes)) == [6] * 4
    made = adaptive(k=6)
    for one in [*[cycle(6, 1, depth=1)] * 3, cycle(6, 0, depth=6)]:
        made.observe([one])
    assert made.k == 4


def test_a_window_is_so_many_cycles_of_any_row() -> None:
    made = adaptive()
    made.observe([cycle(3, 3)] * 4)
    assert made.k == 5


def test_adaptive_tries_again_ever_more_seldom() -> None:
    asked = drive(adaptive(k=2, low=0), 4 * 400, lambda k: cycle(k, 0))
    tries = [n for n in range(4, len(asked), 4) if asked[n]]
    assert tries[:5] == [4 * n for n in (3, 8, 17, 34, 67)] and asked[12:16] == [2] * 4
    assert {b - a for a, b in pairwise(tries[5:])} == {4 * (PATIENCE + 1)}
    made = adaptive(k=2, low=0)
    drive(made, 200, lambda k: cycle(k, 0))
    asked = drive(made, 400, lambda k: cycle(k, k))
    assert asked[-1] == 6 and asked[-200] == 6, "and comes back where it pays"
    assert any(drive(made, 40, lambda k: cycle(k, 0))[20:]), "and then tries soon again"


def test_adaptive_goes_on_where_it_was() -> None:
    one = adaptive(low=0)
    drive(one, 6, lambda k: cycle(k, 0))
    other = through_json(one, adaptive(low=0))
    assert drive(one, 300, lambda k: cycle(k, k // 2 + 1)) == drive(other, 300, lambda k: cycle(k, k // 2 + 1))


def test_acceptance_by_position_by_hand() -> None:
    """A position is tried where it was asked for and all before it stood; what was not asked for did not fail."""
    counts = cost._counts([cycle(2, 2), cycle(3, 2), cycle(3, 0), cycle(1, 1), cycle(3, 3), cycle(0, 0)], 3)
    assert cost._stood(counts) == ([4, 3, 1], [5, 3, 2])


def measured(costs: Costs, batch: int, by_k: dict[int, float], times: int = 5) -> Costs:
    for _ in range(times):
        for k, ms in by_k.items():
            costs.observe(batch, k, ms)
    return costs


def test_both_ends_are_measured_first() -> None:
    costs, asked = Costs(4, 8), list[int]()
    while (k := costs.unknown(1)) is not None:
        asked.append(k)
        costs.observe(1, k, 10 + k)
    assert asked == [0, 4] * cost.KNOWN and costs.unknown(7) == 0


def test_costs_between_are_interpolated_and_never_fall() -> None:
    costs = measured(Costs(4, 8), 1, {0: 10, 4: 18})
    assert costs.curve(1).tolist() == pytest.approx([10, 12, 14, 16, 18])
    measured(costs, 1, {2: 17})
    assert (costs.curve(1) / costs.pace).tolist() == pytest.approx([10, 13.5, 17, 17.5, 18], rel=0.02)
    measured(costs, 1, {1: 5}, times=8)
    assert (np.diff(costs.curve(1)) >= 0).all()


def test_a_stall_hardly_counts() -> None:
    costs = measured(Costs(1, 10), 1, {0: 10, 1: 12}, times=7)
    costs.observe(1, 0, 900)
    assert costs.curve(1).tolist() == pytest.approx([11.25, 12])


def test_a_mixture_counts_for_what_it_is() -> None:
    """A lookup finds something three times in ten."""
    costs = Costs(1, 10)
    for n in range(10):
        costs.observe(1, 0, 10)
        costs.observe(1, 1, 15 if n % 3 == 2 else 10)
    assert costs.curve(1).tolist() == pytest.approx([10, 11.5])


def test_another_batch_size_has_the_nearest_ones_shape() -> None:
    costs = measured(Costs(4, 8), 1, {0: 10, 4: 18})
    measured(costs, 8, {0: 20, 4: 60})
    measured(costs, 7, {0: 10})
    assert costs.unknown(7) is None
    measured(costs, 2, {0: 20})
    assert (costs.curve(7) / costs.curve(8)).tolist() == pytest.approx([0.5] * 5)
    assert (costs.curve(2) / costs.curve(1)).tolist() == pytest.approx([2] * 5)
    measured(costs, 7, {4: 40})
    assert (costs.curve(7)[[0, 2, 4]]).tolist() == pytest.approx([10, 25, 40])


def test_a_slow_machine_is_slow_at_every_k() -> None:
    costs = measured(Costs(4, 32), 1, {0: 10, 4: 18}, times=32)
    shape = costs.curve(1) / costs.curve(1)[0]
    for _ in range(60):
        costs.observe(1, 0, 20)
    assert costs.curve(1)[0] == pytest.approx(20, rel=0.05)
    assert (costs.curve(1) / costs.curve(1)[0]).tolist() == pytest.approx(shape.tolist(), rel=0.05)


def ms_of(step: float) -> Callable[[int], float]:
    return lambda k: 10 + step * k


def even(chance: int, ms: Callable[[int], float]) -> Callable[[int], Cycle]:
    """Every ``chance``-th cycle all that is asked for stands, else nothing."""
    count = iter(range(10**9))
    return lambda k: cycle(k, k if next(count) % chance == 0 else 0, ms(k))


@pytest.mark.parametrize(
    ("chance", "step", "wanted"),
    [(1, 1.0, 8), (1, 12.0, 0), (2, 0.5, 8), (10**9, 0.5, 0)],
    ids=["all stand", "all stand and do not pay", "half of the drafts stand", "none stand"],
)
def test_cost_asks_for_what_pays(chance: int, step: float, wanted: int) -> None:
    asked = drive(COST.make(), 600, even(chance, ms_of(step)))
    assert asked[300:].count(wanted) > 270


def test_cost_finds_a_k_between() -> None:
    """Two tokens stand always, never three."""
    asked = drive(COST.make(), 600, lambda k: cycle(k, min(k, 2), 10 + k))
    assert asked[300:].count(2) > 270


def test_what_trying_costs_is_bounded() -> None:
    asked = drive(COST.make(), 4000, lambda k: cycle(k, 0, 10 + 10 * k))
    spent = sum(10 + 10 * k for k in asked[100:])
    assert 0 < spent / (10 * len(asked[100:])) - 1 < 1.5 * cost.SHARE
    assert any(asked[100:]), "it looks again, though"


def test_plain_decoding_is_timed_even_where_drafting_pays() -> None:
    asked = drive(COST.make(), 2000, lambda k: cycle(k, k, 10 + k))
    assert 5 < asked[500:].count(0) < 100


def test_cost_notices_that_drafting_pays_again() -> None:
    made = COST.make()
    assert drive(made, 1000, lambda k: cycle(k, 0, 10 + k), 100)[-50:].count(0) > 45
    assert drive(made, 1500, lambda k: cycle(k, k, 10 + k), 100)[-50:].count(8) > 40


def test_a_request_alone_is_judged_by_its_own_drafts() -> None:
    made = COST.make()
    asked = list[int]()
    for n in range(40):
        asked = drive(made, 60, lambda k, good=n % 2: cycle(k, k * good, 10 + 2 * k))  # type: ignore[misc]
        if n >= 20:
            assert (np.mean(asked[30:]) > 6) == bool(n % 2)


def test_the_rows_of_a_batch_are_asked_alike() -> None:
    made, other = COST.make(), COST.make()
    good, bad = [cycle(8, 8, 14)] * 50, [cycle(8, 0, 14)] * 50
    for _ in range(400):
        k = made.num_draft_tokens(good, 2)
        assert made.num_draft_tokens(bad, 2) == k == other.num_draft_tokens(bad, 2)
        for one in (made, other):
            one.observe([cycle(k, k, 10 + 3 * k, batch=2), cycle(k, 0, 10 + 3 * k, batch=2)])


def test_k_by_batch_size() -> None:
    """Drafting pays for one row and not for eight."""
    made, asked = COST.make(), {1: list[int](), 8: list[int]()}
    for n in range(1600):
        batch = 8 if n // 40 % 2 else 1
        k = made.num_draft_tokens([], batch)
        asked[batch].append(k)
        made.observe([cycle(k, k, 10 + k * (0.5 if batch == 1 else 12), batch=batch)] * batch)
    assert asked[1][-200:].count(8) > 150 and asked[8][-200:].count(0) > 150


def test_cost_goes_on_where_it_was() -> None:
    outcome: Callable[[int], Cycle] = lambda k: cycle(k, min(k, 3), 10 + 1.5 * k)  # noqa: E731
    one = COST.make()
    drive(one, 300, outcome)
    other = through_json(one, COST.make())
    assert drive(one, 300, outcome) == drive(other, 300, outcome) != drive(COST.make(), 300, outcome)


def autotuned(requests: Sequence[int], outcome: Callable[[int, int], Cycle]) -> list[int]:
    """The layers of requests of so many prompt tokens, the cycles of which are ``outcome(prompt_tokens, layer)``."""
    made, layers = Autotune(4, [6, 12], seed=0), list[int]()
    for n, prompt in enumerate(requests):
        layer = made.exit_layer(prompt)
        assert layer is not None
        layers.append(layer)
        for _ in range(10):
            made.observe([outcome(prompt, layer)])
        if n % 20 == 10:
            made = through_json(made, Autotune(4, [6, 12], seed=0))  # type: ignore[assignment]
    return layers


def test_autotune_learns_a_layer_for_each_length_of_prompt() -> None:
    prompts = [20, 400] * 100
    layers = autotuned(prompts, lambda prompt, layer: cycle(4, 1, 10 if (layer == 6) == (prompt == 20) else 14))
    assert {*layers[:20:2]} == {*layers[1:20:2]} == {6, 12}
    assert layers[100::2].count(6) > 40 and layers[101::2].count(12) > 40


def test_prompts_of_about_one_length_are_of_a_kind() -> None:
    """Otherwise nothing would ever be learned: hardly two prompts are equally long."""
    layers = autotuned([*range(64, 128)] * 2, lambda prompt, layer: cycle(4, 2 if layer == 12 else 1, 10))
    assert layers[64:].count(12) > 55


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "adaptive", "by_cost", "bandit"),
    [
        ("high", 0.10, 0.05, 0.05),
        ("middling", 0.20, 0.07, 0.07),
        ("low", 0.03, 0.03, 0.05),
        ("useless", 0.16, 0.03, 0.03),
        ("dear", 0.10, 0.03, 0.05),
        ("drifting", 0.05, -0.05, 0.10),
        ("mixture", 0.10, 0.0, 0.05),
        ("noisy", 0.20, 0.08, 0.10),
        ("batch 8", 0.15, 0.08, 0.10),
    ],
)
def test_regret(name: str, adaptive: float, by_cost: float, bandit: float) -> None:
    """Against the best fixed K, and the best fixed arm at the largest K; negative is better than any of them."""
    environment = ENVIRONMENTS[name]
    best = max(rate(environment, REQUESTS, fixed(k)) for k in (0, 1, 2, 3, 6))
    assert 1 - rate(environment, REQUESTS, ADAPTIVE) / best < adaptive
    assert 1 - rate(environment, REQUESTS, COST) / best < by_cost
    arms = [GATE.new("maxp", threshold=arm) for arm in regret.ARMS]
    best = max(rate(environment, REQUESTS, fixed(8), arm) for arm in arms)
    assert 1 - rate(environment, REQUESTS, fixed(8), BANDIT) / best < bandit


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("gate", [GATE.new("none"), BANDIT], ids=["ungated", "bandit"])
@pytest.mark.parametrize(("acceptance", "draft_ms"), [(0.0, 0.5), (0.0, 9.0), (0.3, 3.0), (0.6, 9.0)])
def test_cost_is_never_slower_than_plain(acceptance: float, draft_ms: float, gate: GateOptions, batch: int) -> None:
    environment = Environment(World(acceptance, draft_ms), batch)
    requests = stream(16 * batch, 96)
    warm = replace(COST, K=4)
    assert rate(environment, requests, warm, gate) > 0.97 * rate(environment, requests, fixed(0))


@pytest.mark.slow
def test_autotune_beats_every_fixed_layer() -> None:
    requests, environment = stream(240, 32), Environment(Exits(0.0))
    best = max(rate(environment, requests, regret.autotune(layer)) for layer in EXITS)
    assert rate(environment, requests, regret.autotune(*EXITS)) > 1.02 * best
