"""Honest users of a gateway, and everybody else: a bounded number of the worst clients and of the worst back end.

All of it over loopback, in one event loop. ``tests/test_serve_siege.py`` says that the honest are answered rightly,
``tests/benchmarks/siege.py`` how late.
"""

import asyncio
import json
import random
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from http_servers import Rogue, event, sse

USERS, NEW = 32, 12
KEY = "sk-siege-0123456789"
TOPICS = ("the sea", "birds", "trains", "a rainy day in Paris", "prime numbers", "bread", "the moon", "old maps")
HOSTILE = 24
"""Of each kind, in a siege."""
ENDLESS: Any = [event("x")] * 5_000
WORST: tuple[Any, ...] = (
    [event("a", "stop"), sse({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2_000_000_000}})],
    [b"data: "] + [b"x" * 2**20] * 8,
    ENDLESS,
    [b'data: {"choices":[{"index":0,"text":"\\ud800","finish_reason":null}]}\n\n'],
    [sse("[" * 50_000)],
    (400, {"error": {"message": f"you sent Authorization: Bearer {KEY}", "param": KEY}}),
    500,
    "reset",
    [event("a"), b"data: {broken\n\n"],
)


class Served(NamedTuple):
    """A gateway, its process and its log."""

    port: int
    process: psutil.Process
    log: Path


@asynccontextmanager
async def serving(folder: Path, environment: Mapping[str, str], *overrides: str) -> AsyncIterator[Served]:
    """A gateway over the real model and over a back end that means harm."""
    rogue, log = Rogue(*WORST * 100), folder / "log"
    async with rogue.serving() as url:
        other = f"{{name: rogue, url: '{url}', key_env: SIEGE_KEY, retries: 0, breaker_threshold: 100000, read_s: 2}}"
        limits = ("client_timeout_s=2", "max_body_bytes=20000", "max_connections_per_client=128", "port=0")
        command = [sys.executable, "-m", "selfspec.serve", *overrides, f"output_dir={folder}"]
        command += [*(f"serve.{limit}" for limit in limits), f"serve.backends=[{other}]"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=folder, stdout=file, stderr=file, env={**environment, "SIEGE_KEY": KEY}
            )
        try:
            while not (ready := re.search(r"on http://127.0.0.1:(\d+)\n", log.read_text())):
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.1)
            yield Served(int(ready[1]), psutil.Process(process.pid), log)
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait)


async def ask(port: int, body: Any, head: str = "", host: str = "localhost") -> tuple[int, str]:
    """Status and body of an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        method = "POST /v1/chat/completions" if sent else "GET /metrics"
        told = f"{method} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-type: application/json\r\n{head}"
        writer.write(f"{told}content-length: {len(sent)}\r\n\r\n".encode() + sent)
        said = await reader.read()
        return int(said[9:12] or 0), said.partition(b"\r\n\r\n")[2].decode(errors="replace")
    finally:
        writer.close()


def question(model: str, topic: str, stream: bool = False, new: int = NEW) -> dict[str, Any]:
    """A chat."""
    messages = [{"role": "user", "content": f"Write a sentence about {topic}."}]
    return {"model": model, "messages": messages, "max_tokens": new, "temperature": 0, "stream": stream}


async def honest(port: int, model: str, rounds: int = 1) -> tuple[dict[str, set[str]], list[float]]:
    """What users are told of each topic, and how long each answer took, in seconds."""
    said: dict[str, set[str]] = {topic: set() for topic in TOPICS}
    took = list[float]()

    async def user(number: int) -> None:
        for turn in range(rounds):
            topic, stream = TOPICS[(number + turn) % len(TOPICS)], number % 2 == 1
            began = time.perf_counter()
            status, text = await ask(port, question(model, topic, stream))
            took.append(time.perf_counter() - began)
            assert status == 200, text
            said[topic].add(streamed(text) if stream else json.loads(text)["choices"][0]["message"]["content"])

    await asyncio.gather(*(user(number) for number in range(USERS)))
    return said, took


def streamed(text: str) -> str:
    """The text of a stream's events, which must be whole."""
    assert "data: [DONE]" in text
    found = [json.loads(line) for line in re.findall(r"data: (\{.*\})", text)]
    return "".join(choice["delta"].get("content") or "" for each in found for choice in each["choices"])


