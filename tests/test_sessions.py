"""A session: who is admitted when under which order, what is told step by step, and what cancelling frees."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import caches
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor

from selfspec import plan
from selfspec.engine import admission
from selfspec.engine.admission import STALL
from selfspec.engine.base import Load, RequestOutput
from selfspec.engine.fake.engine import FakeEngine
from selfspec.engine.torch.engine import TorchEngine
from selfspec.engine.torch.session import Scheduler
from selfspec.errors import ConfigError
from selfspec.model.cache import KVCache
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.run import CONF
from selfspec.serve.config import Order
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft.base import Draft
from selfspec.speculation.draft.layerskip import EarlyExit
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import RawExit
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.policy.rejection import Mixed, Rejection
from selfspec.speculation.sequence import Seq, Status
from selfspec.types import Completion, Request, Sampling

pytestmark = pytest.mark.usefixtures("inference")

LAYERS = 6


@pytest.fixture(autouse=True, scope="module")
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Llama:
    """The tiny model made unruly, which never stops by itself."""
    model = Llama.load(tiny_folder, torch.device("cpu"), torch.float32)
    for layer in model.layers[3:]:
        layer.out *= 8
        layer.down *= 8
    model.lm_head = torch.randn(80, 32, generator=torch.Generator().manual_seed(5))
    model.shape = replace(model.shape, eos=frozenset())
    return model


class Watched(Speculation):
    """Notes what is read, in tokens, and when there is a cycle (0)."""

    noted: list[int]

    def prefill(self, row: Seq, first: int, count: int, cache: KVCache, index: int) -> Tensor:
        self.noted.append(count)
        return super().prefill(row, first, count, cache, index)

    def step(self, rows: Sequence[Seq], cache: KVCache) -> None:
        self.noted.append(0)
        super().step(rows, cache)


def speculation(model: Llama, k: int = 3) -> Watched:
    made = Watched(
        Target(model, LAYERS, model.norm),
        EarlyExit(model, 3, RawExit(model)) if k else Draft(model),
        Gate(),
        Controller(k),
        Mixed(LongestPrefix()),
    )
    object.__setattr__(made, "noted", [])
    return made


def opened(made: Speculation, rows: int, order: Order = Order.fcfs, chunk: int = 4) -> Scheduler:
    return Scheduler(made, made.target.model.new_cache(80, rows), order, chunk, 70)  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(80, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def checked(session: Scheduler) -> list[RequestOutput]:
    """A step, after which the cache must hold what is being decoded and nothing else."""
    told = session.step()
    caches.check(session.cache, LAYERS)
    assert session.cache.lengths == [len(seq.tokens) - 1 for seq in session.running]
    return told


def drained(session: Scheduler) -> dict[int, Completion]:
    done = dict[int, Completion]()
    while session.busy:
        done |= {told.number: told.completion for told in checked(session) if told.completion}
    return done


class TestOrders:
    def test_fcfs_reads_all_there_is_room_for(self, model: Llama) -> None:
        made = speculation(model)
        opened(made, 3).run([Request(prompt(n), 4) for n in (5, 9, 2, 7)])
        assert made.noted[:4] == [5, 9, 2, 0]

    def test_decode_first_reads_one_prompt_between_two_cycles(self, model: Llama) -> None:
        made = speculation(model)
        opened(made, 4, Order.decode_first).run([Request(prompt(n), 12) for n in (5, 9, 2, 7, 6)])
        assert made.noted[:8] == [5, 0, 9, 0, 2, 0, 7, 0]
        assert all(not (one and other) for one, other in pairwise(made.noted))

    def test_chunked_prefill_reads_bounded_pieces_between_two_cycles(self, model: Llama) -> None:
        made = speculation(model)
        opened(made, 3, Order.chunked_prefill, chunk=4).run([Request(prompt(n), 20) for n in (3, 10, 1, 4)])
        # 3 and the first of 10; then it joins with its last 2 and leaves room for 1, and one of 4.
        assert made.noted[:2] == [3, 1]
        pieces = [0]
        for count in made.noted:
            pieces = [*pieces, 0] if not count else [*pieces[:-1], pieces[-1] + count]
        assert max(pieces) == 4 and sum(pieces) == 18

    def test_nobody_decodes_a_prompt_that_is_half_read(self, model: Llama) -> None:
        session = opened(speculation(model), 2, Order.chunked_prefill, chunk=4)
        for n, new in ((4, 60), (30, 5)):
            session.submit(Request(prompt(n), new))
        seen = list[list[int]]()
        while [0, 1] not in seen:
            checked(session)
            seen.append([seq.number for seq in session.running])
            assert session.load.waiting == 2 - len(session.running)
        assert seen[:-1] == [[0]] * (len(seen) - 1) and seen[-1] == [0, 1] and len(seen) > 8


class TestCost:
    def waiting(self, *asked: tuple[int, int, float]) -> list[Seq]:
        return [Seq(Request((1,) * n, new), i, arrival) for i, (n, new, arrival) in enumerate(asked)]

    def test_short_work_first(self) -> None:
        cost = admission.make(Order.hrrn, 1)
        assert cost.choose(self.waiting((50, 50, 0.0), (5, 60, 0.0), (5, 5, 0.0)), 0, 0.0) == 2
        assert cost.choose(self.waiting((5, 5, 0.0), (5, 5, 0.0)), 0, 0.0) == 0

    def test_what_a_token_takes_is_measured(self) -> None:
        cost, asked = admission.make(Order.hrrn, 1), self.waiting((100, 2, 0.0), (2, 20, 0.0))
        assert cost.choose(asked, 0, 0.0) == 1
        for _ in range(50):
            cost.observe_prefill(100, 0.1)  # a millisecond a token
            cost.observe_decode(2.0, 0.2)  # a hundred
        assert cost.choose(asked, 0, 0.0) == 0

    def test_who_waits_long_enough_is_next(self) -> None:
        cost = admission.make(Order.hrrn, 1)
        cost.observe_prefill(1, 0.001)
        cost.observe_decode(1.0, 0.01)
        long = (100, 400, 0.0)
        chosen = [cost.choose(self.waiting(long, (5, 10, now)), 0, now) for now in (0.0, 1.0, 10.0, 100.0)]
        assert chosen == [1, 0, 0, 0]  # the short one has just come each time

    def test_prompts_hold_up_a_batch_for_a_few_cycles_at_most(self) -> None:
        cost = admission.make(Order.hrrn, 1)
        cost.observe_prefill(100, 0.1)
        cost.observe_decode(1.0, 0.01)
        most = round(STALL * 0.01 / 0.001)
        asked = self.waiting((20, 5, 0.0))
        assert cost.choose(asked, 0, 0.0) == 0
        assert cost.choose(self.waiting((10 * most, 5, 0.0)), 0, 0.0) == 0  # nothing has been read: it must begin
        assert cost.choose(asked, most - 20, 0.0) == 0
        assert cost.choose(asked, most - 19, 0.0) is None


class TestProgress:
    @pytest.mark.parametrize("order", Order)
    def test_pieces_come_to_the_whole(self, model: Llama, order: Order) -> None:
        session, said = opened(speculation(model), 2, order), dict[int, tuple[int, ...]]()
        for n in (9, 1, 5, 5):
            session.submit(Request(prompt(n, n), 14, logprobs=2))
        while session.busy:
            for told in checked(session):
                assert told.tokens and len(told.logprobs) == len(told.tokens)
                said[told.number] = said.get(told.number, ()) + told.tokens
                assert (told.completion is None) == (len(said[told.number]) < 14)
                assert told.completion is None or told.completion.tokens == said[told.number]
        assert sorted(said) == [0, 1, 2, 3] and session.load == Load(0, 0, 0.0)

    def test_first_tokens_are_out_before_the_next_cycle(self, model: Llama) -> None:
        session = opened(speculation(model), 2)
        session.submit(Request(prompt(5), 9))
        (first,) = checked(session)
        assert len(first.tokens) == 1
        session.submit(Request(prompt(4), 9))
        told = [checked(session), checked(session)]  # whoever decodes has a cycle between two readings
        assert [[one.number for one in step] for step in told] == [[0], [1]]

    def test_times(self, model: Llama, ticking: None) -> None:
        one, other = opened(speculation(model), 1).run([Request(prompt(5), 9)] * 2)
        assert 0 <= one.queue_s < one.ttft_s < one.total_s < other.queue_s < other.ttft_s < other.total_s

    def test_too_long_or_empty(self, model: Llama) -> None:
        session = opened(speculation(model), 1)
        for tokens, new in (((), 4), (prompt(60), 11)):
            with pytest.raises(ValueError, match="70"):
                session.submit(Request(tokens, new))
        assert not session.busy
        session.submit(Request(prompt(60), 10))
        assert len(drained(session)[0].tokens) == 10


class TestCancel:
    @pytest.mark.parametrize("order", Order)
    def test_a_row_is_free_at_once_and_others_do_not_notice(self, model: Llama, order: Order) -> None:
        made = speculation(model)
        asked = [Request(prompt(n, n), 16) for n in (6, 9, 3, 11)]
        alone = [opened(made, 1).run([request])[0].tokens for request in asked]
        session = opened(made, 3, order)
        for request in asked[:3]:
            session.submit(request)
        while len(session.running) < 3:
            checked(session)
        before = next(seq.output_tokens() for seq in session.running if seq.number == 1)
        gone = session.cancel(1)
        assert gone is not None and list(gone.tokens) == before == list(alone[1][: len(before)])
        assert len(session.cache.lengths) == 2 and session.load.rows == 2
        caches.check(session.cache, LAYERS)
        last = session.submit(asked[3])  # takes its row
        done = drained(session)
        assert {number: completion.tokens for number, completion in done.items()} == {
            **{number: alone[number] for number in (0, 2) if number in done},
            last: alone[3],
        }
        assert session.cache.lengths == [] and session.load.kv_used == 0

    def test_one_that_waits(self, model: Llama) -> None:
        session = opened(speculation(model), 1)
        for _ in range(3):
            session.submit(Request(prompt(4), 5))
        checked(session)
        assert session.cancel(1) is None and session.load.waiting == 1
        assert sorted(drained(session)) == [0, 2]

    def test_one_that_is_half_read(self, model: Llama) -> None:
        made, request = speculation(model), Request(prompt(11, 7), 9)
        alone = opened(made, 1).run([request])[0].tokens
        session = opened(made, 2, Order.chunked_prefill, chunk=4)
        first = session.submit(Request(prompt(30), 5))
        checked(session)
        assert [seq.status for seq in session.queue] == [Status.prefilling] and session.cancel(first) is None
        assert not session.busy
        assert opened(made, 2, Order.chunked_prefill).run([request])[0].tokens == alone
        session.submit(request)  # over what the other left behind
        assert [completion.tokens for completion in drained(session).values()] == [alone]

    def test_one_that_is_done_or_was_never_there(self, model: Llama) -> None:
        session = opened(speculation(model), 1)
        number = session.submit(Request(prompt(4), 5))
        drained(session)
        assert session.cancel(number) is session.cancel(99) is None


def test_logprobs_are_the_models(model: Llama) -> None:
    """Of drafted tokens too, whoever else is in the batch."""
    asked = [Request(prompt(5), 12, logprobs=3), Request(prompt(7), 12), Request(prompt(3), 12, logprobs=0)]
    session = opened(speculation(model), 3)
    for request in asked:
        session.submit(request)
    told = list[RequestOutput]()
    while session.busy:
        told += checked(session)
    for number, request in enumerate(asked):
        tokens = [token for one in told if one.number == number for token in one.tokens]
        logprobs = [each for one in told if one.number == number for each in one.logprobs]
        if request.logprobs is None:
            assert not logprobs
            continue
        context = [*request.tokens, *tokens[:-1]]
        cache = model.new_cache(len(context))
        at = cache.place([Tree.chain(context)], row=cache.admit())
        states = model.norm(model.run(model.embed(context, at), cache, at, 0, LAYERS))
        wanted = model.logits(states)[len(request.tokens) - 1 :].log_softmax(-1)
        assert len(logprobs) == len(tokens) == 12
        for token, got, row in zip(tokens, logprobs, wanted, strict=True):
            assert got.logprob == pytest.approx(float(row[token]), abs=1e-4)
            best = row.topk(request.logprobs)
            assert [i for i, _ in got.top] == best.indices.tolist()
            assert [value for _, value in got.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_some_sample_and_some_do_not(model: Llama) -> None:
    """In one batch, each as alone; those that sample as plain sampling with their seed."""
    made, plain = speculation(model), speculation(model, k=0)
    asked = [
        Request(prompt(5), 16),
        Request(prompt(5), 16, sampling=Sampling(1.0, seed=1)),
        Request(prompt(5), 16, sampling=Sampling(1.0, seed=2)),
        Request(prompt(5), 16, sampling=Sampling(0.7, top_k=5, top_p=0.9, seed=1)),
    ]
    got = [completion.tokens for completion in opened(made, 4).run(asked)]
    assert len({*got}) == 4
    rejecting = Speculation(plain.target, plain.draft, plain.gate, plain.controller, Rejection())
    assert got == [opened(rejecting, 1).run([request])[0].tokens for request in asked]


class TestEngines:
    @pytest.mark.parametrize("order", Order)
    def test_torch_sessions_say_what_generate_says(self, overrides: list[str], order: Order) -> None:
        chosen = ("draft=layerskip", "K=3", "hardware.threads=1", "serve.chunk=4")
        engine = TorchEngine(plan.make(compose("config", [*overrides, *chosen])))
        asked = [Request(prompt(n, n), 12) for n in (5, 14, 2)]
        got = engine.open(2, 40, order).run(asked)
        assert [one.tokens for one in got] == [one.tokens for one in engine.generate(asked)]

    def test_more_positions_than_the_model_has(self, overrides: list[str]) -> None:
        engine = TorchEngine(plan.make(compose("config", [*overrides, "draft=layerskip"])))
        with pytest.raises(ConfigError, match=r"serve.max_model_len=513: tiny has 512"):
            engine.open(1, 513, Order.fcfs)

    def test_torch_text(self, overrides: list[str]) -> None:
        engine = TorchEngine(plan.make(compose("config", [*overrides, "draft=layerskip"])))
        chat = engine.tokenizer.encode_chat(
            [{"role": "user", "content": "a model"}, {"role": "user", "content": "drafts"}]
        )
        assert engine.tokenizer.decode(chat) == "<user> a model <user> drafts <model>"
        assert engine.tokenizer.encode("a model", chat=True) == engine.tokenizer.encode_chat(
            [{"role": "user", "content": "a model"}]
        )
        assert engine.limits().vocab == 80

    @pytest.mark.parametrize("order", Order)
    def test_fake_sessions_say_what_generate_says(self, fake: list[str], order: Order) -> None:
        made = plan.make(compose("config", [*fake, "serve.chunk=4"]))
        asked = [Request(prompt(n, n), 12 + n, logprobs=1) for n in (5, 14, 2, 30)]
        got = FakeEngine(made).open(2, 80, order).run(asked)
        assert [one.tokens for one in got] == [one.tokens for one in FakeEngine(made).generate(asked)]
        assert FakeEngine(made).tokenizer.decode([104, 105, 255]) == "hi\N{REPLACEMENT CHARACTER}"
