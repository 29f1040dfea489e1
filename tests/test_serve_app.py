"""The gateway over real HTTP: what OpenAI's own client makes of it, and what it says to those who ask wrongly."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection, HTTPResponse
from typing import TYPE_CHECKING, Any

import pytest
from plans import planned
from serving import Gated, Scripted, Serving, listening, request, says, serving

from selfspec.engine.fake.engine import FakeEngine
from selfspec.plan import Plan
from selfspec.serve.backend import Call, Chunk, Route
from selfspec.serve.build import Fixed
from selfspec.serve.cache import AnswerCache
from selfspec.serve.config import CacheConfig, CacheMode
from selfspec.serve.errors import Failed, Overloaded, Unavailable
from selfspec.serve.gateway import Gateway
from selfspec.serve.metrics import Metrics

if TYPE_CHECKING:
    import openai

MODEL = "tiny"
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def made() -> Plan:
    limits = (
        *("max_model_len=200", "max_tokens=100", "max_concurrent_requests=4", "max_body_bytes=5000", "max_batch=2"),
        "client_timeout_s=1e6",
    )
    fake = ("engine=fake", "draft=layerskip", "model.name=tiny", "model.layers=16")
    return planned(*fake, *(f"serve.{limit}" for limit in limits))


@pytest.fixture(scope="module")
def server(made: Plan) -> Iterator[Serving]:
    with serving(made) as made_serving:
        yield made_serving


def client(url: str, key: str = "any") -> "openai.OpenAI":
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=None)


def answered(prompt: str, new: int, plan: Plan) -> str:
    engine = FakeEngine(plan)
    return engine.tokenizer.decode(engine.generate([request(prompt, new)])[0].tokens)


def post(url: str, path: str, body: bytes | dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer."""
    status, got, _ = sent(url, "POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), **headers)
    return status, json.loads(got)


def raw(url: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which a completion has been asked for."""
    told = json.dumps(body).encode()
    return opened(url, told, len(told))


def opened(url: str, told: bytes, length: int) -> socket.socket:
    """A connection on which the head of a request and so much of its body have been sent, at once."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}content-length: {length}\r\n\r\n".encode() + told)
    return connection


def sent(url: str, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = HTTPConnection(url.removeprefix("http://"))
    try:
        named = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, body, named)
        response = connection.getresponse()
        return response.status, response.read(), {k.lower(): v for k, v in response.getheaders()}
    finally:
        connection.close()


@contextmanager
def over(script: Sequence[Chunk | Exception], settings: Any, **parts: Any) -> Iterator[tuple[str, Scripted, Gateway]]:
    """A server over a scripted back end."""
    backend = Scripted(script)
    gateway = Gateway(settings, Fixed([MODEL], backend), parts.pop("cache", None), Metrics())
    with listening(gateway, **parts) as url:
        yield url, backend, gateway


class TestOpenAIClient:
    def test_completions(self, server: Serving, made: Plan) -> None:
        got = client(server.url).completions.create(model=MODEL, prompt="hello", max_tokens=9, temperature=0)
        (choice,) = got.choices
        assert (choice.text, choice.finish_reason, choice.index) == (answered("hello", 9, made), "length", 0)
        assert got.usage is not None
        assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (5, 9, 14)
        assert got.object == "text_completion" and got.model == MODEL and got.id.startswith("cmpl-")
        got = client(server.url).completions.create(model=MODEL, prompt="hello")
        assert got.usage is not None and got.usage.completion_tokens == 16, "unless more are asked for"

    def test_chat(self, server: Serving, made: Plan) -> None:
        got = client(server.url).chat.completions.create(model=MODEL, messages=CHAT, max_tokens=9, temperature=0)  # type: ignore[call-overload]
        (choice,) = got.choices
        assert choice.message.content == answered("<user>hello", 9, made) and choice.message.role == "assistant"
        assert got.object == "chat.completion" and got.id.startswith("chatcmpl-")
        assert got.usage.completion_tokens == 9
        got = client(server.url).chat.completions.create(model=MODEL, messages=CHAT)  # type: ignore[arg-type]
        assert got.usage.completion_tokens == 100, "at length, unless told otherwise"

    @pytest.mark.parametrize("include_usage", [True, False])
    def test_a_stream_is_the_whole_answer_in_pieces(self, server: Serving, made: Plan, include_usage: bool) -> None:
        asked: Any = {"stream": True, "stream_options": {"include_usage": include_usage}, "temperature": 0}
        asked |= {"model": MODEL, "max_tokens": 20}
        for kind, wanted in (("chat", answered("<user>hello", 20, made)), ("text", answered("hello", 20, made))):
            api = client(server.url)
            if kind == "chat":
                events = list(api.chat.completions.create(messages=CHAT, **asked))
                texts = [choice.delta.content or "" for event in events for choice in event.choices]
                assert events[0].choices[0].delta.role == "assistant"
                assert all(event.object == "chat.completion.chunk" for event in events)
            else:
                events = list(api.completions.create(prompt="hello", **asked))
                texts = [choice.text for event in events for choice in event.choices]
            assert "".join(texts) == wanted and len(texts) > 3
            assert len({event.id for event in events}) == 1
            reasons = [choice.finish_reason for event in events for choice in event.choices]
            assert reasons == [None] * (len(reasons) - 1) + ["length"]
            usages = [event.usage for event in events if event.usage is not None]
            assert [usage.completion_tokens for usage in usages] == [20] * include_usage
            assert (events[-1].choices == []) == include_usage

    def test_stop_texts(self, server: Serving, made: Plan) -> None:
        text = answered("hello", 40, made)
        stop = next(text[i : i + 2] for i in range(9, 40) if text[i : i + 2].isascii())
        for stops in (stop, [stop], ["never", stop]):
            asked: Any = {"model": MODEL, "prompt": "hello", "max_tokens": 40, "temperature": 0, "stop": stops}
            got = client(server.url).completions.create(**asked)
            assert (got.choices[0].text, got.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
            pieces = list(client(server.url).completions.create(**asked, stream=True))
            assert "".join(event.choices[0].text for event in pieces) == text[: text.index(stop)]

    def test_logprobs(self, server: Serving) -> None:
        api = client(server.url)
        text = api.completions.create(model=MODEL, prompt="hello", max_tokens=3, logprobs=2, temperature=0)
        found = text.choices[0].logprobs
        assert found is not None and found.tokens is not None and len(found.tokens) == 3
        assert found.token_logprobs == pytest.approx([-5.545] * 3, abs=1e-3)
        assert [len(top) for top in found.top_logprobs or []] == [2] * 3
        asked: Any = {"model": MODEL, "messages": CHAT, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
        chat = api.chat.completions.create(**asked)
        assert [len(each.top_logprobs) for each in chat.choices[0].logprobs.content] == [2] * 5
        events = list(api.chat.completions.create(**asked, stream=True))
        pieces = [each for e in events for c in e.choices if c.logprobs for each in c.logprobs.content or []]
        assert len(pieces) == 5
        for each in chat.choices[0].logprobs.content:  # a token is a byte
            (byte,) = each.bytes or []
            assert each.token == (chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}")

    def test_statistics_on_demand(self, server: Serving) -> None:
        asked: Any = {"model": MODEL, "prompt": "hello", "max_tokens": 20, "extra_body": {"selfspec": {"stats": True}}}
        stats = client(server.url).completions.create(**asked).selfspec  # type: ignore[attr-defined]
        assert stats.keys() >= {"cycles", "proposed", "accepted", "acceptance", "acceptance_length", "queue_ms"}
        assert stats["backend"] == "local" and stats["cache"] == "off" and stats["ttft_ms"] <= stats["total_ms"]
        events = list(client(server.url).completions.create(**asked, stream=True))
        assert [hasattr(event, "selfspec") for event in events] == [False] * (len(events) - 1) + [True]
        del asked["extra_body"]
        assert not hasattr(client(server.url).completions.create(**asked), "selfspec")

    def test_models(self, server: Serving) -> None:
        import openai

        api = client(server.url)
        assert MODEL in [model.id for model in api.models.list()]
        assert api.models.retrieve(MODEL).owned_by == "selfspec"
        with pytest.raises(openai.NotFoundError):
            api.models.retrieve("other")

    def test_many_streams_at_once(self, made: Plan) -> None:
        import openai

        prompts = [f"prompt {i}" for i in range(16)]
        with serving(replace(made, serve=replace(made.serve, max_concurrent_requests=16))) as server:
            api = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=None)

            async def one(prompt: str, new: int) -> str:
                asked: Any = {"model": MODEL, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
                return "".join([event.choices[0].text async for event in await api.completions.create(**asked)])

            async def all_of_them() -> list[str]:
                try:
                    return await asyncio.gather(*(one(prompt, 5 + 4 * i) for i, prompt in enumerate(prompts)))
                finally:
                    await api.close()

            got = asyncio.run(all_of_them())
            assert got == [answered(prompt, 5 + 4 * i, made) for i, prompt in enumerate(prompts)]
            assert server.gateway.active == 0 and server.local._callers == {} and server.local._load == (0, 0, 0.0)

    def test_errors_are_the_clients_own(self, server: Serving) -> None:
        import openai

        api = client(server.url)
        with pytest.raises(openai.BadRequestError) as wrong:
            api.completions.create(model=MODEL, prompt="x", temperature=3)
        assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError) as unknown:
            api.completions.create(model="other", prompt="x")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            api.completions.create(model=MODEL, prompt="x" * 200, max_tokens=5)
        assert long.value.code == "context_length_exceeded"


OK = {"model": MODEL, "prompt": "hello", "max_tokens": 3}
OK_CHAT = {"model": MODEL, "messages": CHAT, "max_tokens": 3}


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"prompt": None}, "prompt"),
            ({"prompt": 5}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": []}, "prompt"),
            ({"prompt": ["a", "b"]}, "prompt"),
            ({"prompt": [[1], [2]]}, "prompt"),
            ({"prompt": [1, "a"]}, "prompt"),
            ({"prompt": [-1]}, "prompt"),
            ({"prompt": [256]}, "prompt"),
            ({"prompt": "\ud800"}, "prompt"),
            ({"model": 5}, "model"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": "9"}, "max_tokens"),
            ({"max_tokens": 101}, "max_tokens"),
            ({"max_tokens": 1.5}, "max_tokens"),
            ({"max_tokens": True}, "max_tokens"),
            ({"temperature": -1}, "temperature"),
            ({"temperature": float("nan")}, "temperature"),
            ({"temperature": float("inf")}, "temperature"),
            ({"top_p": 1.1}, "top_p"),
            ({"top_k": -2}, "top_k"),
            ({"n": 2}, "n"),
            ({"best_of": 2}, "best_of"),
            ({"echo": True}, "echo"),
            ({"suffix": "x"}, "suffix"),
            ({"seed": 2**64}, "seed"),
            ({"stop": ""}, "stop"),
            ({"stop": ["a"] * 5}, "stop"),
            ({"stop": ["a", 1]}, "stop"),
            ({"stream": "yes"}, "stream"),
            ({"stream_options": {"include_usage": True}}, None),
            ({"stream": True, "stream_options": {"other": 1}}, "stream_options"),
            ({"logprobs": 6}, "logprobs"),
            ({"frequency_penalty": 0.5}, "frequency_penalty"),
            ({"logit_bias": {"5": 1.0}}, "logit_bias"),
            ({"tools": []}, "tools"),
            ({"selfspec": {"other": 1}}, "selfspec"),
        ],
    )
    def test_a_wrong_completion_field_is_named(
        self, server: Serving, change: dict[str, Any], param: str | None
    ) -> None:
        status, got = post(server.url, "/v1/completions", OK | change)
        error = got["error"]
        assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
        assert error["message"] and "\n" not in error["message"]
        assert post(server.url, "/v1/completions", OK)[0] == 200

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": "hello"}, "messages"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
            ({"messages": [{"role": "user"}]}, "messages"),
            ({"messages": [{"role": "user", "content": None}]}, "messages"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
            ({"top_logprobs": 2}, None),
            ({"logprobs": 5}, "logprobs"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"prompt": "x"}, "prompt"),
        ],
    )
    def test_a_wrong_chat_field_is_named(self, server: Serving, change: dict[str, Any], param: str | None) -> None:
        status, got = post(server.url, "/v1/chat/completions", OK_CHAT | change)
        assert (status, got["error"]["param"]) == (400, param)

    @pytest.mark.parametrize(
        "change",
        [
            {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
            {"functions": [], "function_call": "none", "service_tier": "auto", "n": 1, "store": False},
            {"modalities": ["text"], "audio": None, "prediction": None, "reasoning_effort": None},
            {"repetition_penalty": 1.0, "min_p": 0, "top_logprobs": 0, "logprobs": False, "logit_bias": {}},
            {"user": "me", "safety_identifier": "me", "prompt_cache_key": "k", "response_format": {"type": "text"}},
        ],
    )
    def test_what_asks_for_nothing_is_taken(self, server: Serving, change: dict[str, Any]) -> None:
        assert post(server.url, "/v1/chat/completions", OK_CHAT | change)[0] == 200

    def test_our_own_answer_is_taken_back(self, server: Serving) -> None:
        status, got = post(server.url, "/v1/chat/completions", OK_CHAT)
        said = got["choices"][0]["message"]
        theirs = said | {"tool_calls": [], "annotations": [], "function_call": None, "audio": None}
        for turn in (said, theirs):
            asked = OK_CHAT | {"messages": [*CHAT, turn, *CHAT]}
            assert (status, post(server.url, "/v1/chat/completions", asked)[0]) == (200, 200)

    def test_another_content_type_is_refused(self, server: Serving) -> None:
        status, got = post(server.url, "/v1/completions", json.dumps(OK).encode(), content_type="text/plain")
        assert status == 400 and "JSON" in got["error"]["message"]

    def test_unknown_paths_and_methods_are_refused(self, server: Serving) -> None:
        for method, path, wanted in (("GET", "/v1/completions", 405), ("POST", "/v1/other", 404), ("GET", "/", 404)):
            status, got, _ = sent(server.url, method, path)
            assert status == wanted and json.loads(got)["error"]["type"] == "invalid_request_error"

    def test_a_body_that_is_too_long_is_refused(self, server: Serving) -> None:
        """Whether it says so beforehand or not."""
        long = json.dumps(OK | {"prompt": "x" * 5000}).encode()
        assert post(server.url, "/v1/completions", long)[0] == 413
        connection = HTTPConnection(server.url.removeprefix("http://"))
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("transfer-encoding", "chunked")
        connection.endheaders()
        connection.send(b"%x\r\n%b\r\n" % (len(long), long))  # and no end of it
        assert connection.getresponse().status == 413
        connection.close()

    def test_a_body_that_does_not_come_is_timed_out(self, made: Plan) -> None:
        with over(says("a"), replace(made.serve, client_timeout_s=0.05)) as (url, backend, gateway):
            with opened(url, b'{"model"', 100) as connection, HTTPResponse(connection) as response:
                response.begin()
                assert response.status == 408 and json.loads(response.read())["error"]["code"] == "request_timeout"
            assert not backend.calls and gateway.active == 0

    def test_only_who_has_the_api_key_is_answered(self, made: Plan) -> None:
        with over(says("a"), made.serve, key="secret") as (url, backend, _):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                status, got = post(url, "/v1/completions", OK, **headers)
                assert (status, got["error"]["code"]) == (401, "invalid_api_key")
            assert not backend.calls
            assert client(url, "secret").completions.create(model=MODEL, prompt="x").choices[0].text == "a"
            assert sent(url, "GET", "/health")[0] == sent(url, "GET", "/metrics")[0] == 200
            assert sent(url, "GET", "/v1/models")[0] == 401
            (call,) = backend.calls
            assert call.key is not None and "secret" not in call.key

    def test_more_streams_than_allowed_are_refused(self, made: Plan) -> None:
        engine = Gated(made)
        with serving(made, lambda: engine) as server, ThreadPoolExecutor() as pool:
            running = [pool.submit(post, server.url, "/v1/completions", OK) for _ in range(4)]
            while server.gateway.active < 4:
                time.sleep(0.001)
            status, got, headers = sent(server.url, "POST", "/v1/completions", json.dumps(OK).encode())
            assert (status, json.loads(got)["error"]["code"]) == (429, "rate_limit_exceeded")
            assert headers["retry-after"] == "1"
            engine.go_on(999)
            assert [future.result()[0] for future in running] == [200] * 4
            assert post(server.url, "/v1/completions", OK)[0] == 200


class TestBackends:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(("error", "status"), [(Overloaded("x"), 429), (Unavailable("x"), 503), (Failed("x"), 500)])
    def test_what_breaks_before_the_first_chunk_has_a_status(
        self, made: Plan, error: Exception, status: int, stream: bool
    ) -> None:
        with over([error], made.serve) as (url, _, gateway):
            got = post(url, "/v1/completions", OK | {"stream": stream})
            assert got[0] == status and got[1]["error"]["message"] == "x" and gateway.active == 0
            assert f'kind="{type(error).__name__}"' in gateway.metrics.exposition().decode()

    def test_what_breaks_later_is_an_event(self, made: Plan) -> None:
        import openai

        with over([*says("a")[:1], Failed("broke off")], made.serve) as (url, _, _gateway):
            _, body, _ = sent(url, "POST", "/v1/completions", json.dumps(OK | {"stream": True}).encode())
            *_, last = body.decode().strip().split("\n\n")
            assert json.loads(last.removeprefix("data: "))["error"]["message"] == "broke off"
            with pytest.raises(openai.APIError, match="broke off"):
                list(client(url).completions.create(model=MODEL, prompt="x", stream=True))
            assert post(url, "/v1/completions", OK)[0] == 500

    def test_an_unforeseen_error_tells_no_details(self, made: Plan) -> None:
        with over([RuntimeError("secret detail")], made.serve) as (url, _, gateway):
            status, got = post(url, "/v1/completions", OK)
            assert status == 500 and got["error"]["type"] == "server_error" and "secret" not in str(got)
            assert gateway.active == 0

    def test_an_overloaded_back_end_is_stood_in_for(self, made: Plan) -> None:
        class Two(Fixed):
            async def routes(self, call: Call) -> Sequence[Route]:
                return [Route(busy, "test", "first"), Route(well, "test", "second")]

        busy, well = Scripted([Overloaded("busy")], "busy"), Scripted(says("b", stats={"cycles": 7}), "well")
        gateway = Gateway(made.serve, Two([MODEL], well), None, Metrics())
        with listening(gateway) as url:
            _, got = post(url, "/v1/completions", OK | {"selfspec": {"stats": True}})
        assert got["choices"][0]["text"] == "b"
        assert got["selfspec"] | {"ttft_ms": 0, "total_ms": 0} == {
            **{"backend": "well", "cache": "off", "cycles": 7},
            **{"ttft_ms": 0, "total_ms": 0},
        }
        told = gateway.metrics.exposition().decode()
        assert 'selfspec_routes_total{backend="well",policy="test",reason="second"} 1.0' in told

    def test_metrics_count_an_answer(self, server: Serving) -> None:
        def told() -> dict[str, float]:
            status, got, headers = sent(server.url, "GET", "/metrics")
            assert status == 200 and headers["content-type"].startswith("text/plain")
            lines = [line.rpartition(" ") for line in got.decode().splitlines() if not line.startswith("#")]
            return {name: float(value) for name, _, value in lines}

        before = told()
        post(server.url, "/v1/completions", OK)
        after = told()
        for name, more in (("request_seconds_count", 1), ("ttft_seconds_count", 1), ("inter_token_seconds_count", 2)):
            key = f'selfspec_{name}{{backend="local"}}'
            assert after[key] == before.get(key, 0) + more
        assert after['selfspec_generated_tokens_total{backend="local"}'] >= 3
        assert after["process_resident_memory_bytes"] > 1e6 and after["selfspec_waiting_requests"] == 0


def exact() -> AnswerCache:
    return AnswerCache(CacheConfig(mode=CacheMode.exact))


class TestCache:
    def test_what_was_answered_is_not_asked_again(self, made: Plan) -> None:
        asked = OK | {"temperature": 0, "selfspec": {"stats": True}}
        with over(says("a", "b"), made.serve, cache=AnswerCache(CacheConfig(mode=CacheMode.exact))) as (
            url,
            backend,
            gateway,
        ):
            seen = [post(url, "/v1/completions", asked)[1] for _ in range(2)]
            assert [each["choices"][0]["text"] for each in seen] == ["ab", "ab"]
            assert [each["selfspec"]["cache"] for each in seen] == ["miss", "hit"]
            assert [each["selfspec"]["backend"] for each in seen] == ["scripted", "cache"]
            assert len(backend.calls) == 1
            off = post(url, "/v1/completions", asked, X_Selfspec_Cache="off")[1]
            assert off["selfspec"]["cache"] == "off" and len(backend.calls) == 2
            told = gateway.metrics.exposition().decode()
            assert all(f'lookups_total{{result="{result}"}} 1.0' in told for result in ("exact", "miss", "off"))

    def test_a_broken_cache_is_done_without(self, made: Plan) -> None:
        with over(says("a"), made.serve, cache=object()) as (url, _, _gateway):  # which can neither find nor keep
            assert post(url, "/v1/completions", OK)[1]["choices"][0]["text"] == "a"

    def test_half_an_answer_is_not_kept(self, made: Plan) -> None:
        cache = exact()
        with over([*says("a")[:1], Failed("x")], made.serve, cache=cache) as (url, _, _gateway):
            assert post(url, "/v1/completions", OK | {"temperature": 0})[0] == 500 and len(cache) == 0


class TestLeaving:
    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("begun", [True, False])
    def test_who_hangs_up_frees_the_row(self, made: Plan, stream: bool, begun: bool) -> None:
        """While it waits for the first token, and in the middle of an answer."""
        engine = Gated(made)
        with serving(made, lambda: engine) as server:
            with raw(server.url, OK | {"max_tokens": 60, "stream": stream}) as connection:
                engine.waits.wait()
                if begun:
                    engine.go_on(2)
                    while server.local._load.rows != 1:
                        time.sleep(0.001)
                    engine.waits.wait()  # or it may be gone before another step has begun
                    if stream:
                        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            while server.gateway.active:
                time.sleep(0.001)
            engine.waits.wait()
            steps = len(engine.rows)
            engine.go_on(999)
            while server.local._load != (0, 0, 0.0):
                time.sleep(0.001)
            assert len(engine.rows) <= steps + 1
            assert post(server.url, "/v1/completions", OK)[0] == 200
            assert 'kind="Disconnected"} 1.0' in server.metrics.exposition().decode()
