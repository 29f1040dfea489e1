"""The real gateway as a process of its own, over the fake engine; and how it is asked without a client's kindness."""

import http.client
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import tiny

from selfspec.soak.guard import guarded

BATCH, STREAMS, BODY = 4, 16, 20_000
GOOD: dict[str, Any] = {"model": "tiny", "prompt": "a model drafts", "max_tokens": 8, "temperature": 0, "stream": False}
LONG = {**GOOD, "max_tokens": 4000, "stream": True}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
JSON = {"Content-Type": "application/json"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Gateway(NamedTuple):
    """A process; while the file ``hold`` is there, its engine decodes nothing."""

    host: str
    port: int
    process: psutil.Process
    hold: Path
    log: Path


@contextmanager
def serving(
    folder: Path, prompts_file: Path, client_timeout_s: float, *more: str, descriptors: int | None = None
) -> Iterator[Gateway]:
    """A gateway over a fake engine; what it sends is read by its client, or stays with it.

    Args:
        more: overrides.
        descriptors: the most that the process may have.
    """
    limits = {"max_batch": BATCH, "max_concurrent_requests": STREAMS, "max_body_bytes": BODY}
    limits |= {"client_timeout_s": client_timeout_s, "max_tokens": 4000, "max_model_len": 5000}
    overrides = [*tiny.fake_job(prompts_file), *(f"serve.{key}={value}" for key, value in limits.items())]
    overrides += ["serve.port=0", "serve.cache.mode=exact", f"output_dir={folder}", *more]
    log, hold = folder / "log", folder / "hold"
    command = [sys.executable, str(Path(__file__).with_name("planted.py")), "hold,narrow", *overrides]
    if descriptors is not None:
        command = ["bash", "-c", f'ulimit -n {descriptors}; exec "$@"', "bash", *command]
    with guarded(command, log, {**os.environ, "PLANTED": str(hold)}) as guard:
        while not (ready := re.search(r"on http://(127.0.0.1):(\d+)\n", log.read_text())):
            assert guard.alive, log.read_text()
            time.sleep(0.05)
        (process,) = psutil.Process(guard.process.pid).children()
        yield Gateway(ready[1], int(ready[2]), process, hold, log)


class InOnePiece(http.client.HTTPConnection):
    """No pause comes between the head of a request and its body."""

    pieces = b""

    def send(self, data: Any) -> None:
        self.pieces += data

    def getresponse(self) -> http.client.HTTPResponse:
        super().send(self.pieces)
        return super().getresponse()


def ask(gateway: Gateway, body: Any, path: str = "/v1/completions", method: str = "POST", **headers: str) -> Any:
    """Status and what was answered: JSON, or the text of a stream."""
    connection = InOnePiece(*gateway[:2])
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
    """What is said before the connection is closed."""
    with socket.create_connection(gateway[:2]) as connection:
        with suppress(OSError):  # closed there, before all of it is sent
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        said = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                said += piece
        return said
