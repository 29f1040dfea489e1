"""How we ask other people's servers: what they answer is data, wherever it leads and however much it is.

A client of ours follows no redirect (a prompt and a key go to the host that was configured and to no other), asks for
nothing compressed and takes nothing that is, and reads so many bytes of an answer at most. What a server says of a
request may be told on where it does not speak of our key (:func:`quotes`).
"""

import base64
import re
from collections.abc import AsyncIterator, Iterator
from importlib import import_module
from typing import Any
from urllib.parse import unquote

_PART = 8
"""Characters of a key, in a row, that may be no coincidence."""


class TooMuch(Exception):
    """A server says more than it may, or says it compressed."""


def async_client(most_bytes: int) -> Any:
    """For ``AsyncOpenAI(http_client=...)``.

    Args:
        most_bytes: of an answer.
    """
    from openai import DefaultAsyncHttpxClient

    base = _library(DefaultAsyncHttpxClient).AsyncByteStream

    class Bounded(base):  # type: ignore[misc, valid-type]
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            left = most_bytes
            async for piece in self._stream:
                left = _less(left, piece)
                yield piece

        async def aclose(self) -> None:
            await self._stream.aclose()

    async def bound(response: Any) -> None:
        _refuse_compressed(response)
        response.stream = Bounded(response.stream)

    return DefaultAsyncHttpxClient(**_settings(bound))


def client(most_bytes: int, **settings: Any) -> Any:
    """The same for ``OpenAI(http_client=...)``."""
    from openai import DefaultHttpxClient

    base = _library(DefaultHttpxClient).SyncByteStream

    class Bounded(base):  # type: ignore[misc, valid-type]
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            left = most_bytes
            for piece in self._stream:
                left = _less(left, piece)
                yield piece

        def close(self) -> None:
            self._stream.close()

    def bound(response: Any) -> None:
        _refuse_compressed(response)
        response.stream = Bounded(response.stream)

    class Client(DefaultHttpxClient):
        def __del__(self) -> None:  # as the official client's own: who measures lets go of it, and no more
            self.close()

    return Client(**_settings(bound), **settings)


def quotes(text: str, key: str | None) -> bool:
    """Whether a text may tell a key, or some of it: in any case, spaced out, escaped, in base64 or in hex."""
    if key is None:
        return False
    said = _bare(unquote(text))
    forms = (key, base64.b64encode(key.encode()).decode(), key.encode().hex())
    return any(part in said for form in forms for part in _parts(_bare(form)))


def _parts(form: str) -> Iterator[str]:
    return (form[at : at + _PART] for at in range(max(len(form) - _PART, 0) + 1))


def _bare(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.casefold())


def _settings(bound: Any) -> dict[str, Any]:
    headers = {"accept-encoding": "identity"}
    return {"follow_redirects": False, "headers": headers, "event_hooks": {"response": [bound]}}


def _refuse_compressed(response: Any) -> None:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise TooMuch("a compressed answer, which nobody asked for")


def _less(left: int, piece: bytes) -> int:
    if len(piece) > left:
        raise TooMuch("an answer without an end")
    return left - len(piece)


def _library(client: type) -> Any:
    """What the official client asks by: httpx, or what it is called today."""
    base = next(each for each in client.__mro__ if not each.__module__.startswith("openai"))
    return import_module(base.__module__.partition(".")[0])
