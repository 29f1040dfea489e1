"""The gateway over HTTP: OpenAI's API, health and metrics."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from selfspec.serve.errors import Failed, RequestError, UnknownModel
from selfspec.serve.gateway import Gateway
from selfspec.serve.guard import Guard, refusal
from selfspec.serve.reply import Reply
from selfspec.serve.wire import ChatRequest, CompletionRequest, invalid

OFF = "off"
"""What ``X-Selfspec-Cache`` says where an answer may neither come from the cache nor go there."""


def make(gateway: Gateway, key: str | None) -> FastAPI:
    """The app; whoever runs it closes the gateway by its lifespan.

    Args:
        key: what callers must send; ``None``: everyone may call.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await gateway.close()

    app = FastAPI(title="selfspec", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, gateway=gateway, key=key)
    _add_errors(app, gateway)
    created = int(time.time())

    def reply(asked: CompletionRequest | ChatRequest, request: Request) -> Reply:
        cached = request.headers.get("x-selfspec-cache", "").lower() != OFF
        call = asked.call(request.state.key, cached)
        options = asked.stream_options
        return Reply(gateway, call, bool(asked.stream), options is not None and options.include_usage)

    @app.post("/v1/completions", response_class=Reply, status_code=200, responses=_RESPONSES)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Goes on with a text."""
        return reply(asked, request)

    @app.post("/v1/chat/completions", response_class=Reply, status_code=200, responses=_RESPONSES)
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        """Answers in a chat."""
        return reply(asked, request)

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "selfspec"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What may be asked for."""
        return {"object": "list", "data": [described(name) for name in gateway.router.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Whether a model may be asked for."""
        if name not in gateway.router.models:
            raise UnknownModel(f"model: {name} is not served", "model")
        return described(name)

    @app.get("/health")
    async def health() -> Response:
        """200 while calls are answered, else 503."""
        if await gateway.healthy():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "draining" if gateway.draining else "unavailable"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(gateway.metrics.exposition(), media_type="text/plain; version=0.0.4")

    return app


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}},
    **{status: {"description": "OpenAI's error object"} for status in (400, 401, 403, 404, 408, 413, 429, 500, 503)},
}


class Refused(RequestError):
    """What the framework refuses: a path or a method there is not."""

    kind = "invalid_request_error"


def _add_errors(app: FastAPI, gateway: Gateway) -> None:
    """Every error has OpenAI's shape."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return refusal(error, gateway)

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        return refusal(invalid(list(error.errors())), gateway)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        told = Refused(f"{request.method} {request.url.path}: {error.detail}")
        told.status = error.status_code  # type: ignore[misc]
        return refusal(told, gateway)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return refusal(Failed("the server failed"), gateway)
