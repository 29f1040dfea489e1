"""costs: what drafting costs and brings, on cycles worked out by hand and in a world whose costs are known."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plans import planned, run_job
from test_report import result
from tiny import fake_job, prompts

from selfspec import costs, export, metrics
from selfspec.axes import CONTROLLER
from selfspec.errors import ConfigError
from selfspec.report.why import why
from selfspec.types import Completion, Cycle


def answer(*cycles: Cycle) -> dict[str, Any]:
    tokens = 1 + sum(cycle.new_tokens for cycle in cycles)
    return metrics.pack(Completion(tuple(range(tokens)), cycles, 1.0, 2.0, "length"))


def plain(ms: float, count: int = 10, batch: int = 1) -> dict[str, Any]:
    return answer(*[Cycle(0, 0, 0, 0, 1, (), 0.0, ms, batch)] * count)


def drafted(k: int, accepted: int, step_ms: float, verify_ms: float, batch: int = 1) -> Cycle:
    return Cycle(k, k, k, accepted, accepted + 1, (), k * step_ms, verify_ms, batch)


def unit(plain: Any, *configured: Any) -> dict[str, Any]:
    return {"plain": [plain] * len(configured), "configured": [*configured]}


def test_costs_and_chances_by_hand() -> None:
    """Two steps of 4 ms and a verification of 12 ms, where a pass takes 10: 2 passes; of 20 drafts 10, of 30 looks."""
    cycles = [drafted(2, accepted, 4.0, 12.0) for accepted in (0, 1, 2, 1) * 3]
    found = costs.measured([unit(plain(10.0), answer(*cycles))])
    assert found["cost_draft_step"] == pytest.approx(0.4) and found["cost_cycle"] == pytest.approx(2.0)
    assert found["stand"] == pytest.approx(12 / (12 + 9)), "12 stood, 9 fell first: two of a cycle's never had a chance"
    assert found["oracle_speedup"] == pytest.approx(3 / 2)
    even = found["break_even"]
    assert 1 + even + even**2 == pytest.approx(2.0)


def test_at_break_even_a_draft_of_that_chance_pays_and_below_it_does_not() -> None:
    depth = np.asarray([4.0, 4, 2, 0])
    even = costs.break_even(depth, 1.9)
    assert even is not None
    tokens = [1 + sum((depth >= j).mean() * chance**j for j in (1, 2, 3, 4)) for chance in (even - 0.01, even + 0.01)]
    assert tokens[0] < 1.9 < tokens[1]
    assert costs.break_even(depth, 3.6) is None, "2.5 drafts a cycle and its own token are all there can be"


def test_a_stall_is_no_cost() -> None:
    usual = [drafted(1, 1, 2.0, 11.0)] * 40
    quiet, stalled = (
        costs.profile([unit(plain(10.0), answer(*usual, *more))]) for more in ((), (drafted(1, 1, 2.0, 900.0),))
    )
    of = [one["cost"][0]["verify_row_ms"] for one in (quiet, stalled)]
    assert of[1] == pytest.approx(of[0], rel=0.03)


@pytest.mark.parametrize(
    ("x", "ms", "expected"),
    [
        ([1, 2, 3], [5.0, 7.0, 9.0], (3.0, 2.0)),
        ([2, 2, 2], [8.0, 8.0, 8.0], (0.0, 4.0)),
        ([0, 0], [3.0, 3.0], (3.0, 0.0)),
        ([1, 2, 3], [9.0, 8.0, 7.0], (8.0, 0.0)),
        ([2, 3], [1.0, 30.0], (0.0, 6.2)),
    ],
)
def test_lines_of_times_have_no_part_below_zero(x: list[float], ms: list[float], expected: tuple[float, float]) -> None:
    assert costs.line(x, ms) == pytest.approx(expected)


def test_positions_and_lengths() -> None:
    cycles = [drafted(3, accepted, 1.0, 10.0) for accepted in (0, 1, 3, 3)] + [drafted(1, 1, 1.0, 10.0)]
    found = costs.profile([unit(plain(10.0), answer(*cycles))])
    assert found["accepted_lengths"] == [1, 2, 0, 2]
    first, second, third = found["acceptance"]
    assert (first["asked"], first["conditional"], first["marginal"]) == (5, 4 / 5, 4 / 5)
    assert (second["asked"], second["conditional"], second["marginal"]) == (4, 2 / 3, 2 / 4)
    assert (third["conditional"], third["marginal"]) == (1.0, 2 / 4)


def test_rows_of_one_pass_are_counted_together() -> None:
    """Two requests at once: 2 x 3 tokens a pass, one draft of two steps for both, and its time once."""
    rng = np.random.default_rng(0)
    times = rng.uniform(10, 12, 30)
    rows = [answer(*[drafted(2, int(n % 3 == row), 1.0, float(ms), 2) for n, ms in enumerate(times)]) for row in (0, 1)]
    one = unit(plain(10.0, 30, 2), *rows)
    (cost,) = costs.profile([one])["cost"]
    assert (cost["batch"], cost["cycles"], cost["draft_step_ms"]) == (2, 30, pytest.approx(1.0))
    assert cost["verify_row_ms"] == pytest.approx(times.mean() / 6)


def test_nothing_drafted_or_timed_has_no_costs() -> None:
    assert costs.measured([unit(plain(10.0), plain(10.0))]) == {}
    assert costs.measured([unit(plain(0.0), answer(drafted(2, 1, 0.0, 0.0)))]) == {}
    assert costs.profile([unit(plain(10.0), plain(10.0))])["schedule"] == []


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    folder = tmp_path_factory.mktemp("world")
    asked = ("scale.prompts=24", "workload.new_tokens=64", "K=6", f"checkpoint.dir={folder / 'kept'}")
    made = run_job(planned(*fake_job(prompts(folder / "p.json")), *asked), folder / "run")
    return json.loads((folder / "run" / export.FILE).read_text()), made


class TestWorld:
    """The fake engine's draft step takes 3 ms, a pass 10, and 6 of 10 drafts stand: so K=1 pays most."""

    def test_its_costs_are_found(self, job: Any) -> None:
        profile, _ = job
        (cost,) = profile["cost"]
        assert (cost["batch"], cost["pass_ms"], cost["draft_step_ms"]) == (1, 10.0, pytest.approx(3.0))
        assert cost["verify_ms"] + 7 * cost["verify_row_ms"] == pytest.approx(10.0 * 1.045, rel=0.01)
        assert [one["conditional"] for one in profile["acceptance"][:3]] == pytest.approx([0.6] * 3, abs=0.04)
        assert profile["provenance"]["hardware"]["cpu"]

    def test_what_it_foretells_at_the_k_that_ran_was_measured(self, job: Any) -> None:
        profile, made = job
        foretold = {one["K"]: one["speedup"] for one in profile["cost"][0]["k"]}
        assert foretold[6] == pytest.approx(made["measurements"]["bench/speedup_total"], rel=0.03)
        assert profile["schedule"] == [{"batch": 1, "K": 1, "speedup": foretold[1]}]

    def test_a_shorter_draft_is_as_fast_as_it_was_foretold_from_a_longer_one(self, job: Any, tmp_path: Path) -> None:
        profile, _ = job
        foretold = {one["K"]: one["speedup"] for one in profile["cost"][0]["k"]}
        asked = ("scale.prompts=24", "workload.new_tokens=64", "K=2", f"checkpoint.dir={tmp_path / 'kept'}")
        made = run_job(planned(*fake_job(prompts(tmp_path / "p.json")), *asked), tmp_path)
        assert made["measurements"]["bench/speedup_total"] == pytest.approx(foretold[2], rel=0.05)

    def test_every_field_is_documented(self, job: Any) -> None:
        profile, _ = job
        fields = [*profile, *profile["acceptance"][0], *profile["cost"][0], *profile["schedule"][0], *profile["flags"]]
        told = (Path(__file__).parents[1] / "docs" / "profile.md").read_text()
        assert [name for name in fields if f"`{name}" not in told and f"`.{name}" not in told] == []

    def test_its_report_says_why(self, job: Any) -> None:
        _, made = job
        said = why(made)
        assert said is not None and said.startswith(
            "slower: a draft step costs .30 of a pass, a cycle 2.74, and .60 of drafts stand; "
        )
        assert made["measurements"]["bench/stand"] < made["measurements"]["bench/break_even"]


