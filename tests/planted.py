"""The real gateway over the fake engine, with faults planted in the latter.

    PLANTED=FILE python tests/planted.py FAULT,... [overrides of selfspec.serve]

"Then" is when FILE is there.
"""

import os
import runpy
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from selfspec.engine.fake import session as fake
from selfspec.serve import build, server
from selfspec.serve.config import Serve

BEGAN = time.monotonic()
KEPT = list[bytes]()
THEN = Path(os.environ.get("PLANTED", "never"))


def leak() -> None:
    """A mebibyte every 20th of a second, while it decodes."""
    cycle = fake.FakeSession._cycle

    def leaking(self: fake.FakeSession, rows: Any) -> None:
        while len(KEPT) < 20 * (time.monotonic() - BEGAN):
            KEPT.append(b"x" * 2**20)
        cycle(self, rows)

    fake.FakeSession._cycle = leaking  # type: ignore[method-assign]


def hold() -> None:
    """Nothing is decoded then."""
    cycle = fake.FakeSession._cycle

    def held(self: fake.FakeSession, rows: Any) -> None:
        while THEN.exists():
            time.sleep(0.005)
        cycle(self, rows)

    fake.FakeSession._cycle = held  # type: ignore[method-assign]


def narrow() -> None:
    """The system takes next to nothing of what a client does not read."""
    listening = server._listening

    @contextmanager
    def narrowly(settings: Serve) -> Iterator[socket.socket]:
        with listening(settings) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            yield listener

    server._listening = narrowly


def drift() -> None:
    """Drafts are bad from then on."""
    fake.World.acceptance = lambda *_: 0.1 if THEN.exists() else 0.9  # type: ignore[method-assign]


def sentinel() -> None:
    """The first request is answered as it should be, the same request later is not."""
    answer, seen = fake.whole_answer, set[tuple[int, ...]]()

    def forgetful(request: Any) -> list[int]:
        said = answer(request)
        if request.tokens in seen:
            said[-1] = (said[-1] + 1) % fake.VOCAB
        seen.add(request.tokens)
        return said

    fake.whole_answer = forgetful


def errors() -> None:
    """Every tenth request from then on is refused."""
    submit, numbers = fake.FakeSession.submit, count(1)

    def refusing(self: fake.FakeSession, request: Any) -> int:
        if THEN.exists() and next(numbers) % 10 == 0:
            raise ValueError("planted")
        return submit(self, request)

    fake.FakeSession.submit = refusing  # type: ignore[method-assign]


def loads() -> None:
    """It loads for ever, in C++, and tells so by the file."""

    def load(plan: object) -> Any:
        import torch

        THEN.touch()
        while True:
            torch.ones(100, 1000) @ torch.ones(1000, 1000)

    build.engine = load


def death() -> None:
    """It ends then."""
    cycle = fake.FakeSession._cycle

    def dying(self: fake.FakeSession, rows: Any) -> None:
        if THEN.exists():
            print("planted death", flush=True)
            os._exit(7)
        cycle(self, rows)

    fake.FakeSession._cycle = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    for fault in sys.argv[1].split(","):
        globals()[fault]()
    sys.argv = ["selfspec.serve", *sys.argv[2:]]
    runpy.run_module("selfspec.serve", run_name="__main__")
