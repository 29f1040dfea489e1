"""Plan -> gateway: the one place where its parts are made and put together."""

import asyncio
import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from selfspec import fitting
from selfspec.engine import factory
from selfspec.engine.base import Opens, Tokenizer
from selfspec.errors import ConfigError, one_line
from selfspec.plan import Plan
from selfspec.serve.backend import Backend, Call, Route, Router
from selfspec.serve.cache import AnswerCache
from selfspec.serve.config import BackendConfig, CacheMode
from selfspec.serve.errors import Unavailable
from selfspec.serve.estimates import Timed
from selfspec.serve.gateway import Gateway
from selfspec.serve.guard import name_of
from selfspec.serve.local import Local
from selfspec.serve.metrics import Metrics
from selfspec.serve.remote import Remote
from selfspec.serve.router import Option, PolicyRouter
from selfspec.types import Request

log = logging.getLogger(__name__)

KEY = "SELFSPEC_API_KEY"
"""The environment's API key wins over the config's: no file and no process list shows it."""


def check(plan: Plan) -> None:
    """Refuses, before anything is loaded, what cannot be served.

    Raises:
        ConfigError: with the setting, and what can.
    """
    factory.require(plan, Opens, "cannot be served; allowed are")
    if plan.controller.chosen_exits and plan.serve.max_batch > 1:
        asked = f"serve.max_batch={plan.serve.max_batch}"
        raise ConfigError(f"{asked}: controller={plan.controller.name} decodes one request at a time")
    for host in plan.serve.allowed_hosts or ():
        if host.lower() not in (name_of(host.lower()), name_of(f"[{host.lower()}]")):
            raise ConfigError(f"serve.allowed_hosts: {host}: must be a name or an address, without scheme and port")
    for backend in plan.serve.backends:
        if backend.key_env is not None and not os.environ.get(backend.key_env):
            raise ConfigError(f"serve.backends: {backend.name}: key_env={backend.key_env}: the environment has none")


def api_key(plan: Plan) -> str | None:
    """What callers must send."""
    return os.environ.get(KEY) or plan.serve.api_key


def local(plan: Plan, metrics: Metrics) -> Local:
    """Our own engine's back end; loading has begun."""
    return Local("local", lambda: engine(plan), plan.serve, plan.draft.name, metrics)


def engine(plan: Plan) -> Opens:
    """The plan's engine with its head in place, fitted if need be, and warm.

    Raises:
        UserError: something it needs cannot be had.
    """
    made = factory.make(plan)
    assert isinstance(made, Opens), "checked above"
    fitting.install(made, plan)
    made.generate([Request(tuple(made.tokenizer.encode("Hello", chat=False)), 4, ignore_eos=True)])
    return made


def gateway(plan: Plan, local: Local, metrics: Metrics) -> Gateway:
    """The gateway over our own engine's back end and whatever else the plan names."""
    cache = None if plan.serve.cache.mode is CacheMode.none else AnswerCache(plan.serve.cache)
    return Gateway(plan.serve, router(plan, local, metrics), cache, metrics)


def router(plan: Plan, local: Local, metrics: Metrics) -> Router:
    """Chooses among ``local`` and the back ends of ``serve.backends``."""
    name, settings = plan.serve.model_name or plan.model.name, plan.serve.router
    if not plan.serve.backends:
        return Fixed([name], local)

    async def read(call: Call) -> Sequence[int]:
        """The tokens of a call's prompt, by our tokenizer."""
        if isinstance(call.prompt, tuple):
            return call.prompt
        if not await local.healthy():
            raise Unavailable("the engine is not ready")
        return await asyncio.to_thread(tokens, local.ready.result().tokenizer, call)

    options = [Option(Timed(local), (name, local.name), settings.max_total_tokens)]
    for other in plan.serve.backends:
        names = (other.name,) if other.model is None else (other.name, other.model)
        options.append(Option(Timed(backend(plan, other, local, metrics)), names, other.max_total_tokens))
    return PolicyRouter(settings, options, read, plan.serve.max_tokens)


def backend(plan: Plan, config: BackendConfig, local: Local, metrics: Metrics) -> Backend:
    """One of ``serve.backends``."""
    if config.url is not None:
        return Remote(config, plan.serve.max_tokens)

    def quantised() -> Opens:
        """The same engine in int8, once the other has loaded; it drafts by the same head."""
        local.ready.result()
        return engine(replace(plan, engine=plan.engine.int8()))

    def tell(loaded: Future[Opens]) -> None:
        if error := loaded.exception():
            log.error("back end %s cannot be loaded: %s", config.name, one_line(error))

    made = Local(config.name, quantised, plan.serve, plan.draft.name, metrics)
    made.ready.add_done_callback(tell)
    return made


def tokens(tokenizer: Tokenizer, call: Call) -> Sequence[int]:
    """Of a call's text or chat; none, where the template refuses it: a back end will say why."""
    if call.messages is None:
        return tokenizer.encode(str(call.prompt), chat=False)
    try:
        return tokenizer.encode_chat(call.messages)
    except ValueError:
        return ()


class Fixed:
    """Always the same back end."""

    def __init__(self, models: Sequence[str], backend: Backend) -> None:
        self.models, self._backend = models, backend

    @property
    def backends(self) -> Sequence[Backend]:
        """That one."""
        return [self._backend]

    async def routes(self, call: Call) -> Sequence[Route]:
        """There is no choice."""
        return [Route(self._backend, "fixed", "only")]
