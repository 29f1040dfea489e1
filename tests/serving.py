"""For tests of the gateway: a server of its own for a test, and an engine that waits to be told to go on."""

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from selfspec.engine.base import Engine, RequestOutput
from selfspec.engine.fake.engine import FakeEngine
from selfspec.engine.fake.session import FakeSession, Parts
from selfspec.plan import Plan
from selfspec.serve import build
from selfspec.serve.backend import Call, Chunk, Price, Usage
from selfspec.serve.config import Order
from selfspec.serve.gateway import Gateway
from selfspec.serve.local import Local
from selfspec.serve.metrics import Metrics
from selfspec.serve.server import Server
from selfspec.types import Request


class Clock:
    """What time it is, as a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """In seconds."""
        return self.now


@contextmanager
def listening(gateway: Gateway, key: str | None = None) -> Iterator[str]:
    """A real server in a thread: its address. Closes the gateway."""
    server = Server(gateway, key, timeout_keep_alive=10**6)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # who calls before the server is up waits
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@dataclass
class Serving:
    """A gateway over our engine, and what it is made of."""

    url: str
    gateway: Gateway
    local: Local
    metrics: Metrics


@contextmanager
def serving(plan: Plan, make: Callable[[], Engine] | None = None, key: str | None = None) -> Iterator[Serving]:
    """The gateway of a plan, ready to be called; ``make``: another engine than the plan's."""
    metrics = Metrics()
    local = Local("local", make or (lambda: build.engine(plan)), plan.serve, plan.draft.name, metrics)
    local.ready.result()
    gateway = build.gateway(plan, local, metrics)
    with listening(gateway, key) as url:
        yield Serving(url, gateway, local, metrics)


class Gated(FakeEngine):
    """A fake engine whose sessions wait before each step until :meth:`go_on` is called."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.turns = threading.Semaphore(0)
        self.waits = threading.Event()
        """Set while a step waits for its turn."""
        self.rows: list[list[tuple[int, ...]]] = []
        """The prompts that were decoded in each step."""
        self.breaks = False
        """Whether the next step raises."""

    def go_on(self, steps: int = 1) -> None:
        """Lets so many steps begin."""
        self.turns.release(steps)

    def open(self, rows: int, positions: int, order: Order) -> "GatedSession":
        """A session that waits."""
        return GatedSession(self, super().open(rows, positions, order))


class GatedSession(FakeSession):
    """See :class:`Gated`."""

    def __init__(self, engine: Gated, made: FakeSession) -> None:
        parts = Parts(made.world, made.clock, made.control, made.stops)
        super().__init__(parts, made.capacity, made.positions, made.admission)
        self.engine = engine

    def step(self) -> list[RequestOutput]:
        """Waits for its turn first."""
        if not self.engine.turns.acquire(blocking=False):
            self.engine.waits.set()
            self.engine.turns.acquire()
            self.engine.waits.clear()
        self.engine.rows.append([seq.request.tokens for seq in self.running])
        if self.engine.breaks:
            self.engine.breaks = False
            raise RuntimeError("planted")
        return super().step()


@dataclass
class Scripted:
    """A back end that says what it was told to; an exception among the chunks is raised."""

    script: Sequence[Chunk | Exception]
    name: str = "scripted"
    price: Price = field(default_factory=Price)
    calls: list[Call] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    """The ids of calls whose stream was closed."""

    async def stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """The script."""
        self.calls.append(call)
        try:
            for item in self.script:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed.append(call.id)

    async def healthy(self) -> bool:
        """Always."""
        return True

    async def close(self) -> None:
        """Nothing to free."""


def says(*texts: str, **last: Any) -> list[Chunk]:
    """A script of one token a text."""
    chunks = [Chunk(text, 1) for text in texts]
    return [*chunks, Chunk("", finish="stop", usage=Usage(3, len(texts)), **last)]


def request(text: str, new: int) -> Request:
    """What the fake engine makes of a prompt."""
    return Request(tuple(text.encode()), new)
