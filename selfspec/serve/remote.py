"""Any OpenAI-compatible server as a back end: vLLM, a paid API, another gateway of ours.

The official client speaks the protocol; what it leaves to us is here. A call is tried again, with growing pauses, only
while nothing of its answer has come; every wait has a limit; a server that keeps failing is left alone
(``breaker.py``); closing the iterator closes the connection, which is how such a server learns to stop.
"""

import asyncio
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from selfspec.config import BackendConfig
from selfspec.errors import ConfigError
from selfspec.serve.backend import Call, Chunk, Price, TokenLogprob, Usage
from selfspec.serve.breaker import Breaker
from selfspec.serve.errors import Failed, Invalid, Overloaded, RequestError, TooLong, Unavailable

if TYPE_CHECKING:
    from openai import APIStatusError

_PAUSE = 0.25
"""Seconds before the first retry; each later one waits twice as long, and all a little more or less, by chance."""
_HEALTH_S = 5.0
"""How long a server may take to say that it is well."""
_CALLERS_FAULT = (400, 413, 422)


class Remote:
    """See the module's docstring.

    Raises:
        ConfigError: the environment lacks the key that the config names.
    """

    def __init__(self, config: BackendConfig) -> None:
        from openai import AsyncOpenAI, Timeout

        assert config.url is not None, "checked by the plan"
        self.name, self.price = config.name, Price(config.input_price, config.output_price)
        self._config, self.breaker = config, Breaker(config.breaker_threshold, config.breaker_reset_s)
        key = "none" if config.key_env is None else os.environ.get(config.key_env, "")
        if not key:
            raise ConfigError(f"serve.backends: {self.name}: key_env={config.key_env}: the environment has none")
        waits = Timeout(config.first_s, connect=config.connect_s)  # of what comes later, `_limited` takes care
        self._client = AsyncOpenAI(base_url=config.url, api_key=key, max_retries=0, timeout=waits)

    async def healthy(self) -> bool:
        """Whether it lists its models; at once, where the breaker knows better."""
        if not self.breaker.allows:
            return False
        try:
            async with asyncio.timeout(_HEALTH_S):
                await self._client.models.list()
        except Exception as error:  # whatever it is, it is no answer
            if _speaks(error):
                self.breaker.failed()
            return False
        return True

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.close()

    async def stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """The answer as it comes; see :meth:`Backend.stream <selfspec.serve.backend.Backend.stream>`.

        Raises:
            Invalid, TooLong: as the server says.
            Overloaded: it said so, to every try.
            Unavailable: no answer began.
            Failed: an answer broke off.
        """
        if not self.breaker.allows:
            raise Unavailable(f"{self.name}: is left alone after {self._config.breaker_threshold} failures in a row")
        self.breaker.begin()
        settled = False
        answer: AsyncGenerator[Chunk, None] | None = None
        try:
            answer, first = await self._begin(call)
            self.breaker.succeeded()
            settled = True
            chunk: Chunk | None = first
            while chunk is not None:
                yield chunk
                chunk = await _next(answer, self._config.read_s)
        except RequestError as error:
            settled = True
            if isinstance(error, Unavailable | Failed):
                self.breaker.failed()
            else:
                self.breaker.succeeded()  # it refuses with reason: it works
            raise
        finally:
            if not settled:
                self.breaker.abandoned()
            if answer is not None:
                await answer.aclose()

    async def _begin(self, call: Call) -> tuple[AsyncGenerator[Chunk, None], Chunk]:
        """An answer that has begun, and how it begins: tried as often as the config allows."""
        for attempt in range(self._config.retries + 1):
            answer = self._chunks(call)
            try:
                first = await _next(answer, self._config.first_s)
                assert first is not None, "an answer ends with a chunk that says so"
                return answer, first
            except (Unavailable, Overloaded, Failed) as error:
                if attempt == self._config.retries:
                    if isinstance(error, Failed):  # of an answer that never began
                        raise Unavailable(str(error)) from error
                    raise
            await asyncio.sleep(_PAUSE * 2**attempt * random.uniform(0.75, 1.25))
        raise AssertionError("unreachable")

    async def _open(self, call: Call) -> Any:
        """The server's stream of events."""
        asked: dict[str, Any] = {
            "model": self._config.model or call.model,
            "temperature": call.temperature,
            "top_p": call.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        # Only where asked for: a server refuses fields it does not know; the second are vLLM's.
        asked |= _given(max_tokens=call.max_tokens, seed=call.seed, stop=list(call.stop) or None)
        asked["extra_body"] = _given(top_k=call.top_k, ignore_eos=call.ignore_eos or None) or None
        if call.messages is not None:
            asked["messages"] = list(call.messages)
            if call.logprobs is not None:
                asked |= {"logprobs": True, "top_logprobs": call.logprobs}
            return await self._client.chat.completions.create(**asked)
        asked["prompt"] = list(call.prompt) if isinstance(call.prompt, tuple) else call.prompt
        asked |= _given(logprobs=call.logprobs)
        return await self._client.completions.create(**asked)

    async def _chunks(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """One try: chunks, the last of them with finish and usage; what breaks is one of ours."""
        events: Any = None
        try:
            events = await self._open(call)
            async for chunk in self._read(events, call):
                yield chunk
        except (RequestError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            raise _translated(self.name, error) from error
        finally:
            if events is not None:
                await events.close()

    async def _read(self, events: AsyncIterator[Any], call: Call) -> AsyncIterator[Chunk]:
        arrived, first = time.monotonic(), None
        finish: Literal["stop", "length"] | None = None
        usage: Usage | None = None
        counted = 0
        async for event in events:
            if event.usage is not None:
                usage = Usage(event.usage.prompt_tokens, event.usage.completion_tokens)
            if not event.choices:
                continue
            choice = event.choices[0]
            text = (choice.text if call.messages is None else choice.delta.content) or ""
            logprobs = _logprobs(choice.logprobs) if call.logprobs is not None else None
            if choice.finish_reason is not None:
                finish = "length" if choice.finish_reason == "length" else "stop"
            if not text and not logprobs:
                continue
            first = first or time.monotonic()
            # without log-probabilities servers do not say; the last chunk sets the sum right
            tokens = 1 if call.logprobs is None else len(logprobs or ())
            counted += tokens
            yield Chunk(text, tokens, logprobs)
        if finish is None:
            raise Failed(f"{self.name}: its answer broke off")
        now = time.monotonic()
        times = {"ttft_ms": 1e3 * ((first or now) - arrived), "total_ms": 1e3 * (now - arrived)}
        rest = 0 if usage is None else max(usage.completion_tokens - counted, 0)
        yield Chunk("", rest, None, finish, usage or Usage(0, counted), times if call.stats else None)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


async def _next(chunks: AsyncGenerator[Chunk, None], seconds: float) -> Chunk | None:
    """The next chunk, ``None`` after the last.

    Raises:
        Failed: none came in time.
    """
    try:
        async with asyncio.timeout(seconds):
            return await anext(chunks, None)
    except TimeoutError as error:
        raise Failed(f"no token for {seconds:g} s") from error


def _translated(name: str, error: Exception) -> RequestError:
    """A client's error as one of ours. Only what a caller did wrong is quoted: the rest may speak of our key."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    if isinstance(error, APIStatusError):
        return _refused(name, error)
    if isinstance(error, APITimeoutError):
        return Unavailable(f"{name}: does not answer in time")
    if isinstance(error, APIConnectionError):
        return Unavailable(f"{name}: cannot be reached")
    return Failed(f"{name}: its answer broke off ({type(error).__name__})")


def _refused(name: str, error: "APIStatusError") -> RequestError:
    if error.status_code == 429:
        return Overloaded(f"{name}: has as much to do as it takes")
    if error.status_code in _CALLERS_FAULT:
        body = error.body if isinstance(error.body, dict) else {}
        said, code = str(body.get("message") or error.message), body.get("code")
        too_long = code == TooLong.code or "context length" in said or "maximum context" in said
        return (TooLong if too_long else Invalid)(said, body.get("param"))
    return Unavailable(f"{name}: answers with status {error.status_code}")


def _speaks(error: Exception) -> bool:
    """Whether an error says something about the server's health: being busy does not."""
    from openai import RateLimitError

    return not isinstance(error, RateLimitError)


def _logprobs(found: Any) -> list[TokenLogprob] | None:
    """Of either of the API's two forms."""
    if found is None:
        return None
    if getattr(found, "content", None) is not None:  # chat
        return [_of_chat(item)._replace(top=tuple(map(_of_chat, item.top_logprobs))) for item in found.content]
    tops = found.top_logprobs or [{}] * len(found.tokens or ())
    offsets = found.text_offset or [None] * len(found.tokens or ())
    return [
        TokenLogprob(token, logprob, None, offset, tuple(TokenLogprob(*each) for each in _best_first(top or {})))
        for token, logprob, offset, top in zip(
            found.tokens or (), found.token_logprobs or (), offsets, tops, strict=True
        )
    ]


def _best_first(top: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(top.items(), key=lambda pair: -pair[1])


def _of_chat(item: Any) -> TokenLogprob:
    return TokenLogprob(item.token, item.logprob, None if item.bytes is None else bytes(item.bytes))
