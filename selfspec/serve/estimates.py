"""How long a back end takes, as it has lately shown; and what a call may cost there."""

import time
from collections.abc import AsyncGenerator, Callable

from selfspec.serve.backend import Backend, Call, Chunk, Price

_WEIGHT = 0.2
"""Of the newest answer in the running means."""
_FORGET_S = 60.0
"""A back end unheard of for so long counts as unknown, and is tried again: it may have become faster."""


class Timed:
    """A back end that is watched: it answers as the one within, and how long it takes is known.

    Attributes:
        first_s, token_s: running means of an answer's first token and of each one after it, in seconds.
        seen: when there was an answer, by the clock.
    """

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.monotonic) -> None:
        self.backend, self.name, self.price, self._clock = backend, backend.name, backend.price, clock
        self.first_s = self.token_s = 0.0
        self.seen: float | None = None

    @property
    def known(self) -> bool:
        """Whether there was an answer lately."""
        return self.seen is not None and self._clock() - self.seen < _FORGET_S

    def observe(self, first_s: float, token_s: float | None) -> None:
        """Takes an answer in; one of a single token says nothing of the others."""
        known = self.known
        self.first_s = first_s if not known else self.first_s + _WEIGHT * (first_s - self.first_s)
        if token_s is not None:
            self.token_s = token_s if not known else self.token_s + _WEIGHT * (token_s - self.token_s)
        self.seen = self._clock()

    def expected(self, tokens: int) -> float:
        """Seconds that an answer of so many tokens takes there; 0 where nothing is known."""
        return self.first_s + self.token_s * (tokens - 1) if self.known else 0.0

    async def stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """The answer of the back end within; timed where it is whole."""
        began, first, tokens = self._clock(), None, 0
        answer = self.backend.stream(call)
        try:
            async for chunk in answer:
                if chunk.tokens and first is None:
                    first = self._clock()
                tokens += chunk.tokens
                if chunk.finish is not None:
                    now = self._clock()
                    rest = (now - first) / (tokens - 1) if first is not None and tokens > 1 else None
                    self.observe((first or now) - began, rest)
                yield chunk
        finally:
            await answer.aclose()

    async def healthy(self) -> bool:
        """As the back end within."""
        return await self.backend.healthy()

    async def close(self) -> None:
        """Closes the back end within."""
        await self.backend.close()


def dollars(price: Price, prompt_tokens: int, tokens: int) -> float:
    """What a call costs."""
    return (price.input * prompt_tokens + price.output * tokens) / 1e6
