"""What stands before the app: who may call, whether we still take calls, and how much may be sent, and how slowly.

A page in a browser may make any name its own mean this machine (DNS rebinding), and then reads what it asks for here as
its own. Such a request carries that name. So, unless callers show a key, they must call us by a name of this machine or
of ``serve.allowed_hosts``, and no other site's page may send them.
"""

import asyncio
import hmac
import re
from ipaddress import ip_address
from typing import TYPE_CHECKING

from selfspec.serve.errors import Forbidden, RequestError, TooLarge, TooSlow, Unauthorized, Unavailable
from selfspec.serve.gateway import Gateway
from selfspec.serve.wire import hashed

if TYPE_CHECKING:
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PUBLIC = ("/health", "/metrics")
"""What needs no key, and is answered while we drain."""
_NO_NAMES = {"0.0.0.0", "::"}  # noqa: S104  nothing is bound here
"""Where a server listens that listens everywhere: nobody's address."""
_AGAIN = (429, 503)
"""What is worth trying again, after a second."""


class Guard:
    """ASGI middleware: when the app sees a request, its body has been read, and is small."""

    def __init__(self, app: "ASGIApp", gateway: Gateway, key: str | None) -> None:
        """``key``: what callers must send; ``None``: everyone may call."""
        self.app, self._gateway = app, gateway
        self._wanted = None if key is None else hashed(key)
        settings = gateway.settings
        self._any_host = key is not None and settings.allowed_hosts is None
        self._sites = {name.lower() for name in settings.allowed_hosts or ()}
        self._hosts = self._sites | {settings.host.lower()} - _NO_NAMES

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Passes on what it does not refuse, with the hash of the caller's key in the request's state."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_host(scope)
            if scope["path"] in PUBLIC:
                await self.app(scope, receive, send)
                return
            scope.setdefault("state", {})["key"] = self._caller(scope)
            if self._gateway.draining:
                raise Unavailable("the server is about to stop")
            body = await self._read(scope, receive)
        except RequestError as error:
            await refusal(error, self._gateway)(scope, receive, send)
            return
        if body is None:
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> "Message":
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)

    def _check_host(self, scope: "Scope") -> None:
        """Refuses who calls us by another's name, or is sent by another's page.

        Raises:
            Forbidden: naming the setting that would let it in.
        """
        if self._any_host:
            return
        sent = {name: value.decode("latin-1").strip().lower() for name, value in scope["headers"]}
        host, origin = sent.get(b"host", ""), sent.get(b"origin")
        if not self._ours(name_of(host)):
            raise Forbidden(f"Host {host[:100]}: is none of ours; others are named in serve.allowed_hosts")
        there = None if origin is None else origin.partition("://")[2]
        if there is not None and there != host and name_of(there) not in self._sites:
            raise Forbidden("a page of another site asks; others are named in serve.allowed_hosts")

    def _ours(self, name: str) -> bool:
        if name == "localhost" or name in self._hosts:
            return True
        try:
            return ip_address(name).is_loopback
        except ValueError:
            return False

    def _caller(self, scope: "Scope") -> str | None:
        """A hash of the key that was sent.

        Raises:
            Unauthorized: it is not the one wanted.
        """
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        scheme, _, key = sent.partition(" ")
        got = hashed(key.strip()) if scheme.lower() == "bearer" else None
        if self._wanted is not None and (got is None or not hmac.compare_digest(got, self._wanted)):
            raise Unauthorized("a valid API key is needed: Authorization: Bearer ...")
        return got

    async def _read(self, scope: "Scope", receive: "Receive") -> bytes | None:
        """The body; ``None``: the client left.

        Raises:
            TooLarge, TooSlow: it is, or it says so.
        """
        most, patience = self._gateway.settings.max_body_bytes, self._gateway.settings.client_timeout_s
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_large = TooLarge(f"the body is longer than {most} bytes")
        if told.isdigit() and int(told) > most:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(patience):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise too_large
        except TimeoutError as error:
            raise TooSlow(f"the body took longer than {patience:g} s") from error
        return bytes(body)


def name_of(host: str) -> str:
    """A ``Host`` without its port; empty where it is none."""
    found = re.fullmatch(r"\[([0-9a-f:.]+)\](?::\d+)?|([a-z0-9_.-]+)(?::\d+)?", host)
    return "" if found is None else found[1] or found[2]


def refusal(error: RequestError, gateway: Gateway) -> "JSONResponse":
    """An error as OpenAI's clients read it; counted."""
    from starlette.responses import JSONResponse

    gateway.metrics.errors.labels(type(error).__name__).inc()
    headers = {"retry-after": "1"} if error.status in _AGAIN else {}
    if error.status == Unauthorized.status:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)
