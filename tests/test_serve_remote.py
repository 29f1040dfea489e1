"""Other servers as back ends: over real HTTP, against our own gateway and against a server that misbehaves."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from http_servers import Rogue, event, sse
from hypothesis import given
from hypothesis import strategies as st
from plans import planned
from serving import Clock, serving

from selfspec.errors import ConfigError
from selfspec.serve import remote
from selfspec.serve.backend import Call, Chunk, Usage
from selfspec.serve.breaker import Breaker
from selfspec.serve.config import BackendConfig
from selfspec.serve.errors import Failed, Invalid, Overloaded, RequestError, TooLong, Unavailable
from selfspec.serve.remote import Remote

CALL = Call("c1", "m", prompt="hello", max_tokens=8, temperature=0.0)
LIMIT, NONE = 1e5, 1e6
"""Seconds that a server may take, where it hangs and where it does not: neither runs out by the clock."""


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.Timeout]:
    """Those of LIMIT seconds, as they begin: it is the server that lets them run out (see ``Rogue``)."""
    found = list[asyncio.Timeout]()

    def timeout(seconds: float) -> asyncio.Timeout:
        limit = asyncio.timeout(None)
        if seconds == LIMIT:
            found.append(limit)
        return limit

    monkeypatch.setattr(remote, "asyncio", SimpleNamespace(**vars(asyncio) | {"timeout": timeout}))
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    return found


def config(url: str, **settings: Any) -> BackendConfig:
    waits = dict.fromkeys(("connect_s", "first_s", "read_s"), NONE)
    return BackendConfig(**{"name": "other", "url": url, "model": "m", "retries": 1, **waits, **settings})


async def said(back_end: Remote, call: Call = CALL) -> list[Chunk]:
    return [chunk async for chunk in back_end.stream(call)]


@asynccontextmanager
async def against(rogue: Rogue, **settings: Any) -> AsyncIterator[Remote]:
    """A back end over a rogue server."""
    async with rogue.serving() as url:
        back_end = Remote(config(url, **settings), 512)
        try:
            yield back_end
        finally:
            await back_end.close()


@pytest.mark.parametrize("chat", [False, True])
async def test_the_answer_is_what_our_own_gateway_says(fake: list[str], chat: bool) -> None:
    """Streamed through a second server and back, greedily and drawn by a seed, it is the same text and usage."""
    asked = {"messages": ({"role": "user", "content": "hello"},), "prompt": None} if chat else {}
    call = replace(CALL, model="tiny", logprobs=2, ignore_eos=True, **asked)  # type: ignore[arg-type]
    with serving(planned(*fake)) as server:
        back_end = Remote(config(f"{server.url}/v1", model="tiny"), 512)
        for each in (call, replace(call, temperature=0.7, seed=3, stop=("zzzz",))):
            here = [chunk async for chunk in server.gateway.answer(each)]
            there = await said(back_end, each)
            assert "".join(c.text for c in there) == "".join(c.text for c in here)
            assert (there[-1].finish, there[-1].usage) == (here[-1].finish, here[-1].usage)
            assert sum(c.tokens for c in there) == 8
            logprobs = [[one.logprob for c in chunks for one in c.logprobs or ()] for chunks in (here, there)]
            assert logprobs[0] == logprobs[1] and len(logprobs[0]) == 8
            tops = [len(one.top) for c in there for one in c.logprobs or ()]
            assert all(0 < top <= 2 for top in tops)  # alternatives of the same text become one in a JSON object
        assert await back_end.healthy()
        await back_end.close()


async def test_leaving_closes_the_upstream_connection() -> None:
    rogue = Rogue("endless")
    async with against(rogue) as back_end:
        stream = back_end.stream(CALL)
        assert isinstance(stream, AsyncGenerator), "by the contract: closing it cancels the work"
        async with aclosing(stream) as chunks:
            assert (await anext(chunks)).text == "a"
        await rogue.left.wait()
        assert back_end.breaker.state == "closed"


async def test_cancelling_while_waiting_for_the_first_token_says_nothing_of_the_server() -> None:
    rogue = Rogue("hang")
    async with against(rogue, breaker_threshold=1) as back_end:
        task = asyncio.ensure_future(said(back_end))
        while not rogue.calls:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert back_end.breaker.state == "closed"


@pytest.mark.parametrize(
    "first",
    [
        500,
        503,
        429,
        408,
        "reset",
        [],
        [sse("{broken")],
        [sse({"error": {"message": "no"}})],
        "hang",
        [b": wait\n\n", "hang"],
    ],
    ids=str,
)
async def test_before_the_first_token_a_call_is_tried_again(first: Any, limits: list[asyncio.Timeout]) -> None:
    rogue = Rogue(first, "ok", limits=limits)
    async with against(rogue, first_s=LIMIT) as back_end:
        chunks = await said(back_end)
    assert [c.text for c in chunks] == ["a", "b", ""] and rogue.calls == 2
    assert chunks[-1].finish == "stop" and chunks[-1].usage == Usage(0, 2)


@pytest.mark.parametrize(
    ("behaviour", "kind", "calls"),
    [
        (500, Unavailable, 3),
        ("reset", Unavailable, 3),
        ("hang", Unavailable, 3),
        ([], Unavailable, 3),
        (429, Overloaded, 3),
        (401, Unavailable, 3),
        ((400, {"error": {"message": "temperature: no", "param": "temperature"}}), Invalid, 1),
        ((400, {"error": {"message": "m", "code": "context_length_exceeded"}}), TooLong, 1),
        ((400, {"error": {"message": "This model's maximum context length is 8"}}), TooLong, 1),
        ([event("a"), sse("{broken")], Failed, 1),
        ([event("a")], Failed, 1),
        ([event("a"), "hang"], Failed, 1),
    ],
    ids=str,
)
async def test_each_failure_has_its_error(
    behaviour: Any, kind: type[RequestError], calls: int, limits: list[asyncio.Timeout]
) -> None:
    """A broken answer is never begun again, and what the caller did wrong is not tried twice."""
    rogue = Rogue(behaviour, limits=limits)
    waits: Any = {"first_s" if behaviour == "hang" else "read_s": LIMIT}
    with pytest.raises(RequestError) as caught:
        async with against(rogue, retries=2, **waits) as back_end:
            await said(back_end)
    assert type(caught.value) is kind and rogue.calls == calls


async def test_a_closed_port_is_unavailable(closed_port: int) -> None:
    back_end = Remote(config(f"http://127.0.0.1:{closed_port}/v1"), 512)
    with pytest.raises(Unavailable, match="other: cannot be reached"):
        await said(back_end)
    assert not await back_end.healthy()
    await back_end.close()


async def test_the_breaker_leaves_a_failing_server_alone_and_probes_it() -> None:
    rogue = Rogue(500, 500, "ok")
    async with against(rogue, retries=0, breaker_threshold=2, breaker_reset_s=1000) as back_end:
        for _ in range(2):
            with pytest.raises(Unavailable):
                await said(back_end)
        assert back_end.breaker.state == "open" and not await back_end.healthy()
        with pytest.raises(Unavailable, match="left alone"):
            await said(back_end)
        assert rogue.calls == 2
        back_end.breaker._opened = -1e9  # long ago
        assert back_end.breaker.state == "half_open"
        assert (await said(back_end))[-1].finish == "stop"
        assert back_end.breaker.state == "closed"


async def test_health_follows_the_server() -> None:
    rogue = Rogue("ok")
    async with against(rogue) as back_end:
        assert await back_end.healthy()
        rogue.well = False
        assert not await back_end.healthy()


async def test_the_key_comes_from_the_environment_and_is_told_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTHER_KEY", "secret-key")
    caplog.set_level(logging.DEBUG)
    rogue = Rogue(401)
    async with against(rogue, key_env="OTHER_KEY") as back_end:
        with pytest.raises(Unavailable) as caught:
            await said(back_end)
    assert "Bearer secret-key" in rogue.headers
    assert "secret-key" not in str(caught.value) + caplog.text
    monkeypatch.delenv("OTHER_KEY")
    with pytest.raises(ConfigError, match="other: key_env=OTHER_KEY: the environment has none"):
        Remote(config("http://127.0.0.1:9/v1", key_env="OTHER_KEY"), 512)


async def test_only_what_is_asked_for_is_sent() -> None:
    """Servers refuse fields they do not know: ours go to those who asked for them."""
    rogue = Rogue("ok")
    async with against(rogue) as back_end:
        await said(back_end)
        full = replace(CALL, top_k=5, seed=1, stop=("x",), ignore_eos=True, logprobs=0)
        await said(back_end, full)
    usual = {"model", "prompt", "max_tokens", "temperature", "top_p", "stream", "stream_options"}
    assert rogue.asked[0].keys() == usual
    assert rogue.asked[1].items() >= {"top_k": 5, "seed": 1, "stop": ["x"], "ignore_eos": True, "logprobs": 0}.items()


async def test_what_a_server_does_not_count_is_set_right_at_the_end() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    last = {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [], "usage": usage}
    async with against(Rogue([event("two tokens"), event("", "length"), sse(last), sse("[DONE]")])) as back_end:
        chunks = await said(back_end)
    assert [c.tokens for c in chunks] == [1, 4] and chunks[-1].usage == Usage(3, 5) and chunks[-1].finish == "length"


@given(st.lists(st.sampled_from(["good", "bad", "left", "wait"]), max_size=60), st.integers(1, 4))
def test_a_breaker_opens_after_so_many_failures_in_a_row_and_never_sooner(events: list[str], limit: int) -> None:
    clock = Clock()
    breaker, row = Breaker(limit, 10.0, clock), 0
    for happened in events:
        clock.now += 11.0 if happened == "wait" else 1e-3
        if happened == "wait":
            assert breaker.allows
            continue
        assert breaker.allows == (breaker.state != "open")
        assert (breaker.state == "closed") == (row < limit)
        if not breaker.allows:
            continue
        probe = breaker.state == "half_open"
        breaker.begin()
        assert breaker.allows != probe  # one probe at a time
        if happened == "good":
            breaker.succeeded()
            row = 0
        elif happened == "bad":
            breaker.failed()
            row += 1
            assert (breaker.state == "open") == (row >= limit)
        else:
            breaker.abandoned()
