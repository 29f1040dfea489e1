"""A real HTTP server for tests that misbehaves as it is told to, in the test's own event loop."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any


def event(text: str, finish: str | None = None) -> bytes:
    """A chunk of a streamed completion."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return sse({"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})


def sse(body: Any) -> bytes:
    """A server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n".encode()


class Rogue:
    """A server whose answers a test writes: one behaviour a call, the last of them for all that follow.

    ``"ok"``, ``"hang"``, ``"reset"``, ``"endless"``, an integer (that status), ``(status, body)``, or a list of what
    is sent after a 200: bytes, ``"hang"``.

    Who has a limit on waiting for it finds that it runs out when the server hangs, and not by a clock: the n-th of
    ``limits`` does at its n-th hang.
    """

    def __init__(self, *behaviours: Any, limits: Sequence[asyncio.Timeout] = ()) -> None:
        self.behaviours, self.calls, self.asked = list(behaviours), 0, list[dict[str, Any]]()
        self.limits, self.hangs = limits, 0
        self.headers = ""
        self.well = True
        self.left = asyncio.Event()
        """A caller closed the connection while it was answered."""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Its base URL, with ``/v1``."""
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self._tasks: set[asyncio.Task[Any]] = set()
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            self.headers = (await reader.readuntil(b"\r\n\r\n")).decode()
            if self.headers.startswith("GET"):
                self._reply(writer, 200 if self.well else 500, {"object": "list", "data": []})
                return
            length = int(self.headers.lower().split("content-length:")[1].split()[0])
            self.asked.append(json.loads(await reader.readexactly(length)))
            behaviour = self.behaviours[min(self.calls, len(self.behaviours) - 1)]
            self.calls += 1
            await self._behave(behaviour, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left.set()
        finally:
            writer.close()

    async def _behave(self, behaviour: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if behaviour == "ok":
            behaviour = [event("a"), event("b", "stop"), sse("[DONE]")]
        if behaviour == "hang":
            await self._hang()
        elif behaviour == "reset":
            writer.transport.abort()
        elif isinstance(behaviour, int):
            self._reply(writer, behaviour, {"error": {"message": "Bearer secret-key is wrong", "code": None}})
        elif isinstance(behaviour, tuple):
            self._reply(writer, *behaviour)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
            await self._events(behaviour, reader, writer)

    async def _events(self, events: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if events == "endless":
            gone = asyncio.ensure_future(reader.read(1))
            while not gone.done():
                writer.write(event("a"))
                await writer.drain()
                await asyncio.wait((gone,), timeout=0.01)
            self.left.set()
            return
        for each in events:
            if each == "hang":
                await self._hang()
            writer.write(each)
            await writer.drain()

    async def _hang(self) -> None:
        self.hangs += 1
        while len(self.limits) < self.hangs:  # nobody waits yet; or nobody will ever find it too long
            await asyncio.sleep(0.01)
        self.limits[self.hangs - 1].reschedule(0.0)
        await asyncio.Event().wait()

    def _reply(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n"
        writer.write(head.encode() + b"connection: close\r\n\r\n" + text)
