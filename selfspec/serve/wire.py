"""Requests as OpenAI's clients send them. What we do not do is refused, unless it asks for nothing."""

import hashlib
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from selfspec.serve.backend import Call
from selfspec.serve.errors import Invalid


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character.

    Raises:
        ValueError: the text has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("has an unpaired surrogate") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]
Token = Annotated[int, Field(ge=0)]
Empty = Annotated[list[Any], Field(max_length=0)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream is to carry besides."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ExtraOptions(_Body):
    """Of ours: what OpenAI's API has no field for."""

    stats: bool = False
    detail: bool = False
    """With ``stats``: the answer's token ids and every cycle, too."""


class Common(_Body):
    """What both kinds of request have. The fields after ``selfspec`` may be sent, and mean nothing here."""

    model: Text
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1: all")
    n: Literal[1] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    selfspec: ExtraOptions = ExtraOptions()

    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=0)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "Common":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    def _call(self, prefix: str, key: str | None, cache: bool, **own: Any) -> Call:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Call(
            id=f"{prefix}-{secrets.token_hex(12)}",
            model=self.model,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k if self.top_k and self.top_k > 0 else None,
            seed=self.seed,
            stop=stop,
            key=key,
            stats=self.selfspec.stats,
            detail=self.selfspec.detail,
            cache=cache,
            ignore_eos=self.ignore_eos,
            **own,
        )


class CompletionRequest(Common):
    """``POST /v1/completions``."""

    prompt: Text | list[Token] | Annotated[list[Text] | list[list[Token]], Field(min_length=1, max_length=1)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def call(self, key: str | None, cache: bool) -> Call:
        """What a back end is asked for; without ``max_tokens``, 16, as OpenAI has it."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]
        asked = tuple(prompt) if isinstance(prompt, list) else prompt
        return self._call("cmpl", key, cache, prompt=asked, max_tokens=self.max_tokens or 16, logprobs=self.logprobs)


class Part(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: Text | None = None

    # An answer of ours or of OpenAI's, sent back as it came.
    refusal: Literal[""] | None = None
    tool_calls: Empty | None = None
    annotations: Empty | None = None
    function_call: None = None
    audio: None = None

    def plain(self) -> Mapping[str, str]:
        """As chat templates know it: a developer's message is the system's, pieces are one text."""
        role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": content}


class ChatRequest(Common):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    reasoning_effort: Literal["none"] | None = None

    @model_validator(mode="after")
    def _alternatives_of_something(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        return self

    def call(self, key: str | None, cache: bool) -> Call:
        """What a back end is asked for; without ``max_tokens``, as much as it allows."""
        messages = tuple(message.plain() for message in self.messages)
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        most = self.max_completion_tokens or self.max_tokens
        return self._call("chatcmpl", key, cache, messages=messages, max_tokens=most, logprobs=logprobs)


def invalid(errors: list[Any]) -> Invalid:
    """The first of pydantic's findings, as one line that names the field."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return Invalid("the body is no valid JSON")
    if first["type"] == "extra_forbidden":
        message = "no such field"
    if not place:
        ours = first["type"] == "value_error"
        return Invalid(message if ours else "the body must be a JSON object, sent as application/json")
    named = [part for part in place if part.isidentifier() or part.isdigit()]  # the rest are pydantic's words
    return Invalid(f"{'.'.join(named) or place[0]}: {message}", place[0])


def hashed(key: str) -> str:
    """Of an API key: what may be kept."""
    return hashlib.sha256(key.encode()).hexdigest()
