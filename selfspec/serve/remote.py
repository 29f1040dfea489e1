"""Any OpenAI-compatible server as a back end: vLLM, a paid API, another gateway of ours.

The official client speaks the protocol; what it leaves to us is here. A call is tried again, with growing pauses, only
while nothing of its answer has come; every wait has a limit; a server that keeps failing is left alone
(``breaker.py``); closing the iterator closes the connection, which is how such a server learns to stop.

What it says is data (``upstream.py``, ``outbound.py``): it is held to what it was asked for, and tells nobody our key.
"""

import asyncio
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any, Literal

from selfspec import outbound
from selfspec.errors import ConfigError
from selfspec.serve.backend import Call, Chunk, Price, TokenLogprob, Usage
from selfspec.serve.breaker import Breaker
from selfspec.serve.config import BackendConfig
from selfspec.serve.errors import Failed, Invalid, Overloaded, RequestError, TooLong, Unavailable
from selfspec.serve.text import Stops
from selfspec.serve.upstream import Event

if TYPE_CHECKING:
    from openai import APIStatusError

_PAUSE = 0.25
"""Seconds before the first retry; each later one waits twice as long, and all a little more or less, by chance."""
_HEALTH_S = 5.0
"""How long a server may take to say that it is well."""
_CALLERS_FAULT = (400, 413, 422)
_EVENT_BYTES, _BYTES = 8_192, 65_536
"""The most that an event of one token takes, with twenty alternatives; and what else an answer may have."""
_CHARACTERS, _TEMPLATE = 256, 4_096
"""Of a token, in the longest answers; what a chat's template may add, in tokens, or an answer have besides."""
_EVENTS = 4
"""For a token; most servers send one."""
_QUOTED = 500
"""Characters of an error that are told on."""


