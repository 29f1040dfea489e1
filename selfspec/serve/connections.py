"""Who is connected, and for how long: uvicorn's connections, with what it leaves to whoever stands before it.

- Nobody holds a descriptor for nothing. A request's head has as long to come as its body (``serve.client_timeout_s``),
  from when the connection is made or the last answer is out; what is sent and not read is given up after as long.
- There are so many connections, and so many from one address. Whoever comes when there are more takes the place of
  the one that has been silent for longest; where all are being answered, he is turned away.
- Where the system has no descriptors left, one line a minute says so.
"""

import asyncio
import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import psutil
from uvicorn.protocols.http.h11_impl import H11Protocol

from selfspec.serve.config import Serve

log = logging.getLogger(__name__)

BACKLOG = 16
"""The most connections that asyncio accepts in one turn of its loop; it takes some turns until they are looked at."""
_SPARE = 32 + 6 * BACKLOG
"""Descriptors for those, and for what is no client: files, back ends."""
_FEWEST = 4
_QUIET_S = 60.0


class Connections:
    """Those there are.

    Args:
        given_up: told of each that is closed for want of room, of words, or of reading: its kind.
    """

    def __init__(self, settings: Serve, given_up: Callable[[str], None]) -> None:
        self.patience_s, self.given_up = settings.client_timeout_s, given_up
        self._most = min(settings.max_connections, max(_descriptors() - _SPARE, _FEWEST))
        self._most_each = min(settings.max_connections_per_client, self._most)
        self._all: dict[Connection, None] = {}
        """By when each was made or last answered, longest ago first."""

    def admit(self, new: "Connection") -> bool:
        """Makes room for one; false: there is none."""
        self._all[new] = None
        theirs = [each for each in self._all if each.address == new.address]
        for group, most in ((theirs, self._most_each), ([*self._all], self._most)):
            if len(group) > most:
                silent = next(each for each in group if each.silent)  # it is itself
                silent.give_up("TooManyConnections")
                if silent is new:
                    return False
        return True

    def answered(self, one: "Connection") -> None:
        """Its silence begins anew."""
        if one in self._all:
            del self._all[one]
            self._all[one] = None

    def close(self) -> None:
        """Ends all that are left."""
        for one in [*self._all]:
            one.transport.abort()

    def forget(self, one: "Connection") -> None:
        """It is closed."""
        self._all.pop(one, None)


class Connection(H11Protocol):
    """See the module's docstring; ``all`` is given by :func:`protocol`."""

    all: Connections
    address: str | None = None
    _waits: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request of it is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def silent(self) -> bool:
        """Whether it is for its client to do something: to ask, to say all of it, to read."""
        return self.idle or self.cycle.more_body or self.flow.write_paused

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else None
        if self.all.admit(self):
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self.all.forget(self)
        _stop(self._waits, self._unread)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        super().data_received(data)
        if not self.idle:  # a body has a patience of its own, and an answer for whoever tries it
            _stop(self._waits)

    def on_response_complete(self) -> None:
        """Called by uvicorn."""
        self.all.answered(self)
        self._wait()  # also while it is closing: what is left of the answer may never be read
        super().on_response_complete()
        if not self.idle:  # its next request had come already
            _stop(self._waits)

    def pause_writing(self) -> None:
        """Called by asyncio: what is sent is not read."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.all.patience_s, self.give_up, "Unread")

    def resume_writing(self) -> None:
        """Called by asyncio."""
        super().resume_writing()
        _stop(self._unread)

    def give_up(self, kind: str) -> None:
        """Closes it, whatever is on its way."""
        self.all.forget(self)
        self.all.given_up(kind)
        self.transport.abort()

    def _wait(self) -> None:
        _stop(self._waits)
        self._waits = self.loop.call_later(self.all.patience_s, self.give_up, "TooSlow")


def protocol(connections: Connections) -> type[Connection]:
    """What uvicorn makes of each connection."""
    return type("Connection", (Connection,), {"all": connections})


def quiet(loop: asyncio.AbstractEventLoop) -> None:
    """Lets ``loop`` say once a minute that nothing can be accepted: asyncio would with each try, with a traceback."""
    said = deque([float("-inf")], 1)

    def handle(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        if "accept" not in context["message"]:
            loop.default_exception_handler(dict(context))
        elif time.monotonic() - said[0] >= _QUIET_S:
            said.append(time.monotonic())
            log.error("no connection can be accepted: %s", context.get("exception"))

    loop.set_exception_handler(handle)


def _stop(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()


def _descriptors() -> int:
    """How many more this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft - psutil.Process().num_fds()
