"""Which back end answers a call: the one asked for, or the best by the policy.

A caller who names a back end, or the model it serves, is answered by one that serves it. Who asks for :data:`AUTO`
leaves the choice to ``serve.router.policy``:

- ``fixed``: our own engine, then the others in the order of the configuration.
- ``cost``: the cheapest of those that are expected to keep the budgets of time and money, the faster of two that cost
  the same; where none keeps them, the fastest of those that keep the one of money; where none does, the cheapest.
- ``length``: the first that takes prompt and answer together; a limit of ``null`` is none.

The others follow as fall-backs, the healthy ones first.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from selfspec.serve.backend import Backend, Call, Route
from selfspec.serve.config import RouteName, RouterConfig
from selfspec.serve.errors import Unavailable
from selfspec.serve.estimates import Timed, dollars

AUTO = "auto"
"""The model that leaves the choice to the router."""
_HEALTH_S = 5.0
"""Health is asked for this often at most, beside the calls and never in their way."""
_log = logging.getLogger(__name__)


class Option(NamedTuple):
    """A back end, and what it is taken for.

    Attributes:
        models: the names it answers to.
        max_total_tokens: the most tokens, prompt and answer, under ``policy=length``.
    """

    backend: Timed
    models: tuple[str, ...]
    max_total_tokens: int | None = None


class PolicyRouter:
    """See the module's docstring.

    Args:
        options: in order of preference.
        read: a call -> the tokens of its prompt; asked where the policy needs them.
        max_tokens: of an answer where the caller does not say.
    """

    def __init__(
        self,
        config: RouterConfig,
        options: Sequence[Option],
        read: Callable[[Call], Awaitable[Sequence[int]]],
        max_tokens: int,
    ) -> None:
        self._config, self._options, self._read, self._max_tokens = config, options, read, max_tokens
        self._health: dict[str, bool] = {}
        self._asked: float | None = None
        self._asking: asyncio.Task[None] | None = None
        self.backends: Sequence[Backend] = [option.backend for option in options]
        self.models = list(dict.fromkeys([name for option in options for name in option.models] + [AUTO]))

    async def routes(self, call: Call) -> Sequence[Route]:
        """Best first; see the module's docstring.

        Raises:
            Unavailable: no back end serves the model.
        """
        named = [option for option in self._options if call.model in option.models]
        candidates = named or ([*self._options] if call.model == AUTO else [])
        if not candidates:
            raise Unavailable(f"no back end serves {call.model}")
        best, reason = (candidates[0], "named") if named else await self._choose(call)
        await self._look(candidates)
        ordered = [best, *(option for option in candidates if option is not best)]
        ordered.sort(key=lambda option: not self._health.get(option.backend.name, True))  # stable
        policy = self._config.policy.name
        routes = [Route(o.backend, policy, reason if o is best else "fallback") for o in ordered]
        told = {"call": call.id, "policy": policy, "backend": routes[0].backend.name, "reason": routes[0].reason}
        _log.info("route %s", json.dumps(told))
        return routes

    async def _choose(self, call: Call) -> tuple[Option, str]:
        if self._config.policy is RouteName.fixed or len(self._options) == 1:
            return self._options[0], "default"
        prompt, answer = await self._read(call), call.max_tokens or self._max_tokens
        if self._config.policy is RouteName.cost:
            return self._by_cost(len(prompt), answer)
        return self._by_length(len(prompt) + answer)

    def _by_length(self, tokens: int) -> tuple[Option, str]:
        for option in self._options:
            if option.max_total_tokens is None or tokens <= option.max_total_tokens:
                return option, "length"
        return self._options[-1], "beyond_all"  # which is meant for most

    def _by_cost(self, prompt: int, answer: int) -> tuple[Option, str]:
        def costs(option: Option) -> float:
            return dollars(option.backend.price, prompt, answer)

        def takes(option: Option) -> float:
            return option.backend.expected(answer)

        most_usd, most_s = self._config.budget_usd, self._config.budget_s
        affordable = [option for option in self._options if most_usd is None or costs(option) <= most_usd]
        quick = [option for option in affordable if most_s is None or takes(option) <= most_s]
        if quick:
            return min(quick, key=lambda option: (costs(option), takes(option))), "cheapest"
        if affordable:
            return min(affordable, key=takes), "too_slow"
        return min(self._options, key=costs), "too_dear"

    async def _look(self, options: Sequence[Option]) -> None:
        """Asks how the back ends are; waits only for those it knows nothing of yet."""
        now = time.monotonic()
        if self._asking is None and (self._asked is None or now - self._asked >= _HEALTH_S):
            self._asked = now
            self._asking = asyncio.create_task(self._ask())
        if self._asking is not None and any(option.backend.name not in self._health for option in options):
            await asyncio.shield(self._asking)

    async def _ask(self) -> None:
        try:
            found = await asyncio.gather(*(backend.healthy() for backend in self.backends))
            self._health = {backend.name: well for backend, well in zip(self.backends, found, strict=True)}
        finally:
            self._asking = None
