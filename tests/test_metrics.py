"""metrics: every definition on a case worked out by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from selfspec import metrics
from selfspec.metrics import bootstrap_median, first_difference, summarise
from selfspec.types import Completion, Cycle


def cycle(proposed: int, accepted: int, asked: int = 4, new: int | None = None) -> Cycle:
    return Cycle(
        asked, proposed, proposed, accepted, accepted + 1 if new is None else new, (0.5,), 1.0 + proposed, 10.0
    )


def completion(tokens: int, ttft: float, total: float, *cycles: Cycle) -> dict[str, Any]:
    return metrics.pack(Completion(tuple(range(tokens)), cycles, ttft, total, "length"))


def unit(
    configured: dict[str, Any], plain: dict[str, Any] | None = None, prompt: str = "a", **changed: Any
) -> dict[str, Any]:
    fixed = {"cpu_utilisation": 1.0, "device_utilisation": None, "peak_memory_mb": 100.0, "against": {}}
    both = {"prompts": [prompt], "plain": [plain or configured], "configured": [configured]}
    return both | {"verdicts": [{"verdict": changed.pop("verdict", "equal")}]} | fixed | changed


def timed(prompt: str, plain_s: float, configured_s: float) -> dict[str, Any]:
    """Ten tokens after the first, in so many seconds plainly and as configured."""
    return unit(completion(11, 1.0, 1.0 + configured_s), completion(11, 2.0, 2.0 + plain_s), prompt)


EXAMPLE = [
    unit(
        completion(8, 0.5, 4.0, cycle(4, 4, new=3), cycle(3, 1), cycle(0, 0, asked=2), cycle(1, 0, asked=1)),
        completion(8, 0.5, 7.5),
    ),
    unit(completion(3, 1.0, 2.0, cycle(2, 1)), completion(3, 3.0, 4.0), "b", peak_memory_mb=300.0, cpu_utilisation=0.5),
]


def test_pack_is_json_with_cycles_as_columns() -> None:
    assert metrics.pack(Completion((7, 8, 9), (cycle(4, 1), cycle(0, 0)), 0.25, 1.0, "stop")) == {
        **{"tokens": [7, 8, 9], "ttft_s": 0.25, "total_s": 1.0, "finish": "stop"},
        "cycles": {
            **{"k_asked": [4, 4], "proposed": [4, 0], "depth": [4, 0], "accepted": [1, 0], "new_tokens": [2, 1]},
            **{"signals": [(0.5,), (0.5,)], "draft_ms": [5.0, 1.0], "verify_ms": [10.0, 10.0], "batch": [1, 1]},
        },
    }


def test_acceptance() -> None:
    found = summarise(EXAMPLE, 0)
    assert found["acceptance"] == (4 + 1 + 0 + 0 + 1) / (4 + 3 + 0 + 1 + 2)
    assert found["proposed_share"] == (4 + 3 + 0 + 1 + 2) / (4 + 4 + 2 + 1 + 4)


def test_acceptance_by_position() -> None:
    """At position j among the drafts that reach it: 4 of them reach the first, one the fourth."""
    assert metrics.acceptance_by_position(EXAMPLE) == [3 / 4, 1 / 3, 1 / 2, 1 / 1]
    assert metrics.acceptance_by_position([unit(completion(2, 1, 2, cycle(0, 0)))]) == []
    assert metrics.acceptance_by_position([unit(completion(1, 1, 1))]) == []


def test_means_over_cycles_leave_out_the_first_token_and_what_a_stop_cut_off() -> None:
    found = summarise(EXAMPLE, 0)
    assert found["acceptance_length"] == (3 + 2 + 1 + 1 + 2) / 5
    assert found["draft_ms"] == (5 + 4 + 1 + 2 + 3) / 5 and found["verify_ms"] == 10


def test_rates() -> None:
    one, two = EXAMPLE[0]["configured"], EXAMPLE[1]["configured"]
    assert (metrics.decode_rate(one), metrics.decode_rate(two)) == (7 / 3.5, 2 / 1.0)
    found = summarise(EXAMPLE, 0)
    assert found["tok_s"] == 2 and found["plain_tok_s"] == np.median([7 / 7, 2 / 1])
    assert found["e2e_tok_s"] == np.median([8 / 4, 3 / 2])
    assert found["ttft_ms"] == np.median([500, 1000]) and found["plain_ttft_ms"] == np.median([500, 3000])


def test_counts_and_resources() -> None:
    found = summarise([*EXAMPLE, EXAMPLE[0]], 0)
    assert (found["units"], found["prompts"], found["new_tokens"]) == (3, 2, 19)
    assert found["peak_memory_mb"] == 300 and found["cpu_utilisation"] == pytest.approx(2.5 / 3)
    assert "device_utilisation" not in found
    busy = [unit(completion(2, 1, 2), device_utilisation=u) for u in (0.25, None, 0.75)]
    assert summarise(busy, 0)["device_utilisation"] == 0.5


class TestSpeedup:
    def test_is_a_ratio_for_each_prompt_not_of_totals(self) -> None:
        """Long prompts count no more than short ones; nor does their speed."""
        units = [timed("a", 1.0, 0.5), timed("b", 30.0, 10.0), timed("c", 100.0, 200.0)]
        assert summarise(units, 0)["speedup"] == 2

    def test_repeats_are_averaged_before_the_median(self) -> None:
        """a: (1 + 3) / 2, b: 5, c: 1.5. The median over all five units would be 1.5."""
        a, b, c = [timed("a", 1.0, 1.0), timed("a", 3.0, 1.0)], [timed("b", 5.0, 1.0)], [timed("c", 1.5, 1.0)] * 2
        assert summarise([*a, *b, *c], 0)["speedup"] == 2

    def test_a_repeat_is_compared_with_its_own_plain_run(self) -> None:
        """The machine was twice as slow during the second."""
        assert summarise([timed("a", 4.0, 2.0), timed("a", 8.0, 4.0)], 0)["speedup"] == 2

    def test_prompts_of_a_single_token_have_none(self) -> None:
        single = unit(completion(1, 1.0, 1.0), prompt="b")
        assert metrics.decode_rate(single["configured"]) is None
        assert summarise([timed("a", 3.0, 1.0), single], 0)["speedup"] == 3
        alone = summarise([single], 0)
        assert not {"tok_s", "plain_tok_s", "speedup", "speedup_low", "acceptance", "acceptance_length"} & set(alone)
        assert (alone["e2e_tok_s"], alone["new_tokens"], alone["equal_tokens"]) == (1, 1, 1)


class TestBootstrap:
    def test_is_settled_by_the_seed(self) -> None:
        values = list(np.random.default_rng(1).normal(size=20))
        assert bootstrap_median(values, 3) == bootstrap_median(values, 3) != bootstrap_median(values, 4)

    def test_one_prompt_has_no_interval(self) -> None:
        found = summarise([timed("a", 3.0, 1.0), timed("a", 3.2, 1.0)], 0)
        assert found["speedup"] == pytest.approx(3.1) and found["speedup_total"] > 3
        assert not [name for name in found if name.endswith(("_low", "_high"))]

    def test_lies_within_the_values_around_their_median(self) -> None:
        values = [1.0, 1.5, 2.0, 2.5, 9.0]
        low, high = bootstrap_median(values, 0)
        assert 1 <= low < 2 < high <= 9

    def test_covers_the_truth_about_as_often_as_it_says(self) -> None:
        random = np.random.default_rng(0)
        intervals = [bootstrap_median(list(random.lognormal(size=25)), seed) for seed in range(200)]
        assert 0.88 <= np.mean([low <= 1 <= high for low, high in intervals]) <= 0.99

    def test_narrows_with_more_prompts(self) -> None:
        random = np.random.default_rng(0)
        few, many = (bootstrap_median(list(random.normal(size=n)), 0) for n in (10, 1000))
        assert many[1] - many[0] < 0.3 * (few[1] - few[0])


@pytest.mark.parametrize(
    ("a", "b", "index"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([], [], None),
        ([1, 2, 3], [1, 5, 3], 1),
        ([1, 2, 3], [4, 2, 3], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([], [1], 0),
        ([1, 2], [3], 0),
    ],
)
def test_first_difference(a: list[int], b: list[int], index: int | None) -> None:
    assert first_difference(a, b) == first_difference(b, a) == index


def test_losslessness() -> None:
    def compared(plain: list[int], configured: list[int], verdict: str) -> dict[str, Any]:
        one, other = (completion(0, 1.0, 2.0) | {"tokens": tokens} for tokens in (configured, plain))
        return unit(one, other, verdict=verdict)

    found = summarise(
        [
            compared([1, 2, 3, 4], [1, 2, 3, 4], "equal"),
            compared([1, 2, 3, 4], [1, 2, 9, 4], "tie"),
            compared([1, 2, 3], [7, 2, 3], "differs"),
            compared([1, 2, 3, 4, 5], [1, 2], "differs"),
        ],
        0,
    )
    assert (found["ties"], found["differing"]) == (1, 2)
    assert found["equal_tokens"] == (4 + 2 + 0 + 2) / (4 + 4 + 3 + 5)


def test_what_a_tracker_shows_of_a_unit() -> None:
    shown = metrics.per_unit(EXAMPLE[0])
    assert shown == {
        **{"unit/ttft_ms": 500, "unit/new_tokens": 8, "unit/tok_s": 2, "unit/plain_tok_s": 1, "unit/speedup": 2},
        "unit/acceptance": 5 / 8,
    }
    assert metrics.per_unit(unit(completion(1, 1.0, 1.0))) == {"unit/ttft_ms": 1000, "unit/new_tokens": 1}


def test_a_batch_is_one_unit() -> None:
    """Rates of a batch count from when all have their first token to when the last has its last."""
    together = {
        **EXAMPLE[0],
        "prompts": ["a", "b"],
        "plain": [completion(5, 1.0, 9.0), completion(3, 2.0, 6.0)],
        "configured": [completion(5, 1.0, 4.0, cycle(2, 1)), completion(3, 2.0, 3.0)],
        "verdicts": [{"verdict": "equal"}, {"verdict": "tie"}],
    }
    assert metrics.decode_rate(together["plain"]) == (4 + 2) / (9 - 2)
    found = summarise([together], 0)
    assert found["speedup"] == pytest.approx(((4 + 2) / (4 - 2)) / ((4 + 2) / (9 - 2)))
    assert (found["units"], found["prompts"], found["ties"], found["new_tokens"]) == (1, 2, 1, 8)


def test_references_have_a_rate_and_a_ratio() -> None:
    beside = {**timed("a", 4.0, 2.0), "against": {"hf": [completion(11, 1.0, 6.0)]}}
    found = summarise([beside, {**timed("b", 4.0, 1.0), "against": {}}], 0)
    assert found["against/hf/tok_s"] == 2 and found["against/hf/ratio"] == pytest.approx(5 / 2)
    looping = {**said(*[7] * 11, prompt="c"), "against": {"hf": [completion(11, 1.0, 11.0)]}}
    found = summarise([beside, looping], 0)
    assert found["against/hf/ratio"] == pytest.approx((5 / 2 + 10) / 2)
    assert found["against/hf/ratio_without_loops"] == pytest.approx(5 / 2)


def test_acceptance_by_position_of_trees_counts_depth() -> None:
    """Seven tokens proposed on three levels, two accepted: the third level was looked at, and failed."""
    tree = Cycle(4, 7, 3, 2, 3, (), 1.0, 10.0)
    assert metrics.acceptance_by_position([unit(completion(4, 1, 2, tree))]) == [1, 1, 0]
    assert summarise([unit(completion(4, 1, 2, tree))], 0)["acceptance"] == 2 / 7


def said(*tokens: int, plain_s: float = 2.0, configured_s: float = 1.0, prompt: str = "a") -> dict[str, Any]:
    """The same answer both ways, in so many seconds after its first token."""
    plain, configured = (metrics.pack(Completion(tokens, (), 1.0, 1.0 + s, "length")) for s in (plain_s, configured_s))
    return unit(configured, plain, prompt)


TEXT = tuple(range(100, 228))


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ((), False),
        ((5,), False),
        ((5, 5, 5), False),  # a third of them are distinct
        ((5, 5, 5, 5), True),  # a quarter
        (TEXT, False),
        ((*TEXT[:4], *map(int, "344333434443433443444")), True),  # 6 of 25
        ((*TEXT[:40], *[3] * 16), True),  # 16 in a row
        ((*TEXT[:40], *[3] * 15), False),
        ((*TEXT[:60], *TEXT[:20] * 3), True),  # a sentence, three times
        ((*TEXT[:60], *TEXT[:20] * 2), False),  # twice
        ((*TEXT[:60], *TEXT[:20] * 3, 9), False),  # and on with something else
        ((*TEXT[:100], *(3, 4, 5) * 5), False),  # too little
        ((*TEXT[:100], *(3, 4, 5) * 6), True),
        ((*TEXT, *TEXT, *TEXT, *TEXT), False),  # longer than what is looked at
        (tuple(i * i % 1009 % 300 for i in range(4000)), False),  # of 300 words: few for its length, and no loop
        ((*TEXT, *[1, 2] * 64), True),
    ],
)
def test_an_answer_that_ends_in_repeating_itself_loops(tokens: tuple[int, ...], loops: bool) -> None:
    assert metrics.loops(tokens) == metrics.loops(list(tokens)) == loops


class TestLoops:
    def test_are_counted_and_the_speed_up_is_told_without_them(self) -> None:
        units = [
            said(*TEXT[:11], plain_s=1.2, prompt="a"),
            said(*TEXT[:11], plain_s=1.4, prompt="b"),
            said(*[7] * 11, plain_s=5.0, prompt="c"),
            said(*[7] * 11, plain_s=6.0, prompt="d"),
            said(*[7] * 11, plain_s=7.0, prompt="d"),
        ]
        found = summarise(units, 0)
        assert (found["looping"], found["prompts"]) == (2, 4)
        assert found["speedup"] == pytest.approx((1.4 + 5.0) / 2)
        assert found["speedup_without_loops"] == pytest.approx(1.3)
        assert found["speedup_total_without_loops"] == pytest.approx(2.6 / 2)
        assert 1.2 <= found["speedup_without_loops_low"] <= found["speedup_without_loops_high"] <= 1.4

    def test_of_either_side_count(self) -> None:
        one = said(*TEXT[:11])
        one["configured"][0]["tokens"] = [7] * 11
        other = said(*TEXT[:11], prompt="b")
        other["plain"][0]["tokens"] = [7] * 11
        assert summarise([one, other], 0)["looping"] == 2

    def test_everywhere_leave_nothing_to_tell_without_them(self) -> None:
        found = summarise([said(*[7] * 11)], 0)
        assert (found["looping"], found["speedup"]) == (1, 2)
        assert not [name for name in found if "without_loops" in name]


class TestTotalTime:
    def test_long_answers_count_for_more(self) -> None:
        """(1 + 30 + 100) s against (0.5 + 10 + 200) s."""
        units = [timed("a", 1.0, 0.5), timed("b", 30.0, 10.0), timed("c", 100.0, 200.0)]
        found = summarise(units, 0)
        assert found["speedup_total"] == pytest.approx(131 / 210.5)
        assert found["speedup_total_low"] <= found["speedup_total"] <= found["speedup_total_high"]

    @pytest.mark.parametrize(("slow", "count"), [([], 0), ([90.0] * 2, 0), ([2000.0], 1), ([10.0] * 40 + [2000.0], 1)])
    def test_answers_in_which_the_machine_stalled_are_counted(self, slow: list[float], count: int) -> None:
        passes = [replace(cycle(1, 1), verify_ms=ms) for ms in [9.0] * 40 + slow]
        ways = [
            completion(80, 1.0, 1.0 + sum(p.verify_ms for p in some) / 1e3, *some) for some in (passes, passes[:40])
        ]
        assert [summarise([unit(*both)], 0)["stalled"] for both in (ways, ways[::-1])] == [count, count]

    def test_of_unequal_answers_it_is_by_token(self) -> None:
        """40 tokens in 8 s against 10 in 4 s."""
        both = unit(completion(41, 1.0, 9.0), completion(11, 1.0, 5.0))
        assert summarise([both], 0)["speedup_total"] == pytest.approx((40 / 8) / (10 / 4))

    def test_a_prompt_without_a_speed_up_counts_on_neither_side(self) -> None:
        single = unit(completion(1, 1.0, 1.0), completion(9, 1.0, 9.0), "b")
        assert summarise([timed("a", 3.0, 1.0), single], 0)["speedup_total"] == pytest.approx(3)
