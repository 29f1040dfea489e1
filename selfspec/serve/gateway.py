"""What happens to a call, whatever protocol it came by: limits, cache, back ends in turn, and what is measured."""

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from selfspec.serve.backend import Cache, Call, Chunk, Hit, Router
from selfspec.serve.config import Serve
from selfspec.serve.errors import Invalid, Overloaded, RequestError, Unavailable, UnknownModel
from selfspec.serve.metrics import Metrics

log = logging.getLogger(__name__)

CACHE = "cache"
"""The back end of answers that were given before."""


class Gateway:
    """Answers calls."""

    def __init__(self, settings: Serve, router: Router, cache: Cache | None, metrics: Metrics) -> None:
        self.settings, self.router, self.cache, self.metrics = settings, router, cache, metrics
        self.active = 0
        """Calls being answered, the waiting ones too."""
        self.draining = False
        """Whether no more calls are taken."""

    async def healthy(self) -> bool:
        """Whether a call would be answered: we take some, and a back end is well."""
        if self.draining:
            return False
        for backend in self.router.backends:
            if await backend.healthy():
                return True
        return False

    async def close(self) -> None:
        """Closes all back ends."""
        for backend in self.router.backends:
            await backend.close()

    async def answer(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """The answer as it comes; closing the iterator cancels the work.

        Raises:
            RequestError: nearly always before the first chunk.
        """
        if call.model not in self.router.models:
            raise UnknownModel(f"model: {call.model} is not served; there is {', '.join(self.router.models)}", "model")
        if call.max_tokens is not None and call.max_tokens > self.settings.max_tokens:
            raise Invalid(f"max_tokens: at most {self.settings.max_tokens} are allowed", "max_tokens")
        if self.active >= self.settings.max_concurrent_requests:
            raise Overloaded(f"{self.active} requests are being answered already; try again")
        self.active += 1
        try:
            async with aclosing(self._timed(call)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self.active -= 1

    async def _timed(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """Measures, remembers, and adds to the last chunk what is known here."""
        arrived = last = time.perf_counter()
        first: float | None = None
        hit, looked = await self._look(call)
        said: list[Chunk] = []
        async with aclosing(_given(hit) if hit else self._routed(call)) as chunks:
            async for name, chunk in chunks:
                now = time.perf_counter()
                if first is None:
                    first = now
                    self.metrics.ttft.labels(name).observe(now - arrived)
                elif chunk.tokens:
                    self.metrics.inter_token.observe(name, (now - last) / chunk.tokens, chunk.tokens)
                last = now
                said.append(chunk)
                if chunk.finish is not None:
                    self.metrics.request.labels(name).observe(now - arrived)
                    if chunk.usage is not None and not hit:
                        self.metrics.generated.labels(name).inc(chunk.usage.completion_tokens)
                if chunk.finish is not None and call.stats:
                    seen = {"ttft_ms": 1e3 * (first - arrived), "total_ms": 1e3 * (now - arrived)}
                    chunk = replace(chunk, stats=seen | dict(chunk.stats or {}) | {"backend": name, "cache": looked})
                yield chunk
        if looked == "miss" and self.cache is not None:
            try:
                await self.cache.keep(call, said)
            except Exception:
                log.exception("the cache failed")

    async def _look(self, call: Call) -> tuple[Hit | None, str]:
        """What the cache has, and what became of looking: ``hit``, ``miss`` or ``off``."""
        if not call.cache or self.cache is None:
            self.metrics.cache_lookups.labels("off").inc()
            return None, "off"
        try:
            hit = await self.cache.find(call)
        except Exception:  # a call can be answered without it
            log.exception("the cache failed")
            hit = None
        self.metrics.cache_lookups.labels(hit.result if hit else "miss").inc()
        return hit, "hit" if hit else "miss"

    async def _routed(self, call: Call) -> AsyncGenerator[tuple[str, Chunk], None]:
        """From the first back end that begins to answer, with its name."""
        refusal: RequestError = Unavailable("there is no back end")
        for route in await self.router.routes(call):
            self.metrics.routes.labels(route.policy, route.backend.name, route.reason).inc()
            begun = False
            try:
                async with aclosing(route.backend.stream(call)) as chunks:
                    async for chunk in chunks:
                        begun = True
                        yield route.backend.name, chunk
                return
            except (Overloaded, Unavailable) as error:
                if begun:
                    raise
                refusal = error
        raise refusal


async def _given(hit: Hit) -> AsyncGenerator[tuple[str, Chunk], None]:
    for chunk in hit.chunks:
        yield CACHE, chunk