@pytest.mark.parametrize(
    ("low", "high", "even", "word"),
    [
        (
            0.7,
            0.9,
            0.49,
            "slower: a draft step costs .41 of a pass, a cycle 2.30, and .26 of drafts stand; it breaks even at .49 ",
        ),
        (1.1, 1.2, 0.2, "faster: "),
        (0.9, 1.2, 0.26, "neither faster nor slower for certain: "),
        (
            0.4,
            0.5,
            None,
            "slower: a draft step costs .41 of a pass, a cycle 2.30, and .26 of drafts stand; nothing would ",
        ),
    ],
)
def test_why_in_a_line(low: float, high: float, even: float | None, word: str) -> None:
    known = {"cost_draft_step": 0.41, "cost_cycle": 2.3, "stand": 0.26, "oracle_speedup": 1.62, "break_even": even}
    measured = known | {"speedup_low": low, "speedup_high": high}
    row = result(measurements={f"bench/{key}": one for key, one in measured.items() if one is not None})
    said = why(row)
    assert said is not None and said.startswith(word) and "an oracle's drafts at that cost: 1.62x" in said
    del row["measurements"]["bench/cost_draft_step"]
    said = why(row)
    assert said is not None and said.split(": ")[1].startswith("a cycle costs 2.30 passes and .26 of drafts stand")
    assert why(result()) is None, "without figures there is nothing to say"


