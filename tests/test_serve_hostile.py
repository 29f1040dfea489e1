"""Malformed and hostile requests to the real gateway, a process of its own: it goes on serving, and leaks nothing."""

import http.client
import json
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from selfspec.soak.server import guarded

BATCH, STREAMS, BODY, PATIENCE_S = 4, 16, 20_000, 0.5
GOOD: dict[str, Any] = {"model": "tiny", "prompt": "a model drafts", "max_tokens": 8, "temperature": 0, "stream": False}
LONG = {**GOOD, "max_tokens": 500, "stream": True}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
JSON = {"Content-Type": "application/json"}
Gateway = tuple[str, int, psutil.Process]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> Iterator[Gateway]:
    """Host, port and process of a gateway over a fake engine that takes its time."""
    folder = tmp_path_factory.mktemp("gateway")
    overrides = [
        *("engine=fake", "draft=layerskip", "exit_layer=3", "model.name=tiny", "model.layers=6", "model.sha256=null"),
        *(f"model.source=file:{prompts_file}", f"workload.source=file:{prompts_file}", "workload.sha256=null"),
        *(f"serve.max_batch={BATCH}", f"serve.max_streams={STREAMS}", f"serve.max_body_bytes={BODY}", "serve.port=0"),
        *(f"serve.patience_s={PATIENCE_S}", "serve.cache.mode=exact", f"output_dir={folder}", "tracking=none"),
    ]
    log = folder / "log"
    with guarded([sys.executable, str(Path(__file__).with_name("planted.py")), "slow", *overrides], log, {}) as guard:
        while not (ready := re.search(r"on http://(127.0.0.1):(\d+)\n", log.read_text())):
            assert guard.poll() is None, log.read_text()
            time.sleep(0.05)
        (process,) = psutil.Process(guard.pid).children()
        yield ready[1], int(ready[2]), process


def ask(gateway: Gateway, body: Any, path: str = "/v1/completions", method: str = "POST", **headers: str) -> Any:
    """Status and what was answered: JSON, or the text of a stream."""
    connection = http.client.HTTPConnection(*gateway[:2], timeout=30)
    try:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, sent, {**JSON, **{key.replace("_", "-"): one for key, one in headers.items()}})
        response = connection.getresponse()
        text = response.read().decode()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text) if is_json and text else text
    finally:
        connection.close()


def raw(gateway: Gateway, sent: bytes) -> bytes:
    """What is said before the connection is closed, or nothing more comes."""
    with socket.create_connection(gateway[:2], timeout=2 + PATIENCE_S) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        said = b""
        try:
            while piece := connection.recv(65536):
                said += piece
        except ConnectionResetError:
            pass
        return said


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
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
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


def test_hundreds_of_malformed_bodies(gateway: Gateway) -> None:
    bodies = [*cut(GOOD), *cut(CHAT), *wrong(), *ODD]
    assert len(bodies) > 500
    statuses = []
    for path in ("/v1/completions", "/v1/chat/completions"):
        statuses += [refused(ask(gateway, body, path)) for body in bodies]
    assert statuses.count(400) > 400 and {413, 404} <= set(statuses)
    assert refused(ask(gateway, GOOD)) == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"])
def test_methods_and_paths_there_are_not(gateway: Gateway, method: str) -> None:
    for path in ("/v1/completions", "/", "/v1/nothing", "/v1/models/%ff", "/v1//completions", "/" + "x" * 5_000):
        status, _ = ask(gateway, b"{}", path, method)
        assert 400 <= status < 500


def test_what_is_no_http(gateway: Gateway) -> None:
    for sent in GARBAGE:
        said = raw(gateway, sent)
        assert not said or re.match(rb"HTTP/1.1 (100|4\d\d) ", said), (sent[:80], said[:200])
    assert refused(ask(gateway, GOOD)) == 200


def test_clients_that_leave_or_hang_take_no_slot_with_them(gateway: Gateway) -> None:
    """Of every kind more than the gateway answers at once; all of them twice, and then memory is where it was."""
    grown = []
    for _ in range(2):
        for behave in (leaves, resets, does_not_read, does_not_finish_asking):
            with ThreadPoolExecutor(STREAMS) as pool:
                list(pool.map(lambda _, behave=behave: behave(gateway), range(STREAMS + BATCH)))
            all_free(gateway)
        grown.append(gateway[2].memory_info().rss / 2**20)
    assert grown[-1] - grown[0] < 16, grown
    with ThreadPoolExecutor(STREAMS) as pool:
        answers = list(pool.map(lambda i: ask(gateway, {**GOOD, "prompt": f"after all {i}"}), range(STREAMS)))
    assert [status for status, _ in answers] == [200] * STREAMS, "every slot there is can be had"


def stream(gateway: Gateway, receive_buffer: int | None = None) -> socket.socket:
    """A connection on which a long answer has begun."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(30)
    connection.connect(gateway[:2])
    body = json.dumps(LONG | {"prompt": f"request {id(connection)} at {time.monotonic()}"}).encode()
    connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert connection.recv(1)
    return connection


def leaves(gateway: Gateway) -> None:
    """In the middle of an answer."""
    stream(gateway).close()


def resets(gateway: Gateway) -> None:
    """In the middle of an answer, and rudely."""
    with stream(gateway) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def does_not_read(gateway: Gateway) -> None:
    """The answer it has asked for, until it is given up."""
    with stream(gateway, receive_buffer=1024) as connection:
        time.sleep(PATIENCE_S + 0.2)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def does_not_finish_asking(gateway: Gateway) -> None:
    """Half a body, then nothing."""
    with socket.create_connection(gateway[:2], timeout=30) as connection:
        connection.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"model": ')
        said = connection.recv(65536)
        assert b" 408 " in said.splitlines()[0]


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
    held = [stream(gateway, receive_buffer=1024) for _ in range(BATCH)]
    with ThreadPoolExecutor(4 * STREAMS) as pool:
        asked = [{**LONG, "prompt": f"flood {i}", "stream": False} for i in range(4 * STREAMS)]
        statuses = [refused(answered) for answered in pool.map(lambda body: ask(gateway, body), asked)]
    assert set(statuses) == {200, 429}
    for connection in held:
        connection.close()
    all_free(gateway)
    assert refused(ask(gateway, GOOD)) == 200


def test_answers_are_kept_apart_by_key(gateway: Gateway) -> None:
    body = {**GOOD, "prompt": "a secret", "selfspec": {"stats": True}}

    def looked(**headers: str) -> str:
        status, answer = ask(gateway, body, **headers)
        assert status == 200
        return str(answer["selfspec"]["cache"])

    alice, bob = {"Authorization": "Bearer alice"}, {"Authorization": "Bearer bob"}
    assert [looked(**alice), looked(**alice), looked(**bob), looked(), looked(**bob)] == [
        *("miss", "hit", "miss", "miss", "hit")
    ]
    assert looked(**alice, X_Selfspec_Cache="off") == "off"


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
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy)
            def send(case: Any) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "tiny"  # or no request would get far
                response = case.call(base_url=f"http://{gateway[0]}:{gateway[1]}")
                seen.append(response.status_code)
                body = response.json() if "json" in response.headers["content-type"][0] else response.text
                refused((response.status_code, body))

            send()
    assert len(seen) >= 60 and {200, 400} <= set(seen), seen
    all_free(gateway)
    assert refused(ask(gateway, GOOD)) == 200
