"""A back end that means harm, over real HTTP: callers are told nothing of ours, and nothing of it stops the gateway."""

import asyncio
import base64
import gzip
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import httpx2
import psutil
import pytest
from http_servers import Rogue, event, sse
from plans import planned
from serving import listening

from selfspec import outbound
from selfspec.engine.openai.client import Server
from selfspec.errors import StageError
from selfspec.serve import remote
from selfspec.serve.build import Fixed
from selfspec.serve.cache import AnswerCache
from selfspec.serve.config import BackendConfig
from selfspec.serve.gateway import Gateway
from selfspec.serve.metrics import Metrics
from selfspec.serve.remote import Remote
from selfspec.types import Request

pytestmark = pytest.mark.slow

KEY = "sk-upstream-0123456789"
ASKED = {"model": "m", "prompt": "hello", "max_tokens": 8, "temperature": 0}
MOST = 16


def piece(**fields: Any) -> bytes:
    return sse({"choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None} | fields]})


def counted(**usage: Any) -> list[bytes]:
    """A short answer with these counts."""
    return [event("a"), event("b", "stop"), sse({"choices": [], "usage": usage}), sse("[DONE]")]


@asynccontextmanager
async def over(*behaviours: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[httpx2.AsyncClient, Rogue]]:
    """A gateway over a rogue server that knows a key, and who asks it; it is well at the end."""
    monkeypatch.setenv("UPSTREAM_KEY", KEY)
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    rogue, settings = Rogue(*behaviours), planned("engine=fake", "draft=none").serve
    settings = replace(settings, max_tokens=MOST)
    async with rogue.serving() as url:
        config = BackendConfig(
            name="other", url=url, model="m", key_env="UPSTREAM_KEY", retries=0, breaker_threshold=99
        )
        gateway = Gateway(settings, Fixed(["m"], Remote(config, MOST)), AnswerCache(settings.cache), Metrics())
        with listening(gateway) as here:
            async with httpx2.AsyncClient(base_url=here, timeout=None) as client:
                yield client, rogue
                assert (await client.get("/health")).status_code == 200
                assert (await client.get("/metrics")).status_code == 200
        assert gateway.active == 0


async def asked(client: httpx2.AsyncClient, **more: Any) -> tuple[int, str]:
    """Status and text of an answer."""
    path = "/v1/chat/completions" if "messages" in more else "/v1/completions"
    body = {name: value for name, value in (ASKED | more).items() if value is not None}
    answer = await client.post(path, json=body)
    return answer.status_code, answer.text


@pytest.mark.parametrize("count", [2_000_000_000, 10**30])
async def test_counts_are_held_to_what_was_asked(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    told = counted(prompt_tokens=count, completion_tokens=count, total_tokens=count)
    async with over(told, monkeypatch=monkeypatch) as (client, _):
        status, text = await asked(client)
        usage = json.loads(text)["usage"]
        assert status == 200 and usage["completion_tokens"] == 8 and usage["prompt_tokens"] < 10_000
        observed = re.search(r"inter_token_seconds_count\S+ (\S+)", (await client.get("/metrics")).text)
        assert observed is not None and float(observed[1]) <= 8


LOGPROBS = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}], "text_offset": [0]}
WRONG = {
    **{f"usage {value!r}": counted(prompt_tokens=1, completion_tokens=value) for value in (-1, "5", 1.5, [], True)},
    "infinite usage": [event("a", "stop"), b'data: {"choices":[],"usage":{"completion_tokens":1e999}}\n\n'],
    "usage of no kind": [event("a", "stop"), sse({"choices": [], "usage": 7})],
    **{f"text {value!r}": [piece(text=value)] for value in (5, ["x"], {}, True)},
    "half a surrogate pair": [b'data: {"choices":[{"index":0,"text":"\\ud800","finish_reason":"stop"}]}\n\n'],
    "a surrogate as its reason": [b'data: {"choices":[{"index":0,"text":"a","finish_reason":"\\udfff"}]}\n\n'],
    "bytes that are no text": [b"data: \xff\xfe\n\n"],
    **{f"choices {value!r}": [sse({"choices": value})] for value in (5, "x", [5], [None], {"0": 1})},
    **{f"an event {value!r}": [sse(value)] for value in (5, [], [[]], None, True)},
    "deep nesting": [sse("[" * 50_000)],
    **{
        f"logprobs {name} {value!r}": [piece(logprobs=LOGPROBS | {name: value})]
        for name, value in (
            *(("tokens", ["\ud800"]), ("tokens", ["a", "b"]), ("tokens", 5), ("token_logprobs", [float("nan")])),
            *(("token_logprobs", ["x"]), ("top_logprobs", [{"a": float("inf")}]), ("text_offset", [-1])),
        )
    },
}
ENDLESS = {
    "a line": [b"data: "] + [b"x" * 65_536] * 64,
    "an event of lines": [b"data: x\n" * 8_192] * 64,
    "comments": [b": wait\n\n" * 8_192] * 64,
    "one token of much text": [piece(text="x" * 100_000)],
    "events without choices": [sse({"choices": []}) * 4_096] * 64,
}


