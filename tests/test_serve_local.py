"""Our engine as a back end: what it says, how it stops, and what becomes of those who leave or break it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from plans import planned
from serving import Gated, request

from selfspec.axes import POLICY
from selfspec.engine.base import Engine
from selfspec.engine.fake.engine import FakeEngine
from selfspec.engine.torch.engine import TorchEngine
from selfspec.errors import ConfigError
from selfspec.plan import Plan
from selfspec.serve.backend import Call, Chunk
from selfspec.serve.errors import Failed, Invalid, TooLong, Unavailable
from selfspec.serve.local import Local
from selfspec.serve.metrics import Metrics
from selfspec.types import Request, Sampling

GREEDY = Call("c", "tiny", prompt="hello", max_tokens=12, temperature=0.0)


@pytest.fixture
def made(fake: list[str]) -> Plan:
    return planned(*fake, "serve.max_batch=2", "serve.max_model_len=80", "serve.max_tokens=64")


@asynccontextmanager
async def loaded(made: Plan, make: Callable[[], Engine], metrics: Metrics | None = None) -> AsyncIterator[Local]:
    local = Local("local", make, made.serve, "layerskip", metrics or Metrics())
    try:
        await asyncio.wrap_future(local.ready)
        yield local
    finally:
        await local.close()


async def whole(local: Local, call: Call) -> list[Chunk]:
    async with aclosing(local.stream(call)) as chunks:
        return [chunk async for chunk in chunks]


def said(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


async def test_the_text_is_what_the_engine_generates(made: Plan) -> None:
    async with loaded(made, lambda: FakeEngine(made)) as local:
        chunks = await whole(local, GREEDY)
        engine = FakeEngine(made)
        (completion,) = engine.generate([request("hello", 12)])
        assert said(chunks) == engine.tokenizer.decode(completion.tokens)
        *others, last = chunks
        assert len(others) > 1 and others[0].tokens == 1 and sum(chunk.tokens for chunk in chunks) == 12
        assert all(chunk.finish is chunk.usage is chunk.stats is None for chunk in others)
        assert (last.finish, last.usage, last.stats) == ("length", (5, 12), None)


async def test_statistics_and_metrics(made: Plan) -> None:
    metrics = Metrics()
    async with loaded(made, lambda: FakeEngine(made), metrics) as local:
        *_, last = await whole(local, replace(GREEDY, stats=True))
        assert last.stats is not None
        stats = dict(last.stats)
    assert stats["acceptance"] == stats["accepted"] / stats["proposed"]
    assert stats["acceptance_length"] * stats["cycles"] == pytest.approx(11)
    assert 0 <= stats["queue_ms"] < stats["ttft_ms"] < stats["total_ms"]
    told = metrics.exposition().decode()
    assert f'selfspec_proposed_tokens_total{{draft="layerskip"}} {stats["proposed"]:.1f}' in told
    assert f'selfspec_accepted_tokens_total{{draft="layerskip"}} {stats["accepted"]:.1f}' in told
    assert "selfspec_queue_seconds_count 1.0" in told and "selfspec_batch_rows 0.0" in told


async def test_a_stop_text_ends_the_answer(made: Plan) -> None:
    """Wherever it lies in the answer, and whatever cycles it spans; nothing after it counts."""
    async with loaded(made, lambda: FakeEngine(made)) as local:
        engine = FakeEngine(made)
        for seed in range(8):
            call = replace(GREEDY, prompt=f"p{seed}", max_tokens=40)
            tokens = engine.generate([request(f"p{seed}", 40)])[0].tokens
            text = engine.tokenizer.decode(tokens)
            # Of bytes that are no character it is only known later that they are none.
            stop = next(text[i : i + 2] for i in range(seed, 40) if text[i : i + 2].isascii())
            chunks = await whole(local, replace(call, stop=("never said", stop)))
            assert said(chunks) == text[: text.index(stop)]
            last = chunks[-1]
            assert last.finish == "stop" and last.usage is not None
            count = last.usage.completion_tokens
            assert stop in engine.tokenizer.decode(tokens[:count]) and stop not in engine.tokenizer.decode(
                tokens[: count - 1]
            )
        while local._load.rows:  # its thread lets go of a cancelled row when it comes to it
            await asyncio.sleep(0.01)


async def test_who_leaves_the_queue_is_never_decoded(made: Plan) -> None:
    engine, single = Gated(made), replace(made, serve=replace(made.serve, max_batch=1))
    async with loaded(single, lambda: engine) as local:
        first = asyncio.ensure_future(whole(local, GREEDY))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.waits.wait)  # its first step has begun
        waiting = asyncio.ensure_future(whole(local, replace(GREEDY, prompt="never")))
        while local._asked.empty():
            await asyncio.sleep(0.001)
        engine.go_on()
        while local._load.waiting != 1:
            await asyncio.sleep(0.001)
        waiting.cancel()
        await asyncio.wait([waiting])
        engine.go_on(999)
        assert (await first)[-1].usage == (5, 12)
        assert waiting.cancelled() and all(tuple(b"never") not in rows for rows in engine.rows)


async def test_an_engine_that_breaks_is_opened_again(made: Plan) -> None:
    engine = Gated(made)
    async with loaded(made, lambda: engine) as local:
        engine.breaks = True
        engine.go_on(999)
        with pytest.raises(Failed, match="broke"):
            await whole(local, GREEDY)
        assert await local.healthy()
        assert (await whole(local, GREEDY))[-1].usage == (5, 12)


async def test_an_engine_that_cannot_be_loaded_is_unavailable(made: Plan) -> None:
    def make() -> Engine:
        raise ConfigError("model.source=nowhere")

    local = Local("local", make, made.serve, "none", Metrics())
    with pytest.raises(ConfigError, match="nowhere"):
        await asyncio.wrap_future(local.ready)
    assert not await local.healthy()
    with pytest.raises(Unavailable):
        await whole(local, GREEDY)
    await local.close()


async def test_it_is_unavailable_before_it_is_loaded_and_after_it_was_stopped(made: Plan) -> None:
    wait, engine = threading.Event(), Gated(made)

    def make() -> Engine:
        wait.wait()
        return engine

    local = Local("local", make, made.serve, "none", Metrics())
    assert not await local.healthy()
    with pytest.raises(Unavailable):
        await whole(local, GREEDY)
    wait.set()
    await asyncio.wrap_future(local.ready)
    running = asyncio.ensure_future(whole(local, GREEDY))
    await asyncio.to_thread(engine.waits.wait)
    closing = asyncio.ensure_future(local.close())
    await asyncio.sleep(0)  # it has asked by now, and the answer cannot end first
    engine.go_on(999)
    await closing
    with pytest.raises(Unavailable):
        await running
    assert not await local.healthy()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"prompt": ""}, Invalid, "the prompt is empty"),
        ({"prompt": (1, 256)}, Invalid, "token ids are from 0 to 255"),
        ({"prompt": (1, -1)}, Invalid, "token ids are from 0 to 255"),
        ({"prompt": "x" * 71}, TooLong, "the prompt has 71 tokens; at most 70 are allowed"),
        ({"prompt": "x" * 71, "max_tokens": None}, TooLong, "at most 70"),
        ({"prompt": "x" * 60, "max_tokens": 21}, TooLong, "60 tokens of prompt and 21 of answer; 80 are allowed"),
    ],
)
async def test_what_does_not_fit_is_refused(
    made: Plan, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    limited = replace(made, serve=replace(made.serve, max_prompt_tokens=70))
    async with loaded(limited, lambda: FakeEngine(made)) as local:
        with pytest.raises(error, match=says):
            await whole(local, replace(GREEDY, **change))
        assert (await whole(local, GREEDY))[-1].finish == "length"


async def test_without_a_length_as_much_as_fits(made: Plan) -> None:
    async with loaded(made, lambda: FakeEngine(made)) as local:
        for prompt, tokens in (("x" * 10, 64), ("x" * 50, 30)):
            *_, last = await whole(local, replace(GREEDY, prompt=prompt, max_tokens=None))
            assert last.usage == (len(prompt), tokens)


class TestTinyModel:
    """By the real engine, in float32: the text is ``generate``'s, whatever else is going on."""

    @pytest.fixture
    def real(self, overrides: list[str]) -> Plan:
        chosen = ("draft=layerskip", "K=3", "hardware.threads=1", "serve.max_batch=3", "serve.max_model_len=100")
        return planned(*overrides, *chosen)

    @pytest.mark.parametrize("order", ["fcfs", "chunked_prefill"])
    async def test_text_sampled_or_not(self, real: Plan, order: str) -> None:
        calls = [
            replace(GREEDY, prompt="a model drafts tokens and another verifies them", max_tokens=20),
            replace(GREEDY, prompt=None, messages=({"role": "user", "content": "so nothing is lost"},), max_tokens=9),
            replace(GREEDY, prompt=(7, 9, 11), temperature=1.0, seed=5, max_tokens=20),
            replace(GREEDY, prompt=(7, 9, 11), temperature=1.0, seed=6, max_tokens=20, top_p=0.9, top_k=30),
            replace(GREEDY, prompt=(7, 9, 11), temperature=1.0, top_p=0.0, max_tokens=20),
        ]
        engine = TorchEngine(real)
        rejecting = TorchEngine(replace(real, policy=POLICY.new("rejection", temperature=1.0)))

        def generated(tokens: list[int], new: int, sampling: Sampling, chat: bool = False) -> str:
            (done,) = rejecting.generate([Request(tuple(tokens), new, sampling=sampling)], plain=True)
            before = () if chat else tokens
            whole = engine.tokenizer.decode([*before, *done.tokens])
            return whole.removeprefix(engine.tokenizer.decode(before))

        wanted = [
            generated(engine.tokenizer.encode(str(calls[0].prompt), chat=False), 20, Sampling()),
            generated(engine.tokenizer.encode("so nothing is lost", chat=True), 9, Sampling(), chat=True),
            generated([7, 9, 11], 20, Sampling(1.0, seed=5)),
            generated([7, 9, 11], 20, Sampling(1.0, 30, 0.9, 6)),
            generated([7, 9, 11], 20, Sampling()),
        ]
        assert len({*wanted[2:]}) == 3
        serve = replace(real.serve, scheduler=type(real.serve.scheduler)[order], chunk=4)
        async with loaded(replace(real, serve=serve), lambda: engine) as local:
            got = await asyncio.gather(*(whole(local, call) for call in calls))
        assert [said(chunks) for chunks in got] == wanted

    async def test_logprobs(self, real: Plan) -> None:
        async with loaded(real, lambda: TorchEngine(real)) as local:
            chunks = await whole(local, replace(GREEDY, prompt="a model drafts", max_tokens=8, logprobs=2))
        given = [each for chunk in chunks for each in chunk.logprobs or []]
        ended = chunks[-1].finish == "stop"
        assert chunks[-1].usage is not None and len(given) == chunks[-1].usage.completion_tokens - ended
        for each in given:
            assert each.top[0][:3] == each[:3] and each.top[1].logprob <= each.logprob < 0
        assert "".join(each.token for each in given) == said(chunks)
