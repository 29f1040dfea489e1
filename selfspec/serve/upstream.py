"""What another server streams, as its events must be: nothing of it is believed before it has been looked at."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from selfspec.serve.backend import TokenLogprob
from selfspec.serve.wire import Text

Count = Annotated[int, Field(ge=0)]
Byte = Annotated[int, Field(ge=0, le=255)]


class _Said(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class SaidUsage(_Said):
    """Its counts."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0


class _Alternative(_Said):
    token: Text
    logprob: float
    bytes: list[Byte] | None = None

    def plain(self) -> TokenLogprob:
        return TokenLogprob(self.token, self.logprob, None if self.bytes is None else bytes(self.bytes))


class _Token(_Alternative):
    top_logprobs: list[_Alternative] = []


class _Logprobs(_Said):
    """Of either of the API's two forms: a chat's ``content``, or a text's columns."""

    content: list[_Token] | None = None
    tokens: list[Text] | None = None
    token_logprobs: list[float] | None = None
    top_logprobs: list[dict[Text, float] | None] | None = None
    text_offset: list[Count] | None = None

    def plain(self) -> list[TokenLogprob]:
        """Raises: ValueError: columns of different lengths."""
        if self.content is not None:
            return [each.plain()._replace(top=tuple(top.plain() for top in each.top_logprobs)) for each in self.content]
        tokens = self.tokens or []
        tops: Sequence[dict[str, float] | None] = self.top_logprobs or [None] * len(tokens)
        offsets: Sequence[int | None] = self.text_offset or [None] * len(tokens)
        rows = zip(tokens, self.token_logprobs or (), offsets, tops, strict=True)
        return [TokenLogprob(token, logprob, None, offset, _best_first(top)) for token, logprob, offset, top in rows]


class _Delta(_Said):
    content: Text | None = None


class _Choice(_Said):
    text: Text | None = None
    delta: _Delta | None = None
    logprobs: _Logprobs | None = None
    finish_reason: Text | None = None


class Event(_Said):
    """A piece of a completion, or of a chat's."""

    choices: list[_Choice] = []
    usage: SaidUsage | None = None

    @property
    def text(self) -> str:
        """What it says."""
        choice = self.choices[0]
        return choice.text or (choice.delta and choice.delta.content) or ""

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Of its tokens; none where it does not tell them."""
        found = self.choices[0].logprobs
        return [] if found is None else found.plain()

    @property
    def finish(self) -> str | None:
        """Why it is the last, if it is."""
        return self.choices[0].finish_reason


def _best_first(top: dict[str, float] | None) -> tuple[TokenLogprob, ...]:
    pairs: list[Any] = sorted((top or {}).items(), key=lambda pair: -pair[1])
    return tuple(TokenLogprob(*pair) for pair in pairs)
