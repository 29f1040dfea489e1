"""Malformed and hostile requests to the real gateway, a process of its own: it goes on serving, and leaks nothing."""

import json
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from served import BATCH, BODY, CHAT, GOOD, HEAD, LONG, STREAMS, Gateway, ask, raw, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> Iterator[Gateway]:
    """One that waits for clients for ever: they may be as slow as this machine."""
    with serving(tmp_path_factory.mktemp("gateway"), prompts_file, 1e6) as started:
        yield started


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> Iterator[Gateway]:
    """One that hardly waits: for requests that come in one piece, and answers that fit in what is on its way."""
    with serving(tmp_path_factory.mktemp("impatient"), prompts_file, 0.2) as started:
        yield started


def cut(body: dict[str, Any]) -> list[bytes]:
    """A body that ends too early, everywhere."""
    whole = json.dumps(body).encode()
    return [whole[:end] for end in range(len(whole))]


STRANGE = (None, True, -1, 0, 3, 1.5, 10**30, 1e308, "", "x", "\x00", [], [[]], ["x"], [1, "x"], {}, {"x": 1}, [None])
FIELDS = ("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stream", "logprobs")
MORE = ("stream_options", "ignore_eos", "selfspec", "echo", "best_of", "suffix", "logit_bias", "user", "unknown")


def wrong() -> Iterator[bytes]:
    """Bodies that are nearly right."""
    for field in (*FIELDS, *MORE):
        for value in STRANGE:
            yield json.dumps({**GOOD, field: value}).encode()
    for value in STRANGE:
        yield json.dumps({**CHAT, "messages": value}).encode()
        yield json.dumps({**CHAT, "messages": [value]}).encode()
        yield json.dumps({**CHAT, "messages": [{"role": "user", "content": value}]}).encode()


ODD = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"null",
    b"[]",
    b'"x"',
    b"1",
    b"NaN",
    b"{}",
    b"{" * 9_000,
    b"[" * 9_000,
    b"[" * 9_000 + b"]" * 9_000,
    b'{"prompt":' * 1_500 + b"1" + b"}" * 1_500,
    b'{"model": "tiny", "model": "other", "prompt": "x"}',
    b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": "\\udfff", "prompt": "x"}',
    b'{"model": "tiny", "prompt": "\xff"}',
    b'{"model": "tiny", "prompt": "x", "\\ud800": 1}',
    b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 6_000 + b"}",
    b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
    b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    b'{"model": "tiny", "prompt": "x", "temperature": -Infinity}',
    b'{"model": "tiny", "prompt": [' + b"1," * 5_000 + b"1]}",
    b'{"model": "tiny", "prompt": [-1]}',
    b'{"model": "tiny", "prompt": [999999999999999999999]}',
    b'{"model": "' + b"x" * 10_000 + b'", "prompt": "x"}',
    b'{"model": "tiny", "prompt": "x", "stop": ["' + b"y" * 5_000 + b'"]}',
    b" " * 15_000,
    json.dumps({**GOOD, "prompt": "x" * 10_000}).encode(),
    json.dumps({**GOOD, "prompt": "x" * (BODY + 1)}).encode(),
    json.dumps({**GOOD, "prompt": "x" * 2_000_000}).encode(),
)
GARBAGE = (
    b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n{}",
    HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
    HEAD + b"Content-Length: x\r\n\r\n{}",
    HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    HEAD + b"Content-Length: 100\r\n\r\n{}",
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 20 + b"0\r\n\r\n",
    HEAD + b"Authorization: \xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
    HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n",
)


