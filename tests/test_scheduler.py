"""scheduler: who is decoded when, beside whom, and that nobody's tokens depend on it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import caches
import pytest
import torch

from selfspec.axes import GATE
from selfspec.engine.base import RequestOutput
from selfspec.engine.torch.session import Scheduler
from selfspec.model.cache import KVCache
from selfspec.model.llama import Llama
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft.base import Draft, Proposal
from selfspec.speculation.draft.layerskip import EarlyExit
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import RawExit
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.sequence import Seq
from selfspec.types import Completion, Cycle, Request

pytestmark = pytest.mark.usefixtures("inference")

LAYERS = 6


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Llama:
    model = Llama.load(tiny_folder, torch.device("cpu"), torch.float32)
    for layer in model.layers[3:]:
        layer.out *= 8
        layer.down *= 8
    model.lm_head = torch.randn(80, 32, generator=torch.Generator().manual_seed(5))
    model.shape = replace(model.shape, eos=frozenset())
    return model


def speculation(model: Llama, draft: Draft | None = None, controller: Controller | None = None) -> Speculation:
    target = Target(model, LAYERS, model.norm)
    open_gate = GATE.new("none").make()
    return Speculation(target, draft or Draft(model), open_gate, controller or Controller(0), LongestPrefix())


class Checked(Scheduler):
    """A scheduler that looks into its cache after every step."""

    def __init__(self, made: Speculation, rows: int, capacity: int = 64) -> None:
        super().__init__(made, made.target.model.new_cache(capacity, rows=rows))
        self.seen: list[list[int]] = []
        """Who was being decoded, by number, after each step."""

    def step(self) -> list[RequestOutput]:
        told = super().step()
        caches.check(self.cache, LAYERS)
        assert self.cache.lengths == [len(seq.tokens) - 1 for seq in self.running]
        self.seen.append([seq.number for seq in self.running])
        return told


def requests(*new: int) -> list[Request]:
    """Prompts of different lengths, asking for this many tokens."""
    random = torch.Generator().manual_seed(4)
    lengths = [1 + 5 * i % 13 for i in range(len(new))]
    prompts = [tuple(torch.randint(80, (n,), generator=random).tolist()) for n in lengths]
    return [Request(prompt, n, ignore_eos=True) for prompt, n in zip(prompts, new, strict=True)]


def alone(made: Speculation, request: Request) -> Completion:
    return Checked(made, 1).run([request])[0]


class TestAdmission:
    def test_first_come_first_served(self, model: Llama) -> None:
        scheduler = Checked(speculation(model), 2)
        scheduler.run(requests(4, 2, 5, 3, 2))
        # 1 has its two tokens in the first cycle; 2 takes its row; two cycles later 3 takes that of 0.
        readings = [[0, 1], [0, 2], [2, 3], [4]]
        cycles = [[0], [0, 2], [2], [2, 3], [], []]
        assert [sorted(seen) for seen in scheduler.seen] == [
            *(readings[0], cycles[0], readings[1], cycles[1], cycles[2], readings[2], cycles[3], cycles[4]),
            *(readings[3], cycles[5]),
        ]

    def test_rows_are_never_more_than_the_cache_has(self, model: Llama) -> None:
        scheduler = Checked(speculation(model), 3)
        scheduler.run(requests(*[3] * 8))
        assert max(map(len, scheduler.seen)) <= 3

    def test_one_that_comes_later_joins_those_that_run(self, model: Llama) -> None:
        made = speculation(model)
        scheduler, (first, second, third) = Checked(made, 2), requests(6, 3, 2)
        assert not scheduler.busy
        assert [scheduler.submit(first), scheduler.busy] == [0, True]
        told = scheduler.step() + scheduler.step()
        assert [scheduler.submit(second), scheduler.submit(third)] == [1, 2]
        while scheduler.busy:
            told += scheduler.step()
        done = [(one.number, one.completion) for one in told if one.completion]
        assert done[0][0] == 1 and {number for number, _ in done} == {0, 1, 2}
        for number, completion in done:
            assert completion.tokens == alone(made, (first, second, third)[number]).tokens
            assert completion.tokens == tuple(token for one in told if one.number == number for token in one.tokens)
        assert scheduler.step() == []

    def test_a_row_taken_over_by_another_request(self, model: Llama) -> None:
        """A short request after a long one: what the long one left behind is not looked at."""
        made = speculation(model)
        long, short = requests(3, 40)
        assert Checked(made, 1).run([replace(long, max_new_tokens=40), short])[1].tokens == alone(made, short).tokens


class TestResults:
    @pytest.mark.parametrize("rows", [1, 2, 3, 8])
    def test_in_the_order_of_the_requests(self, model: Llama, rows: int) -> None:
        made = speculation(model)
        asked = requests(9, 1, 4, 12, 2, 7, 1)
        got = Checked(made, rows).run(asked)
        assert [completion.tokens for completion in got] == [alone(made, request).tokens for request in asked]
        assert [len(completion.tokens) for completion in got] == [9, 1, 4, 12, 2, 7, 1]

    def test_numbers_go_on(self, model: Llama) -> None:
        made, (one, other) = speculation(model), requests(3, 4)
        scheduler = Checked(made, 2)
        first, second = scheduler.run([one, other]), scheduler.run([other, one])
        assert [completion.tokens for completion in first] == [completion.tokens for completion in second[::-1]]

    def test_one_token_is_a_prefill_and_no_cycle(self, model: Llama) -> None:
        scheduler = Checked(speculation(model), 2)
        got = scheduler.run(requests(1, 1, 1))
        assert all(len(completion.tokens) == 1 and completion.cycles == () for completion in got)
        assert scheduler.seen == [[], []]  # 0 and 1 are read at once

    @pytest.mark.parametrize("rows", [1, 3])
    def test_times(self, model: Llama, ticking: None, rows: int) -> None:
        got = Checked(speculation(model), rows).run(requests(*[6] * 5))
        assert all(0 < completion.ttft_s < completion.total_s for completion in got)
        # All arrived at once, but for a look at the clock each: who is served first has its first token first.
        assert all(one.ttft_s < other.ttft_s for one, other in pairwise(got))
        if rows == 1:
            assert all(one.total_s < other.ttft_s for one, other in pairwise(got))
        for completion in got:
            spent = sum(cycle.draft_ms + cycle.verify_ms for cycle in completion.cycles) / 1e3
            assert 0 < spent < completion.total_s - completion.ttft_s

    def test_a_stop_token_frees_the_row(self, model: Llama) -> None:
        asked = requests(12, 12, 12)
        plain = speculation(model)
        said = [alone(plain, request).tokens for request in asked]
        stop = said[0][3]
        stopping = Llama.to(model, torch.float32)
        stopping.shape = replace(model.shape, eos=frozenset({stop}))
        got = Checked(speculation(stopping), 2).run([replace(request, ignore_eos=False) for request in asked])
        for completion, tokens in zip(got, said, strict=True):
            ends = tokens.index(stop) + 1 if stop in tokens else 12
            assert completion.tokens == tokens[:ends]
            assert completion.finish == ("stop" if stop in tokens else "length")
        assert got[0].finish == "stop"


class TestBatch:
    def test_a_cycle_says_how_many_shared_it(self, model: Llama) -> None:
        asked = requests(4, 2, 5, 3, 2)
        got = Checked(speculation(model), 2).run(asked)
        assert [[cycle.batch for cycle in completion.cycles] for completion in got] == [
            *([2, 2, 2], [2]),
            *([2, 2, 2, 2], [2, 2], [1]),
        ]

    def test_rows_of_a_cycle_share_its_time_and_are_observed_together(self, model: Llama) -> None:
        told: list[list[Cycle]] = []
        asked: list[tuple[int, int]] = []

        class Watching(Controller):
            def num_draft_tokens(self, history: Sequence[Cycle], batch: int) -> int:
                asked.append((len(history), batch))
                return self.k

            def observe(self, cycles: list[Cycle]) -> None:
                told.append(cycles)

        draft = EarlyExit(model, 3, RawExit(model))
        got = Checked(speculation(model, draft, Watching(2)), 3).run(requests(9, 5, 7, 8))
        for cycles in told:
            assert {cycle.batch for cycle in cycles} == {len(cycles)}
            assert len({(cycle.draft_ms, cycle.verify_ms) for cycle in cycles}) == 1
        assert sorted(map(id, (c for cycles in told for c in cycles))) == sorted(id(c) for g in got for c in g.cycles)
        assert len(asked) == sum(map(len, told)) and {batch for _, batch in asked} >= {2, 3}

    @pytest.mark.parametrize("rows", [1, 2, 3])
    def test_each_row_looks_as_far_as_it_was_asked_to(self, model: Llama, rows: int) -> None:
        """Rows with different K in a cycle, none at all among them, and ends that come one by one."""

        class ByAge(Controller):
            def num_draft_tokens(self, history: Sequence[Cycle], batch: int) -> int:
                return (0, 3, 1, 5)[len(history) % 4]

        draft = EarlyExit(model, 3, RawExit(model))
        made, asked = speculation(model, draft, ByAge(0)), requests(14, 3, 9, 11, 2, 17)
        for got, request in zip(Checked(made, rows).run(asked), asked, strict=True):
            wanted = alone(made, request)
            assert got.tokens == wanted.tokens == alone(speculation(model), request).tokens
            assert [(c.k_asked, c.proposed, c.accepted) for c in got.cycles] == [
                (c.k_asked, c.proposed, c.accepted) for c in wanted.cycles
            ]

    def test_rows_and_cache_stay_in_step(self, model: Llama) -> None:
        """What a draft remembers of a row goes with it, wherever the row is moved."""

        class Remembering(Draft):
            def observe(
                self, row: Seq, index: int, tokens: Sequence[int], states: torch.Tensor, cache: KVCache
            ) -> None:
                row.memory = (row.memory or [row.request.tokens[0]]) + list(tokens)
                assert cache.lengths[index] == len(row.tokens) - 1

            def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
                assert [row.memory for row in rows] == [row.tokens for row in rows]
                return super().propose(rows, ks, gate, cache)

        Checked(speculation(model, Remembering(model)), 3).run(requests(5, 2, 9, 3, 3, 6, 2))
