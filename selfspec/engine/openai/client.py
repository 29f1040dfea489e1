"""An OpenAI-compatible server as one caller sees it: one streamed answer at a time, and when it came."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from selfspec import outbound
from selfspec.engine.vllm import cycles as vllm_cycles
from selfspec.errors import ConfigError, StageError, one_line
from selfspec.types import Completion, Cycle, Request

_TIMEOUT_S = 300.0
_MOST_BYTES = 64 * 2**20
"""Of an answer, with all its cycles."""
_MORE: Mapping[str, Mapping[str, Any]] = {
    "selfspec": {"selfspec": {"stats": True, "detail": True}},
    "vllm": {"return_token_ids": True, "stream_options": {"include_usage": True}},  # its metrics come with the usage
}
"""What is asked of whom, by who it says it is (``owned_by``): others refuse fields they do not know."""


class Server:
    """See the module's docstring."""

    def __init__(
        self,
        key: str,
        url: str,
        secret: str | None,
        read: Callable[[str, bool], Sequence[int]],
        direct: bool = False,
    ) -> None:
        """Asks nothing yet.

        Args:
            key: the setting that names it, for what a user is told.
            url: its base, with or without ``/v1``.
            secret: its API key; ``None``: it asks for none.
            read: text, and whether a stop token ended it -> token ids, where the server does not name them.
            direct: past any proxy that the environment names.
        """
        from openai import OpenAI

        self.key, self.url, self._secret, self._read = key, url, secret, read
        base = url.rstrip("/").removesuffix("/v1") + "/v1"
        http = outbound.client(_MOST_BYTES, trust_env=not direct)
        self._client = OpenAI(
            base_url=base, api_key=secret or "none", timeout=_TIMEOUT_S, max_retries=0, http_client=http
        )

    def close(self) -> None:
        """Lets go of the connection."""
        self._client.close()

    @cached_property
    def _listed(self) -> Any:
        """The first model it names.

        Raises:
            ConfigError: it does not answer, or names none.
        """
        from openai import OpenAIError

        try:
            return self._client.models.list().data[0]
        except (OpenAIError, outbound.TooMuch, IndexError, TypeError) as error:
            raise ConfigError(
                f"{self.key}={self.url}: no OpenAI-compatible server answers: {self._reason(error)}"
            ) from error

    @property
    def model(self) -> str:
        """What it calls the model it is asked for: the first it names."""
        return str(self._listed.id)

    def answer(self, request: Request) -> Completion:
        """One request's; times are the caller's, from asking to the first piece of text, and to the end.

        Raises:
            StageError: the server refused it, broke off, or said what is no answer.
        """
        try:
            return self._answer(request)
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            raise StageError(f"{self.key}={self.url}: an answer is none ({type(error).__name__})") from error

    def _answer(self, request: Request) -> Completion:
        model, finish, first, last = self.model, None, 0.0, 0.0
        pieces, named, stats, drafts = list[str](), list[Sequence[int]](), dict[str, Any](), dict[str, Any]()
        arrival = time.perf_counter()
        for event in self._stream(model, request):
            more = event.model_extra or {}
            stats = more.get("selfspec") or stats
            drafts = (more.get("metrics") or {}).get("speculative_decoding") or drafts
            for choice in event.choices:
                last = time.perf_counter() - arrival
                pieces.append(choice.text)
                named.append((choice.model_extra or {}).get("token_ids") or ())
                first = first or (last if choice.text or named[-1] else 0.0)
                finish = choice.finish_reason or finish
        if finish not in ("stop", "length"):
            raise StageError(f"{self.key}={self.url}: an answer broke off")
        ids = [token for piece in named for token in piece]
        tokens = stats.get("token_ids") or ids or self._read("".join(pieces), finish == "stop")
        if not tokens:
            raise StageError(f"{self.key}={self.url}: an answer had no tokens")
        cycles, first = _cycles(stats), first or last
        if drafts and ids:
            sizes = [len(piece) for piece in named if piece]
            cycles = vllm_cycles.of_answer(drafts, sizes, request.max_new_tokens, last - first)
        return Completion(tuple(tokens), cycles, first, last, "stop" if finish == "stop" else "length")

    def _stream(self, model: str, request: Request) -> Iterator[Any]:
        from openai import OpenAIError

        sampling = request.sampling
        more = dict(_MORE.get(self._listed.owned_by, {}))
        more |= {"ignore_eos": True} if request.ignore_eos else {}
        more |= {} if sampling.top_k is None else {"top_k": sampling.top_k}
        try:
            yield from self._client.completions.create(
                model=model,
                prompt=list(request.tokens),
                max_tokens=request.max_new_tokens,
                temperature=sampling.temperature,
                top_p=1.0 if sampling.top_p is None else sampling.top_p,
                seed=sampling.seed,
                stream=True,
                extra_headers={"X-Selfspec-Cache": "off"},
                extra_body=more,
            )
        except (OpenAIError, outbound.TooMuch) as error:
            raise StageError(f"{self.key}={self.url}: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        """As it says itself, where it does not speak of our key."""
        cause = error.__cause__
        said = one_line(error) + (f" ({one_line(cause)})" if cause is not None else "")
        return type(error).__name__ if outbound.quotes(said, self._secret) else said


def _cycles(stats: Mapping[str, Any]) -> tuple[Cycle, ...]:
    """Those that our gateway names, in columns; none from another server."""
    columns = stats.get("cycle_records")
    if not columns:
        return ()
    rows = zip(*(columns[name] for name in Cycle.__slots__), strict=True)
    cycles = (Cycle(**dict(zip(Cycle.__slots__, row, strict=True))) for row in rows)
    return tuple(replace(cycle, signals=tuple(cycle.signals)) for cycle in cycles)
