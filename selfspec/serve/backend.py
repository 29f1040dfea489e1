"""The contract of a back end: a call goes in, chunks of text come out. App, router and cache agree on it."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Call:
    """One validated request. Either ``prompt`` or ``messages`` is given.

    Attributes:
        id: the answer's own, such as ``chatcmpl-...``; unique.
        model: as the caller named it.
        prompt: text, or the model's token ids.
        messages: a chat, as dicts of ``role`` and ``content`` (text).
        max_tokens: of the answer; ``None``: as many as the back end allows.
        temperature: 0 is greedy.
        top_k: only the k likeliest tokens may be drawn; ``None``: all.
        seed: of the draws; the same call with the same seed gets the same answer.
        stop: texts that end the answer, which leaves them out.
        logprobs: how many alternatives to give beside each token's log-probability; ``None``: neither.
        key: a hash of the caller's API key, never the key; ``None``: no key is asked for.
        stats: whether the last chunk is to carry speculation statistics.
        detail: whether these have the answer's token ids and every cycle, too.
        cache: whether the answer may come from, and go to, the cache.
        ignore_eos: go on after the model's end-of-sequence token.
    """

    id: str
    model: str
    prompt: tuple[int, ...] | str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    key: str | None = None
    stats: bool = False
    detail: bool = False
    cache: bool = True
    ignore_eos: bool = False


class Usage(NamedTuple):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int


class TokenLogprob(NamedTuple):
    """A token's natural log-probability under the model, and its ``top`` alternatives', likeliest first.

    Attributes:
        token: its text where it stands; ``bytes:\\xf0\\x9f`` of a part of a character, ``token_id:7`` where another
            alternative has the same text.
        utf8: what it is of the text; ``None``: not known.
        offset: the character of the answer's text at which it begins; ``None``: not known.
    """

    token: str
    logprob: float
    utf8: bytes | None = None
    offset: int | None = None
    top: "tuple[TokenLogprob, ...]" = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. The last one, and only it, has ``finish`` and ``usage``, and ``stats`` if asked for.

    Attributes:
        text: whole characters only; may be empty.
        tokens: how many new tokens came with it, whether or not their text is out yet.
        logprobs: of those tokens, if asked for.
        stats: ``cycles``, ``proposed``, ``accepted``, ``acceptance``, ``acceptance_length``, ``queue_ms``,
            ``ttft_ms``, ``total_ms``; what a back end does not know is missing. The app adds ``backend``, ``cache``.
    """

    text: str
    tokens: int = 0
    logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None
    usage: Usage | None = None
    stats: Mapping[str, Any] | None = None


class Price(NamedTuple):
    """US dollars for a million tokens read and written."""

    input: float = 0.0
    output: float = 0.0


class Backend(Protocol):
    """Answers calls."""

    @property
    def name(self) -> str:
        """For metrics and logs."""
        ...

    @property
    def price(self) -> Price:
        """Nothing, if it is ours."""
        ...

    def stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """The answer as it comes; closing the iterator cancels the work.

        Raises:
            RequestError: from the first ``anext`` on. Before the first chunk nothing has been said yet, and
                after ``Overloaded`` or ``Unavailable`` another back end may be asked.
        """
        ...

    async def healthy(self) -> bool:
        """Whether it would answer now."""
        ...

    async def close(self) -> None:
        """Frees what it holds; calls that are running are cancelled."""
        ...


class Route(NamedTuple):
    """A back end, and why it was chosen."""

    backend: Backend
    policy: str
    reason: str


class Router(Protocol):
    """Chooses the back end for a call."""

    @property
    def models(self) -> Sequence[str]:
        """The names that callers may ask for."""
        ...

    @property
    def backends(self) -> Sequence[Backend]:
        """All there are."""
        ...

    async def routes(self, call: Call) -> Sequence[Route]:
        """Best first; the next is asked where one is overloaded or unavailable.

        Raises:
            Unavailable: there is none.
        """
        ...


class Hit(NamedTuple):
    """An answer from the cache: its chunks, the last with ``finish`` and ``usage``."""

    result: Literal["exact", "same_words"]
    chunks: Sequence[Chunk]


class Cache(Protocol):
    """Answers given before. Keeps those of different ``Call.key`` apart."""

    async def find(self, call: Call) -> Hit | None:
        """What was answered to the same call, or to one in the same words."""
        ...

    async def keep(self, call: Call, chunks: Sequence[Chunk]) -> None:
        """Remembers a whole answer, if it may be given again."""
        ...