def refused(answered: tuple[int, Any]) -> int:
    """The status, where it is no error of the server's and its body tells what is wrong as OpenAI does."""
    status, body = answered
    assert status < 500, body
    if status >= 400:
        error = body["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and "\n" not in error["message"]
        assert error["type"] in ("invalid_request_error", "rate_limit_error")
    return status


def test_hundreds_of_malformed_bodies_are_refused(gateway: Gateway) -> None:
    bodies = [*cut(GOOD), *cut(CHAT), *wrong(), *ODD]
    assert len(bodies) > 500
    statuses = []
    for path in ("/v1/completions", "/v1/chat/completions"):
        statuses += [refused(ask(gateway, body, path)) for body in bodies]
    assert statuses.count(400) > 400 and {413, 404} <= set(statuses)
    assert refused(ask(gateway, GOOD)) == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"])
def test_unknown_methods_and_paths_are_refused(gateway: Gateway, method: str) -> None:
    for path in ("/v1/completions", "/", "/v1/nothing", "/v1/models/%ff", "/v1//completions", "/" + "x" * 5_000):
        status, _ = ask(gateway, b"{}", path, method)
        assert 400 <= status < 500


def test_garbage_is_answered_with_a_4xx_or_closed(gateway: Gateway) -> None:
    for sent in GARBAGE:
        said = raw(gateway, sent)
        assert not said or re.match(rb"HTTP/1.1 (100|4\d\d) ", said), (sent[:80], said[:200])
    assert refused(ask(gateway, GOOD)) == 200


def test_clients_that_leave_take_no_slot_with_them(gateway: Gateway) -> None:
    endures(gateway, {leaves: None, resets: None})


def test_clients_that_hang_take_no_slot_with_them(impatient: Gateway) -> None:
    endures(impatient, {does_not_read: "Unread", does_not_finish_asking: "TooSlow"})


def endures(gateway: Gateway, behaviours: dict[Callable[[Gateway], socket.socket], str | None]) -> None:
    """Of every kind more than the gateway answers at once; all of them twice, and then memory is where it was.

    Args:
        behaviours: what a client does, and as what it is counted when it is given up.
    """
    grown = []
    for _ in range(2):
        for behave, kind in behaviours.items():
            wanted = given_up(gateway, kind) + STREAMS + BATCH
            with ThreadPoolExecutor(STREAMS) as pool:
                connections = list(pool.map(lambda _, behave=behave: behave(gateway), range(STREAMS + BATCH)))
            while kind and given_up(gateway, kind) < wanted:
                time.sleep(0.02)
            for connection in connections:
                connection.close()
            all_free(gateway)
        grown.append(gateway.process.memory_info().rss / 2**20)
    assert grown[-1] - grown[0] < 16, grown
    while flooded(gateway, STREAMS + 1) != (1, STREAMS):  # every slot there is can be had, once all of them are noticed
        pass


def stream(gateway: Gateway) -> socket.socket:
    """A connection on which a long answer has begun that does not fit into what is on its way unread."""
    while True:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(gateway[:2])
        body = json.dumps(LONG | {"prompt": f"request {id(connection)} at {time.monotonic()}"}).encode()
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = connection.recv(12, socket.MSG_WAITALL)
        if status.endswith(b" 200"):
            return connection
        assert status.endswith(b" 429"), "others have not been given up yet"
        connection.close()


def leaves(gateway: Gateway) -> socket.socket:
    """In the middle of an answer."""
    connection = stream(gateway)
    connection.close()
    return connection


def resets(gateway: Gateway) -> socket.socket:
    """In the middle of an answer, and rudely."""
    connection = stream(gateway)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    return connection


def does_not_read(gateway: Gateway) -> socket.socket:
    """The answer it has asked for."""
    return stream(gateway)


def does_not_finish_asking(gateway: Gateway) -> socket.socket:
    """Half a body, then nothing."""
    connection = socket.create_connection(gateway[:2])
    connection.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"model": ')
    assert b" 408 " in connection.recv(65536).splitlines()[0]
    return connection


def given_up(gateway: Gateway, kind: str | None) -> float:
    """How often for that."""
    found = re.search(rf'selfspec_errors_total{{kind="{kind}"}} (\S+)', ask(gateway, b"", "/metrics", "GET")[1])
    return float(found[1]) if found else 0.0


def all_free(gateway: Gateway) -> None:
    """Waits until nobody is waiting or being answered; hangs into the test's time-out where a slot is lost."""
    while True:
        _, text = ask(gateway, b"", "/metrics", "GET")
        found = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("selfspec_")}
        names = ("selfspec_batch_rows", "selfspec_waiting_requests", "selfspec_kv_used_ratio")
        if not any(found[name] for name in names):
            return
        time.sleep(0.02)


def test_a_flood_is_told_to_try_again(gateway: Gateway) -> None:
    assert flooded(gateway, 4 * STREAMS) == (3 * STREAMS, STREAMS)
    all_free(gateway)
    assert refused(ask(gateway, GOOD)) == 200


def flooded(gateway: Gateway, calls: int) -> tuple[int, int]:
    """How many of so many calls at once are refused, and answered then: no answer ends before the others are."""
    gateway.hold.touch()
    with ThreadPoolExecutor(calls) as pool:
        asked = [pool.submit(ask, gateway, {**GOOD, "prompt": f"{time.monotonic()} {i}"}) for i in range(calls)]
        try:
            first = [each.result() for each in islice(as_completed(asked), calls - STREAMS)]
        finally:
            gateway.hold.unlink()
        statuses = [refused(each.result()) for each in asked]
    assert {refused(each) for each in first} == {429}
    return statuses.count(429), statuses.count(200)


def test_schemathesis_finds_nothing(gateway: Gateway) -> None:
    """Requests made from our own OpenAPI, good and bad ones."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode

    _, openapi = ask(gateway, b"", "/openapi.json", "GET")
    schema = schemathesis.openapi.from_dict(openapi)
    seen = list[int]()
    for path in ("/v1/completions", "/v1/chat/completions"):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            strategy = schema[path]["POST"].as_strategy(generation_mode=mode)

            @settings(
                max_examples=20,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy)
            def send(case: Any) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "tiny"  # or no request would get far
                response = case.call(base_url=f"http://{gateway.host}:{gateway.port}", timeout=None)
                seen.append(response.status_code)
                body = response.json() if "json" in response.headers["content-type"][0] else response.text
                refused((response.status_code, body))

            send()
    assert len(seen) >= 60 and {200, 400} <= set(seen), seen
    all_free(gateway)
    assert refused(ask(gateway, GOOD)) == 200
