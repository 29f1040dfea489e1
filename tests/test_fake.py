"""The fake engine: the text is the same however it is decoded, and costs and acceptance are those it was told."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from benchmarks.regret import ARMS, COST, fixed, number, stream
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from selfspec import plan
from selfspec.axes import CONTROLLER, GATE
from selfspec.engine.base import Engine
from selfspec.engine.fake.engine import FakeEngine
from selfspec.engine.fake.session import World, growth
from selfspec.plan import Plan
from selfspec.run import CONF
from selfspec.types import Completion, Cycle, Request

REQUESTS = stream(8, 60)
GATES = {
    "none": GATE.new("none"),
    "maxp": GATE.new("maxp", threshold=0.5),
    "entropy": GATE.new("entropy", threshold=2.0),
    "varH": GATE.new("varH", threshold=4.0),
    "bandit": GATE.new("bandit", arms=ARMS),
}
CONTROLLERS = {
    "fixed": fixed(4),
    "adaptive": CONTROLLER.new("adaptive", K=4, low=0, high=8, step=1, window=4, target=0.5),
    "cost": COST,
    "autotune": CONTROLLER.new("autotune", K=4, exits=[2, 4]),
}


@pytest.fixture(scope="module")
def blank() -> Plan:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plan.make(compose("config", ["engine=fake", "draft=layerskip", "exit_layer=3"]))


def cycles(done: list[Completion]) -> list[Cycle]:
    return [cycle for completion in done for cycle in completion.cycles]


def test_plain_decoding_is_a_pass_a_token(blank: Plan) -> None:
    engine: Engine = FakeEngine(blank)
    (done,) = engine.generate(REQUESTS[:1], plain=True)
    assert done.ttft_s == pytest.approx(0.01) and done.total_s == pytest.approx(0.01 * 60)
    assert {*done.cycles} == {Cycle(0, 0, 0, 0, 1, (), 0.0, 10.0)} and len(done.cycles) == 59
    assert FakeEngine(blank).generate(REQUESTS[:1], plain=True) == [done]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_no_gate_controller_or_batch_changes_the_text(blank: Plan, gate: str, controller: str) -> None:
    made = replace(blank, gate=GATES[gate], controller=CONTROLLERS[controller])
    plain = [done.tokens for done in FakeEngine(blank).generate(REQUESTS, plain=True)]
    assert len({*plain}) == len(REQUESTS)
    for batch in (1, 3):
        done = FakeEngine(made).generate(REQUESTS, max_batch=batch)
        assert [completion.tokens for completion in done] == plain
        assert any(cycle.k_asked for cycle in cycles(done))
        assert [1 + sum(cycle.new_tokens for cycle in completion.cycles) for completion in done] == [60] * 8
        assert all(cycle.proposed <= cycle.k_asked and cycle.batch <= batch for cycle in cycles(done))


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
def test_the_acceptance_asked_for(blank: Plan, acceptance: float) -> None:
    made = replace(blank, controller=fixed(3), engine=replace(blank.engine, acceptance=acceptance))
    seen = [cycle for cycle in cycles(FakeEngine(made).generate(stream(40, 100))) if cycle.k_asked == 3]
    for j in (1, 2, 3):
        reached = [cycle for cycle in seen if cycle.accepted >= j - 1]
        if reached:
            assert sum(cycle.accepted >= j for cycle in reached) / len(reached) == pytest.approx(acceptance, abs=0.05)


def test_the_draft_knows_how_sure_to_be(blank: Plan) -> None:
    """Of the tokens that a threshold lets through, so many stand as their mean probability says."""
    made = replace(blank, controller=fixed(1), gate=GATE.new("maxp", threshold=0.0))
    looked = [c for c in cycles(FakeEngine(made, World(0.5)).generate(stream(40, 100))) if c.k_asked]
    for low, high in ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0)):
        within = [c for c in looked if low <= c.signals[0] < high]
        right = sum(c.accepted for c in within) / len(within)
        assert right == pytest.approx(sum(c.signals[0] for c in within) / len(within), abs=0.05)


@pytest.mark.parametrize("gate", ["maxp", "entropy", "varH"])
def test_gates_stop_what_they_doubt(blank: Plan, gate: str) -> None:
    made = replace(blank, gate=GATES[gate], controller=fixed(4), engine=replace(blank.engine, acceptance=0.6))
    seen = cycles(FakeEngine(made).generate(REQUESTS))
    threshold = GATES[gate].threshold or 0.0
    for cycle in seen:
        doubted = [signal < threshold if gate == "maxp" else signal > threshold for signal in cycle.signals]
        assert doubted == [False] * cycle.proposed + [True] * (cycle.proposed < cycle.k_asked)
    assert len({cycle.proposed for cycle in seen}) == 5
    if gate != "varH":  # of which little is left where all tokens are alike
        kept = sum(c.accepted for c in seen) / sum(c.proposed for c in seen)
        ungated = cycles(FakeEngine(replace(made, gate=GATES["none"])).generate(REQUESTS))
        assert kept > 0.1 + sum(c.accepted for c in ungated) / sum(c.proposed for c in ungated)


def test_what_a_cycle_costs(blank: Plan) -> None:
    """Draft steps for all rows, the doubted ones too, and one pass over all that is proposed."""
    made = replace(blank, gate=GATES["maxp"], controller=fixed(4))
    done = FakeEngine(made, World(0.6, draft_ms=2.0)).generate(REQUESTS[:3], max_batch=3)
    for first in zip(*(completion.cycles[:5] for completion in done), strict=True):
        steps = max(len(cycle.signals) for cycle in first)
        tokens = sum(cycle.proposed + 1 for cycle in first)
        assert len({(cycle.draft_ms, cycle.verify_ms) for cycle in first}) == 1
        assert first[0].draft_ms == pytest.approx(steps * 2.0 * growth(3))
        assert first[0].verify_ms == pytest.approx(10 * growth(tokens))
        assert {cycle.batch for cycle in first} == {3}


def test_a_pass_grows_as_measured() -> None:
    assert [round(growth(n), 2) for n in (1, 4, 8, 16)] == [1.0, 1.01, 1.06, 1.28]
    assert growth(17) - growth(16) == pytest.approx(growth(60) - growth(59)) == pytest.approx(0.0375)


def test_a_batch_is_filled_as_rows_finish(blank: Plan) -> None:
    requests = [replace(request, max_new_tokens=n) for request, n in zip(REQUESTS, (10, 40, 25, 5), strict=False)]
    done = FakeEngine(blank).generate(requests, plain=True, max_batch=2)
    assert [len(completion.tokens) for completion in done] == [10, 40, 25, 5]
    assert done[0].ttft_s < done[1].ttft_s < done[0].total_s < done[2].ttft_s < done[2].total_s < done[3].ttft_s
    assert done[3].total_s < done[1].total_s and {c.batch for c in done[0].cycles + done[2].cycles} == {2}


def test_a_fixed_k_in_the_place_of_the_controller(blank: Plan) -> None:
    engine = FakeEngine(replace(blank, controller=COST))
    before = engine.state()
    asked = [cycle.k_asked for cycle in engine.generate(REQUESTS[:1], k=3)[0].cycles]
    assert {*asked[:-3]} == {3} and engine.state() == before


def test_one_token_needs_no_cycle(blank: Plan) -> None:
    (done,) = FakeEngine(blank).generate([Request((1, 2), 1)])
    assert (len(done.tokens), done.cycles) == (1, ())


def test_a_world_may_differ_by_request_layer_and_hour(blank: Plan) -> None:
    class Odd(World):
        def acceptance(self, request: Request, position: int, exit_layer: int | None) -> float:
            return float(number(request) % 2 and exit_layer == 4)

        def pace(self, now: float) -> float:
            return 2.0 if now > 800 else 1.0  # the first answer takes 772 ms

    made = replace(blank, controller=CONTROLLER.new("autotune", K=3, exits=[4]))
    engine = FakeEngine(made, Odd(0.0, draft_ms=1.0))
    even, odd = engine.generate(REQUESTS[:2])
    assert {c.accepted for c in even.cycles} == {0} and {c.accepted for c in odd.cycles[:-1]} == {3}
    assert even.cycles[0].draft_ms == 3.0 and odd.cycles[-2].draft_ms == 6.0


def test_what_was_learned_is_carried_on(blank: Plan) -> None:
    made = replace(blank, gate=GATES["bandit"], controller=COST)
    one, other = FakeEngine(made), FakeEngine(made)
    one.generate(REQUESTS[:6])
    other.restore(json.loads(json.dumps(one.state())))
    assert one.generate(REQUESTS[6:]) == other.generate(REQUESTS[6:]) != FakeEngine(made).generate(REQUESTS[6:])


def test_plain_decoding_teaches_nothing(blank: Plan) -> None:
    engine = FakeEngine(replace(blank, gate=GATES["bandit"], controller=COST))
    before = engine.state()
    engine.generate(REQUESTS, plain=True)
    assert engine.state() == before


def test_it_does_without_torch() -> None:
    code = "import sys, selfspec.engine.fake.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