class Siege:
    """Hostile clients, so many of each kind; what they are told."""

    def __init__(self, port: int, model: str, seed: int) -> None:
        self.port, self.model, self.chance, self.told = port, model, random.Random(seed), list[tuple[str, int, str]]()

    async def run(self, many: int = HOSTILE) -> None:
        """All kinds at once, each one after the other, four at a time."""
        kinds: tuple[Callable[[], Awaitable[None]], ...] = (
            *(self.silent, self.half_a_head, self.trickle, self.drop, self.reset, self.unread),
            *(self.malformed, self.garbage, self.rebinding, self.rogue),
        )

        async def those(kind: Callable[[], Awaitable[None]]) -> None:
            for _ in range(many // 4):
                with suppress(OSError):  # they are given up
                    await kind()

        await asyncio.gather(*(those(kind) for kind in kinds for _ in range(4)))

    async def _raw(self, sent: bytes, after_s: float) -> None:
        """Sends, and leaves after so long, or when it is told to."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(sent)
            with suppress(TimeoutError):
                async with asyncio.timeout(after_s):
                    await reader.read()
        finally:
            writer.transport.abort()

    def _asking(self, new: int = 200) -> bytes:
        body = json.dumps(question(self.model, str(self.chance.random()), True, new)).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    async def silent(self) -> None:
        """Connects."""
        await self._raw(b"", 1)

    async def half_a_head(self) -> None:
        """Begins to ask."""
        await self._raw(b"POST /v1/chat/completions HTTP/1.1\r\nhost: lo", 1)

    async def trickle(self) -> None:
        """Asks a byte at a time."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for byte in b"GET /health HTTP/1.1\r\n":
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
        finally:
            writer.transport.abort()

    async def drop(self) -> None:
        """Asks for a long answer, and leaves."""
        await self._raw(self._asking(), 0.05)

    async def reset(self) -> None:
        """The same, rudely."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(self._asking())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await asyncio.sleep(0.05)

    async def unread(self) -> None:
        """Asks for much, again and again, and reads none of it."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.setblocking(False)
            with suppress(BlockingIOError):
                connection.send(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n" * 20)
            await asyncio.sleep(1)

    async def malformed(self) -> None:
        """Sends what is no request of OpenAI's."""
        whole = json.dumps(question(self.model, "x")).encode()
        end = self.chance.randrange(1, len(whole))
        for body in (whole[:end], b"[" * 9_000, b'{"model": "\\ud800"}', b"x" * 30_000):
            status, text = await ask(self.port, body)
            self.told.append(("malformed", status, text))

    async def garbage(self) -> None:
        """Speaks no HTTP."""
        await self._raw(self.chance.randbytes(500), 0.5)
        await self._raw(b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 5_000, 0.5)

    async def rebinding(self) -> None:
        """Is a page in a user's browser."""
        for host, head in (("evil.example", ""), ("localhost", "origin: http://evil.example\r\n")):
            for body in (b"", question(self.model, "x")):
                status, text = await ask(self.port, body, head, host)
                self.told.append(("rebinding", status, text))

    async def rogue(self) -> None:
        """Asks the back end that means harm."""
        status, text = await ask(self.port, question("rogue", "x", self.chance.random() < 0.5))
        self.told.append(("rogue", status, text))


async def settled(port: int) -> dict[str, float]:
    """The gateway's metrics, once nobody is answered any more."""
    while True:
        _, text = await ask(port, b"")
        found = {name: float(value) for name, value in re.findall(r"^(selfspec_\w+) (\S+)$", text, re.MULTILINE)}
        if not found["selfspec_batch_rows"] and not found["selfspec_waiting_requests"]:
            return found
        await asyncio.sleep(0.05)