class Remote:
    """See the module's docstring.

    Args:
        most_tokens: of any answer.

    Raises:
        ConfigError: the environment lacks the key that the config names.
    """

    def __init__(self, config: BackendConfig, most_tokens: int) -> None:
        from openai import AsyncOpenAI, Timeout

        assert config.url is not None, "checked by the plan"
        self.name, self.price = config.name, Price(config.input_price, config.output_price)
        self._config, self.breaker = config, Breaker(config.breaker_threshold, config.breaker_reset_s)
        key = "none" if config.key_env is None else os.environ.get(config.key_env, "")
        if not key:
            raise ConfigError(f"serve.backends: {self.name}: key_env={config.key_env}: the environment has none")
        self._key, self._most_tokens = None if config.key_env is None else key, most_tokens
        waits = Timeout(config.first_s, connect=config.connect_s)  # of what comes later, `_next` takes care
        http = outbound.async_client(_BYTES + _EVENT_BYTES * most_tokens)
        self._client = AsyncOpenAI(base_url=config.url, api_key=key, max_retries=0, timeout=waits, http_client=http)

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
        from openai import AsyncStream

        asked: dict[str, Any] = {
            "model": self._config.model or call.model,
            "temperature": call.temperature,
            "top_p": call.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        # Only where asked for: a server refuses fields it does not know; the last two are vLLM's.
        asked |= _given(max_tokens=call.max_tokens, seed=call.seed, stop=list(call.stop) or None)
        asked |= _given(top_k=call.top_k, ignore_eos=call.ignore_eos or None)
        if call.messages is not None:
            asked["messages"] = list(call.messages)
            if call.logprobs is not None:
                asked |= {"logprobs": True, "top_logprobs": call.logprobs}
        else:
            asked["prompt"] = list(call.prompt) if isinstance(call.prompt, tuple) else call.prompt
            asked |= _given(logprobs=call.logprobs)
        path = "/completions" if call.messages is None else "/chat/completions"
        return await self._client.post(
            path, body=asked, cast_to=object, stream=True, stream_cls=AsyncStream[object]
        )  # as it comes: whatever it is

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
            raise self._translated(error) from error
        finally:
            if events is not None:
                await events.close()

    async def _read(self, events: AsyncIterator[Any], call: Call) -> AsyncIterator[Chunk]:
        """Chunks of what may be passed on; no more than was asked for, whatever the server says and counts."""
        arrived, first = time.monotonic(), None
        finish: Literal["stop", "length"] | None = None
        usage: Usage | None = None
        most = min(call.max_tokens or self._most_tokens, self._most_tokens)
        counted = pieces = characters = events_seen = 0
        secret = Stops(() if self._key is None else (self._key,))
        async for data in events:
            event, events_seen = Event.model_validate(data), events_seen + 1
            if events_seen > _EVENTS * most + _TEMPLATE:
                raise Failed(f"{self.name}: its answer is none")
            if event.usage is not None:
                told = event.usage
                usage = Usage(min(told.prompt_tokens, _most_prompt(call)), min(told.completion_tokens, most))
            if not event.choices:
                continue
            text, logprobs = event.text, event.logprobs if call.logprobs is not None else None
            if event.finish is not None:
                finish = "length" if event.finish == "length" else "stop"
            if not text and not logprobs:
                continue
            pieces, characters = pieces + 1, characters + len(text)
            if pieces > most + 1:  # one more may be what was held back for a stop text
                finish = "length"
                break
            first = first or time.monotonic()
            # without log-probabilities servers do not say; the last chunk sets the sum right
            tokens = min(1 if call.logprobs is None else len(logprobs or ()), most - counted)
            counted += tokens
            text = secret.push(text)
            if secret.hit or characters > _CHARACTERS * most + _TEMPLATE or self._tells_key(logprobs):
                raise Failed(f"{self.name}: its answer is none")
            yield Chunk(text, tokens, None if logprobs is None else logprobs[:tokens])
        if finish is None:
            raise Failed(f"{self.name}: its answer broke off")
        text = secret.flush()
        if self._key is not None and 2 * len(text) > len(self._key):
            raise Failed(f"{self.name}: its answer is none")
        now = time.monotonic()
        times = {"ttft_ms": 1e3 * ((first or now) - arrived), "total_ms": 1e3 * (now - arrived)}
        rest = 0 if usage is None else max(usage.completion_tokens - counted, 0)
        yield Chunk(text, rest, None, finish, usage or Usage(0, counted), times if call.stats else None)

    def _tells_key(self, logprobs: list[TokenLogprob] | None) -> bool:
        said = "".join(one.token + "".join(top.token for top in one.top) for one in logprobs or ())
        return self._key is not None and self._key in said

    def _translated(self, error: Exception) -> RequestError:
        """A client's error as one of ours. Only what a caller did wrong is quoted: the rest may speak of our key."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        if isinstance(error, APIStatusError):
            return self._refused(error)
        if isinstance(error, APITimeoutError):
            return Unavailable(f"{self.name}: does not answer in time")
        for each in (error, error.__cause__):
            if isinstance(each, outbound.TooMuch):
                return Failed(f"{self.name}: its answer is none: {each}")
        if isinstance(error, APIConnectionError):
            return Unavailable(f"{self.name}: cannot be reached")
        return Failed(f"{self.name}: its answer broke off ({type(error).__name__})")

    def _refused(self, error: "APIStatusError") -> RequestError:
        if error.status_code == 429:
            return Overloaded(f"{self.name}: has as much to do as it takes")
        if error.status_code in _CALLERS_FAULT:
            body = error.body if isinstance(error.body, dict) else {}
            said, param = str(body.get("message") or error.message), body.get("param")
            too_long = body.get("code") == TooLong.code or "context length" in said or "maximum context" in said
            if outbound.quotes(said, self._key):
                said = f"{self.name}: refuses the request with status {error.status_code}"
            if not isinstance(param, str) or outbound.quotes(param, self._key):
                param = None
            return (TooLong if too_long else Invalid)(said[:_QUOTED], param and param[:_QUOTED])
        return Unavailable(f"{self.name}: answers with status {error.status_code}")


def _most_prompt(call: Call) -> int:
    """Tokens that a prompt can have: a token is a byte at least, but for what a template adds."""
    prompt = call.prompt
    if isinstance(prompt, tuple):
        return len(prompt)
    texts = [prompt or ""] if call.messages is None else [str(message["content"]) for message in call.messages]
    return sum(len(text.encode()) + _TEMPLATE for text in texts)


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


def _speaks(error: Exception) -> bool:
    """Whether an error says something about the server's health: being busy does not."""
    from openai import RateLimitError

    return not isinstance(error, RateLimitError)
