"""A circuit breaker: a server that keeps failing is left alone for a while, then tried with one call.

Own code, because what the libraries at hand lack matters here: while half open only one call may probe, and a caller
who leaves early says nothing about the server, neither good nor bad.
"""

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]


class Breaker:
    """Counts failures in a row. For one event loop: nothing here is locked.

    Args:
        failures: after so many in a row it opens.
        breaker_reset_s: seconds until one call may probe.
        clock: seconds, monotonic.
    """

    def __init__(self, failures: int, breaker_reset_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._cool, self._clock = failures, breaker_reset_s, clock
        self._failed = 0
        self._opened: float | None = None
        self._probing = False

    @property
    def state(self) -> State:
        """``closed``: calls go through; ``open``: none does; ``half_open``: one may."""
        if self._opened is None:
            return "closed"
        return "open" if self._clock() - self._opened < self._cool else "half_open"

    @property
    def allows(self) -> bool:
        """Whether a call may be made now."""
        return self.state == "closed" or (self.state == "half_open" and not self._probing)

    def begin(self) -> None:
        """A call is made; :meth:`succeeded`, :meth:`failed` or :meth:`abandoned` follows."""
        self._probing = self._opened is not None

    def succeeded(self) -> None:
        """The server answers: the circuit closes."""
        self._failed, self._opened, self._probing = 0, None, False

    def failed(self) -> None:
        """It opens at the limit, and at once where this was the probe."""
        self._failed += 1
        if self._probing or self._failed >= self._limit:
            self._opened = self._clock()
        self._probing = False

    def abandoned(self) -> None:
        """The caller left before anything could be said."""
        self._probing = False