@pytest.mark.parametrize(
    ("recommended", "entries"),
    [
        ([(1, 4)], [(1, 4)]),
        ([(2, 4), (3, 4), (4, 2), (8, 0)], [(1, 4), (4, 2), (8, 0)]),
        ([], []),
    ],
)
def test_schedules_are_merged(recommended: Sequence[tuple[int, int]], entries: list[tuple[int, int]]) -> None:
    assert export.merged([{"batch": batch, "K": k} for batch, k in recommended]) == entries


RISING = [{"batch": 1, "K": 4}, {"batch": 4, "K": 2}, {"batch": 8, "K": 0}]


@pytest.mark.parametrize(
    ("overrides", "config"),
    [
        (
            ["draft=ngram"],
            {
                **{"method": "ngram", "prompt_lookup_max": 8, "prompt_lookup_min": 1, "num_speculative_tokens": 4},
                "num_speculative_tokens_per_batch_size": [[1, 3, 4], [4, 7, 2], [8, 8, 0]],
            },
        ),
        (["draft=ngram", "gate=maxp"], "gate=maxp: vLLM's draft=ngram asks no gate"),
        (["draft=suffix"], "vLLM has no draft=suffix"),
    ],
)
def test_flags_of_vllm(overrides: list[str], config: Any) -> None:
    found = export.flags(planned(*overrides), RISING)
    if isinstance(config, str):
        assert (found["vllm"], found["why_not"]) == (None, config)
        return
    assert found["vllm"] is not None
    words = shlex.split(found["vllm"])
    assert words[:3] == ["vllm", "serve", "MODEL"] and words[3] == "--speculative-config"
    asked = json.loads(words[4])
    assert {key: asked[key] for key in config} == config


def test_an_early_exit_takes_its_schedule_with_it_into_vllm() -> None:
    from selfspec.vllm_plugin import settings

    found = export.flags(planned("draft=layerskip", "exit_layer=12", "gate=maxp"), RISING)["vllm"]
    assert found is not None
    asked = json.loads(shlex.split(found)[4])
    parsed = settings.parse(asked["selfspec"], asked["num_speculative_tokens"])
    control = parsed.controller.make()
    assert [control.num_draft_tokens([], batch) for batch in (1, 3, 4, 7, 8, 64)] == [4, 4, 2, 2, 0, 0]


@pytest.mark.parametrize("overrides", [["draft=suffix"], ["draft=lsq", "exit_layer=12", "gate=varH"], ["draft=hybrid"]])
def test_the_gateways_flags_make_its_plan(overrides: list[str]) -> None:
    """What was benched, with the schedule in the place of its controller."""
    benched = planned(*overrides)
    found = export.flags(benched, RISING)["gateway"]
    assert found is not None
    served = planned(*shlex.split(found)[3:])
    assert (served.draft.name, served.gate, served.policy) == (benched.draft.name, benched.gate, benched.policy)
    assert (served.model_id, served.controller.label) == (benched.model_id, "K=4/4:2/8:0")
    nothing = export.flags(benched, [{"batch": 1, "K": 0}])["gateway"]
    assert nothing is not None and planned(*shlex.split(nothing)[3:]).draft.name == "none"


@pytest.mark.parametrize(
    ("by_batch", "reason"),
    [
        ([[4, 2], [4, 1]], "controller.by_batch=[[4, 2], [4, 1]]: must be [[requests, K], ...], requests rising"),
        ([[4]], "controller.by_batch=[[4]]: must be"),
        ([[2, 9]], "controller.by_batch, K of 2=9: must be from 0 to 4"),
    ],
)
def test_what_is_no_schedule_is_refused(by_batch: list[list[int]], reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        CONTROLLER.new("schedule", K=4, by_batch=by_batch).check()
    assert str(refused.value).startswith(reason)
