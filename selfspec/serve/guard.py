"""What stands before the app: who may call, whether we still take calls, and how much may be sent, and how slowly."""

import asyncio
import hmac
from typing import TYPE_CHECKING

from selfspec.serve.errors import RequestError, TooLarge, TooSlow, Unauthorized, Unavailable
from selfspec.serve.gateway import Gateway
from selfspec.serve.wire import hashed

if TYPE_CHECKING:
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PUBLIC = ("/health", "/metrics")
"""What needs no key, and is answered while we drain."""
_AGAIN = (429, 503)
"""What is worth trying again, after a second."""


class Guard:
    """ASGI middleware: when the app sees a request, its body has been read, and is small."""

    def __init__(self, app: "ASGIApp", gateway: Gateway, key: str | None) -> None:
        """``key``: what callers must send; ``None``: everyone may call."""
        self.app, self._gateway = app, gateway
        self._wanted = None if key is None else hashed(key)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Passes on what it does not refuse, with the hash of the caller's key in the request's state."""
        if scope["type"] != "http" or scope["path"] in PUBLIC:
            await self.app(scope, receive, send)
            return
        try:
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


def refusal(error: RequestError, gateway: Gateway) -> "JSONResponse":
    """An error as OpenAI's clients read it; counted."""
    from starlette.responses import JSONResponse

    gateway.metrics.errors.labels(type(error).__name__).inc()
    headers = {"retry-after": "1"} if error.status in _AGAIN else {}
    if error.status == Unauthorized.status:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)
