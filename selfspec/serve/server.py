"""Runs the gateway until it is told to stop; then takes no more calls, and ends those it has begun."""

import asyncio
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from selfspec.errors import ConfigError
from selfspec.plan import Plan
from selfspec.serve import app, build
from selfspec.serve.config import Serve
from selfspec.serve.connections import BACKLOG, Connections, protocol, quiet
from selfspec.serve.gateway import Gateway
from selfspec.serve.local import Local
from selfspec.serve.metrics import Metrics

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_S = 0.02
_GRACE_S = 1
"""For the last words of answers, once they have been ended; who has not read them then has had his time."""


def run(plan: Plan) -> None:
    """Serves a plan until SIGTERM or SIGINT; says so in one line on stdout when it is ready.

    Raises:
        UserError: something the user can put right.
    """
    build.check(plan)
    with _listening(plan.serve) as listener:
        metrics = Metrics()
        local = build.local(plan, metrics)
        gateway = build.gateway(plan, local, metrics)
        port = listener.getsockname()[1]
        asyncio.run(_run(plan, gateway, local, listener, f"serving {plan.label} on http://{_host(plan.serve)}:{port}"))


async def _run(plan: Plan, gateway: Gateway, local: Local, listener: socket.socket, ready: str) -> None:
    server, stop, loop = Server(gateway, build.api_key(plan)), asyncio.Event(), asyncio.get_running_loop()
    quiet(loop)
    # Not by the loop's own way, which loses a signal while the engine fills the pipe that both wake the loop by.
    previous = {n: signal.signal(n, lambda *_: loop.call_soon_threadsafe(stop.set)) for n in SIGNALS}
    serving, told = asyncio.ensure_future(server.serve([listener])), asyncio.ensure_future(stop.wait())
    loaded = asyncio.wrap_future(local.ready)
    try:
        await asyncio.wait((loaded, told, serving), return_when=asyncio.FIRST_COMPLETED)
        if loaded.done():
            loaded.result()
            print(ready, flush=True)
        await asyncio.wait((told, serving), return_when=asyncio.FIRST_COMPLETED)
        await _drain(gateway, plan.serve.drain_s)
        await gateway.close()  # what is still being answered ends with an error that says so
    finally:
        loaded.cancel()
        told.cancel()
        server.should_exit = True
        await serving
        for signum, handler in previous.items():
            signal.signal(signum, handler)


async def _drain(gateway: Gateway, most_s: float) -> None:
    """Waits for the answers that have begun, so long at most; new calls are refused meanwhile."""
    gateway.draining, until = True, time.monotonic() + most_s
    while gateway.active and time.monotonic() < until:
        await asyncio.sleep(_LOOK_S)


class Server(uvicorn.Server):
    """uvicorn's, whose connections and signals are ours."""

    def __init__(self, gateway: Gateway, key: str | None, **settings: Any) -> None:
        """See :func:`app.make <selfspec.serve.app.make>`; ``settings``: of uvicorn's, in place of ours."""
        self._connections = Connections(gateway.settings, lambda kind: gateway.metrics.errors.labels(kind).inc())
        ours: dict[str, Any] = {
            **{"http": protocol(self._connections), "ws": "none", "backlog": BACKLOG, "proxy_headers": False},
            **{"log_level": "error", "access_log": False, "server_header": False},
            "timeout_graceful_shutdown": 5 * _GRACE_S,
        }
        super().__init__(uvicorn.Config(app.make(gateway, key), **ours | settings))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; those who come while we are busy wait, however many we look at in one go."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(socket.SOMAXCONN)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which tears its tasks out, each with a traceback: a client that leaves ends them quietly."""
        asyncio.get_running_loop().call_later(_GRACE_S, self._connections.close)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone: they are ours."""
        yield


@contextmanager
def _listening(settings: Serve) -> Iterator[socket.socket]:
    """A socket that takes connections.

    Raises:
        ConfigError: the address is not to be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigError(
                f"serve.host={settings.host} serve.port={settings.port}: cannot listen there ({error.strerror})"
            ) from error
        yield listener


def _host(settings: Serve) -> str:
    return f"[{settings.host}]" if ":" in settings.host else settings.host