@pytest.mark.parametrize("begun", [False, True])
async def test_what_is_no_answer_is_a_broken_back_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, begun: bool
) -> None:
    """In one line, and without a traceback; whether some of it has been passed on or not."""
    async with over(monkeypatch=monkeypatch) as (client, rogue):
        for name, behaviour in (WRONG | ENDLESS).items():
            rogue.behaviours = [[event("ok"), *behaviour] if begun else behaviour]
            status, text = await asked(client, logprobs=1)
            error = json.loads(text).get("error", {"message": text})
            assert error["message"].startswith("other: its answer") and len(error["message"]) < 100, (name, text[:500])
            assert status in ((500,) if begun else (500, 503)), name
            streamed = (await asked(client, stream=True, logprobs=1))[1]
            assert "other: its answer" in streamed and "[DONE]" not in streamed, name
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_an_endless_answer_ends_where_it_was_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it counts; and the connection is closed."""
    logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for more, behaviour in (({}, "endless"), ({"logprobs": 1}, [piece(logprobs=logprobs)] * 5_000)):
        async with over(behaviour, monkeypatch=monkeypatch) as (client, rogue):
            status, text = await asked(client, **more)
            (choice,) = json.loads(text)["choices"]
            assert status == 200 and choice["finish_reason"] == "length"
            assert 8 <= len(choice["text"]) <= 9 and json.loads(text)["usage"]["completion_tokens"] <= 8
            if behaviour == "endless":
                await rogue.left.wait()


async def test_a_chat_without_a_limit_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    said = sse({"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]})
    chat = {"messages": [{"role": "user", "content": "x"}], "prompt": None, "max_tokens": None}
    async with over([said] * 5_000, monkeypatch=monkeypatch) as (client, _):
        status, text = await asked(client, **chat)
        (choice,) = json.loads(text)["choices"]
        assert status == 200 and choice["finish_reason"] == "length" and len(choice["message"]["content"]) <= MOST + 1


async def test_an_endless_line_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async with over([b"data: "] + [b"x" * 2**20] * 300, monkeypatch=monkeypatch) as (client, _):
        before = psutil.Process().memory_info().rss
        assert (await asked(client))[0] == 503
        assert psutil.Process().memory_info().rss - before < 100 * 2**20


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    elsewhere = Rogue("ok")
    async with elsewhere.serving() as url:
        head = f"HTTP/1.1 {status} X\r\nlocation: {url}/completions\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        async with over(b"", monkeypatch=monkeypatch) as (client, rogue):
            rogue._behave = raw(head.encode())  # type: ignore[method-assign]
            code, text = await asked(client)
    assert code == 503 and f"status {status}" in text and not elsewhere.headers


async def test_nothing_compressed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(b"data: " + b"x" * 50_000_000)
    head = f"HTTP/1.1 200 X\r\ncontent-encoding: gzip\r\ncontent-length: {len(packed)}\r\n\r\n"
    async with over(b"", monkeypatch=monkeypatch) as (client, rogue):
        rogue._behave = raw(head.encode() + packed)  # type: ignore[method-assign]
        assert (await asked(client))[0] == 503
        assert "accept-encoding: identity" in rogue.headers.lower()


def raw(sent: bytes) -> Any:
    async def behave(behaviour: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()

    return behave


FORMS = (
    KEY,
    f"Authorization: Bearer {KEY}",
    KEY.upper(),
    f"{KEY[:10]}...",
    f"...{KEY[-9:]}",
    " ".join(KEY),
    "\n".join((KEY[:11], KEY[11:])),
    KEY.replace("-", "%2D"),
    base64.b64encode(KEY.encode()).decode(),
    KEY.encode().hex(),
)


async def test_our_key_is_in_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "selfspec")
    async with over(monkeypatch=monkeypatch) as (client, rogue):
        for form, status in [*product(FORMS, (400,)), *product((KEY,), (401, 403, 413, 422, 429, 500))]:
            body = {"message": f"you sent {form}", "param": form, "code": form, "type": form}
            for said in ({"error": body}, {"detail": form}, form, [form]):
                rogue.behaviours = [(status, said)]
                caplog.clear()
                _, text = await asked(client)
                ours = [record.getMessage() for record in caplog.records if record.name.startswith("selfspec")]
                assert not any(outbound.quotes(told, KEY) for told in (text, *ours)), (form, status, said, text)


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_our_key_is_in_no_answer(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    said = f"a {KEY} b"
    pieces = [event(said[at : at + size]) for at in range(0, len(said), size)]
    async with over([*pieces, event("", "stop")], monkeypatch=monkeypatch) as (client, _):
        for stream in (False, True):
            _, text = await asked(client, stream=stream, max_tokens=None)
            assert "sk-" not in text and "its answer is none" in text
    told = piece(logprobs=LOGPROBS | {"top_logprobs": [{KEY: -1.0}]})
    async with over([told, event("", "stop")], monkeypatch=monkeypatch) as (client, _):
        assert "sk-" not in (await asked(client, logprobs=1))[1]


async def test_a_server_that_is_measured_is_trusted_no_more() -> None:
    """By ``engine=openai``: no redirect, no key in what is written down, and no end of memory."""
    elsewhere = Rogue("ok")
    async with elsewhere.serving() as there, (rogue := Rogue("")).serving() as url:
        server = Server("engine.url", url, KEY, lambda text, stopped: list(text.encode()))
        server.__dict__["_listed"] = SimpleNamespace(id="m", owned_by="other")
        head = f"HTTP/1.1 307 X\r\nlocation: {there}/completions\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        told = list[str]()
        for behaviour in WRONG.values():
            rogue.behaviours = [behaviour]
            with suppress(StageError):  # some of it says nothing that is looked at
                await asyncio.to_thread(server.answer, Request((1, 2), 4))
        for behaviour in ((400, {"error": {"message": KEY}}), [b"data: "] + [b"x" * 2**20] * 99, head):
            rogue.behaviours = [behaviour]
            if behaviour is head:
                rogue._behave = raw(head.encode())  # type: ignore[method-assign]
            with pytest.raises(StageError) as failed:
                await asyncio.to_thread(server.answer, Request((1, 2), 4))
            told.append(str(failed.value))
        assert KEY not in "".join(told) and "without an end" in told[1] and not elsewhere.headers
        server.close()


async def test_an_honest_answer_passes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it begins as the key does; and an error that tells what the caller did wrong."""
    said = ["s", "sk", "-up", " sks", "k-u", "sk-"]
    async with over([*map(event, said), event("", "stop")], monkeypatch=monkeypatch) as (client, _):
        assert json.loads((await asked(client))[1])["choices"][0]["text"] == "".join(said)
    wrong = (400, {"error": {"message": "temperature: is too much", "param": "temperature"}})
    async with over(wrong, monkeypatch=monkeypatch) as (client, _):
        status, text = await asked(client)
        error = json.loads(text)["error"]
        assert (status, error["message"], error["param"]) == (400, "temperature: is too much", "temperature")
    odd = (400, {"error": {"message": "\ud800 \x1b[31m\n x", "param": "\udfff"}})
    async with over(odd, monkeypatch=monkeypatch) as (client, _):
        status, text = await asked(client)
        assert status == 400 and json.loads(text)["error"]["message"].isprintable()
