"""An answer over HTTP, as OpenAI's clients read it: one JSON object, or server-sent events."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from selfspec.serve.backend import Call, Chunk, TokenLogprob, Usage
from selfspec.serve.errors import Failed, RequestError
from selfspec.serve.gateway import Gateway
from selfspec.serve.guard import refusal

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)


class Reply(Response):
    """Answers a call while it is being sent; stops as soon as the client is gone.

    The status waits for the first chunk: before that, an error has a status of its own.
    """

    def __init__(self, gateway: Gateway, call: Call, stream: bool, include_usage: bool) -> None:
        super().__init__()
        self._gateway, self._call, self._stream = gateway, call, stream
        self._form = (Chat if call.messages is not None else Completion)(call, include_usage)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Works until it is done or the client leaves."""
        work = asyncio.ensure_future(self._work(scope, receive, send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._gateway.metrics.errors.labels("Disconnected").inc()
        finally:
            for task in (work, leaving):
                if not task.done():
                    task.cancel()
            await asyncio.wait((work, leaving))
        if not work.cancelled():
            work.result()

    async def _work(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        try:
            async with aclosing(self._gateway.answer(self._call)) as chunks:
                first = await anext(chunks)
                if self._stream:
                    await self._send_events(first, chunks, send)
                    return
                body = self._form.whole([first] + [chunk async for chunk in chunks])
            await JSONResponse(body)(scope, receive, send)
        except RequestError as error:
            await refusal(error, self._gateway)(scope, receive, send)

    async def _send_events(self, first: Chunk, chunks: AsyncGenerator[Chunk, None], send: "Send") -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            for event in self._form.events(first, beginning=True):
                await self._event(event, send)
            async for chunk in chunks:
                for event in self._form.events(chunk):
                    await self._event(event, send)
            await self._event("[DONE]", send)
        except RequestError as error:
            await self._break_off(error, send)
        except Exception:
            log.exception("an answer broke off")
            await self._break_off(Failed("the server failed"), send)
        await send({"type": "http.response.body", "body": b""})

    async def _break_off(self, error: RequestError, send: "Send") -> None:
        """The status is out: an error can only be an event."""
        self._gateway.metrics.errors.labels(type(error).__name__).inc()
        await self._event(error.body(), send)

    async def _event(self, data: Mapping[str, Any] | str, send: "Send") -> None:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})
        await asyncio.sleep(0)  # a send fails without a word: the loop has to hear of it before there is another


async def _left(receive: "Receive") -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Completion:
    """``text_completion`` objects."""

    kind = piece_kind = "text_completion"

    def __init__(self, call: Call, include_usage: bool) -> None:
        self._call, self._include_usage = call, include_usage
        self._created = int(time.time())
        self._offset = 0

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """All of it as one object."""
        text, last = "".join(chunk.text for chunk in chunks), chunks[-1]
        logprobs = [each for chunk in chunks for each in chunk.logprobs or ()]
        body = self._object(self.kind, [self._choice(text, logprobs, last.finish)])
        body["usage"] = _usage(last.usage)
        return body if last.stats is None else body | {"selfspec": last.stats}

    def events(self, chunk: Chunk, beginning: bool = False) -> list[dict[str, Any]]:
        """A chunk as objects of a stream: none, if there is nothing to say."""
        found = []
        if self._speaks(chunk, beginning):
            choice = self._piece(chunk.text, chunk.logprobs or [], chunk.finish, beginning)
            found.append(self._object(self.piece_kind, [choice]))
        if chunk.finish is not None and chunk.stats is not None:
            found[-1]["selfspec"] = chunk.stats
        if self._include_usage:
            for each in found:
                each["usage"] = None
            if chunk.finish is not None:
                found.append(self._object(self.piece_kind, []) | {"usage": _usage(chunk.usage)})
        return found

    def _speaks(self, chunk: Chunk, beginning: bool) -> bool:
        return bool(chunk.text or chunk.logprobs or chunk.finish)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._call.id,
            "object": kind,
            "created": self._created,
            "model": self._call.model,
            "choices": choices,
        }

    def _choice(self, text: str, logprobs: Sequence[TokenLogprob], finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": self._logprobs(logprobs), "finish_reason": finish}

    def _piece(self, text: str, logprobs: Sequence[TokenLogprob], finish: str | None, beginning: bool) -> Any:
        return self._choice(text, logprobs, finish)

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._call.logprobs is None:
            return None
        offsets = []
        for each in found:
            offsets.append(self._offset if each.offset is None else each.offset)
            self._offset = offsets[-1] + len(each.token)
        return {
            "tokens": [each.token for each in found],
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": [{top.token: top.logprob for top in each.top} for each in found],
            "text_offset": offsets,
        }


class Chat(Completion):
    """``chat.completion`` objects, and ``chat.completion.chunk`` ones."""

    kind, piece_kind = "chat.completion", "chat.completion.chunk"

    def _speaks(self, chunk: Chunk, beginning: bool) -> bool:
        return beginning or super()._speaks(chunk, beginning)

    def _choice(self, text: str, logprobs: Sequence[TokenLogprob], finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": self._logprobs(logprobs), "finish_reason": finish}

    def _piece(self, text: str, logprobs: Sequence[TokenLogprob], finish: str | None, beginning: bool) -> Any:
        delta = {"role": "assistant", "content": text} if beginning else {"content": text} if text else {}
        return {"index": 0, "delta": delta, "logprobs": self._logprobs(logprobs), "finish_reason": finish}

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._call.logprobs is None:
            return None

        def told(of: TokenLogprob) -> dict[str, Any]:
            data = of.token.encode() if of.utf8 is None else of.utf8
            return {"token": of.token, "logprob": of.logprob, "bytes": list(data)}

        content = [told(each) | {"top_logprobs": [told(top) for top in each.top]} for each in found]
        return {"content": content, "refusal": None}


def _usage(usage: Usage | None) -> dict[str, int] | None:
    if usage is None:
        return None
    return {**usage._asdict(), "total_tokens": sum(usage)}
