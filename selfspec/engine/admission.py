"""Which request is admitted when, and in which chunks prompts are prefilled: the orders of ``serve.scheduler``.

Prefill stalls running decodes. The orders differ in how long, and for which requests; no request's tokens depend on
them.
"""

from collections.abc import Sequence

from selfspec.serve.config import Order
from selfspec.speculation.sequence import Seq
from selfspec.types import Request

PACE = 0.2
"""How much the last measurement weighs in what a token is thought to take."""
STALL = 4
"""``hrrn``: cycles that reading prompts may hold up those being decoded, at a time."""


class Admission:
    """``fcfs``: first come, first served, as soon as there is a row. The base of the others.

    Attributes:
        chunk: the most prompt tokens prefilled between two cycles; ``None``: prompts are prefilled whole.
    """

    chunk: int | None = None

    def choose(self, waiting: Sequence[Seq], read: int, now: float) -> int | None:
        """Whom to admit to a free row: an index into ``waiting``, which is in order of arrival.

        Args:
            read: tokens of prompts read since the last cycle.
            now: in seconds of the session's clock.

        Returns:
            ``None``: nobody before the next cycle. Never where nothing has been read yet.
        """
        return 0

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """What reading so much of a prompt took."""

    def observe_decode(self, tokens: float, seconds: float) -> None:
        """What a cycle took, and how many tokens it brought a row on average."""


class DecodeFirst(Admission):
    """``decode_first``: one prompt at most between two cycles: those being decoded wait for one, never for a burst."""

    def choose(self, waiting: Sequence[Seq], read: int, now: float) -> int | None:
        """The first, if none has been read yet."""
        return None if read else 0


class Chunked(Admission):
    """``chunked_prefill``: prompts are prefilled in bounded chunks between cycles (Sarathi, 2308.16369)."""

    def __init__(self, chunk: int) -> None:
        self.chunk: int | None = chunk


class HighestResponseRatio(Admission):
    """``hrrn``: short work first, and no more prompts at a time than those being decoded can wait for.

    The next is who has waited longest in proportion to the work asked for: highest response ratio next (Brinch
    Hansen 1971), under which nobody waits for ever. What a token read and a token decoded take is measured.
    """

    def __init__(self) -> None:
        self._read_s = self._decode_s = self._cycle_s = 0.0

    def choose(self, waiting: Sequence[Seq], read: int, now: float) -> int | None:
        """The highest ratio of time here, work included, to work; of equals the first."""

        def ratio(index: int) -> float:
            return 1 + (now - waiting[index].arrival) / self._work(waiting[index].request)

        best = min(range(len(waiting)), key=lambda index: (-ratio(index), self._work(waiting[index].request)))
        stall = (read + len(waiting[best].request.tokens)) * self._read_s
        # Never None where nothing has been read: a prompt longer than the bound would wait for ever.
        return None if read and stall > STALL * self._cycle_s else best

    def _work(self, request: Request) -> float:
        """Seconds; before anything is measured, tokens."""
        # Only both or neither: seconds of one beside tokens of the other would compare nothing.
        read_s, decode_s = (self._read_s, self._decode_s) if self._decode_s else (1.0, 1.0)
        return len(request.tokens) * read_s + request.max_new_tokens * decode_s

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """A moving average."""
        self._read_s = _towards(self._read_s, seconds / tokens)

    def observe_decode(self, tokens: float, seconds: float) -> None:
        """Likewise."""
        self._decode_s = _towards(self._decode_s, seconds / tokens)
        self._cycle_s = _towards(self._cycle_s, seconds)


def _towards(average: float, value: float) -> float:
    return average + PACE * (value - average) if average else value


def make(order: Order, chunk: int) -> Admission:
    """The admission of an order; ``chunk`` matters to ``chunked_prefill`` alone."""
    match order:
        case Order.fcfs:
            return Admission()
        case Order.decode_first:
            return DecodeFirst()
        case Order.chunked_prefill:
            return Chunked(chunk)
        case Order.hrrn:
            return HighestResponseRatio()
    raise AssertionError(order)
