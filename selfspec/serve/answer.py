"""A call as our engine takes it, and the engine's progress as chunks of text."""

import secrets
from itertools import zip_longest
from typing import Any

from selfspec.engine.base import Opens, RequestOutput, Tokenizer
from selfspec.metrics import pack
from selfspec.serve.backend import Call, Chunk, TokenLogprob, Usage
from selfspec.serve.config import Serve
from selfspec.serve.errors import Invalid, TooLong
from selfspec.serve.text import Detokenizer, Stops
from selfspec.types import Completion, Logprob, Request, Sampling

COLDEST = 0.01
"""A lower temperature would overflow half width, and is as good as none."""
LEAST = 1e-6
"""The smallest ``top_p``: the likeliest token alone."""


def request(engine: Opens, call: Call, settings: Serve) -> Request:
    """What the engine is to decode.

    Raises:
        Invalid: the prompt.
        TooLong: the prompt, or with it the answer.
    """
    param, tokens = _tokens(engine, call)
    if not tokens:
        raise Invalid("the prompt is empty", param)
    if len(tokens) > settings.max_prompt_tokens:
        raise TooLong(f"the prompt has {len(tokens)} tokens; at most {settings.max_prompt_tokens} are allowed", param)
    room = settings.max_model_len - len(tokens)
    asked = max(min(settings.max_tokens, room), 1) if call.max_tokens is None else call.max_tokens
    if asked > room:
        raise TooLong(
            f"{len(tokens)} tokens of prompt and {asked} of answer; {settings.max_model_len} are allowed", "max_tokens"
        )
    return Request(tokens, asked, call.ignore_eos, _sampling(call), call.logprobs)


def _tokens(engine: Opens, call: Call) -> tuple[str, tuple[int, ...]]:
    """The field they come from, and the prompt's tokens."""
    param, tokens = "prompt", call.prompt or ()
    if call.messages is not None:
        try:
            param, tokens = "messages", tuple(engine.tokenizer.encode_chat(call.messages))
        except ValueError as error:
            raise Invalid(f"messages: {error}", "messages") from error
    elif isinstance(call.prompt, str):
        tokens = tuple(engine.tokenizer.encode(call.prompt, chat=False))
    vocab = engine.limits().vocab
    assert not isinstance(tokens, str)
    if any(not 0 <= token < vocab for token in tokens):  # a text's too: a tokenizer may have more than the model
        raise Invalid(f"{param}: token ids are from 0 to {vocab - 1}", param)
    return param, tokens


def _sampling(call: Call) -> Sampling:
    if call.temperature < COLDEST:
        return Sampling()
    seed = secrets.randbits(32) if call.seed is None else call.seed
    return Sampling(call.temperature, call.top_k, max(call.top_p, LEAST) if call.top_p < 1 else None, seed)


class Answer:
    """Makes chunks of a request's progress."""

    def __init__(self, tokenizer: Tokenizer, call: Call, asked: Request) -> None:
        self._tokenizer, self._call, self._asked = tokenizer, call, asked
        # A text goes on where its prompt ends, with a space if need be; a chat's answer is a text of its own.
        before = asked.tokens if call.messages is None else ()
        self._detokenizer, self._stops = Detokenizer(tokenizer.decode, before), Stops(call.stop)
        self._count = self._offset = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop text came: the rest of the progress is not asked for."""
        return self._stops.hit

    def take(self, progress: RequestOutput) -> Chunk:
        """What is new of the text; token by token, so that nothing counts after a stop text."""
        text, count, logprobs = "", 0, list[TokenLogprob]()
        for token, logprob in zip_longest(progress.tokens, progress.logprobs):
            if logprob is not None:
                logprobs.append(self._logprob(token, logprob))
            new = self._detokenizer.push(token)
            self._offset += len(new)
            text, count = text + self._stops.push(new), count + 1
            if self.stopped:
                break
        self._count += count
        ended = progress.completion is not None and progress.completion.finish == "stop" and not self.stopped
        if ended:
            del logprobs[-1:]  # the end-of-sequence token is no part of the text
        return Chunk(text, count, None if self._call.logprobs is None else logprobs)

    def last(self, completion: Completion) -> Chunk:
        """What was held back, how it ended, and what it took."""
        text = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        return Chunk(
            text=text,
            finish="stop" if self.stopped else completion.finish,
            usage=Usage(len(self._asked.tokens), self._count),
            stats=self._statistics(completion) if self._call.stats else None,
        )

    def _statistics(self, completion: Completion) -> dict[str, Any]:
        found = statistics(completion)
        if self._call.detail:
            found |= {"token_ids": completion.tokens[: self._count], "cycle_records": pack(completion)["cycles"]}
        return found

    def _logprob(self, token: int, logprob: Logprob) -> TokenLogprob:
        top = dict[str, TokenLogprob]()
        for other, value in logprob.top:
            text, data = self._text(other)
            name = f"token_id:{other}" if text in top else text
            top[name] = TokenLogprob(name, value, data)
        text, data = self._text(token)
        return TokenLogprob(text, logprob.logprob, data, self._offset, tuple(top.values()))

    def _text(self, token: int) -> tuple[str, bytes]:
        """A token that comes next: its text, and that as bytes."""
        text = self._detokenizer.ahead(token)
        if text is not None:
            return text, text.encode()
        piece = self._tokenizer.piece(token)
        try:
            return piece.decode(), piece
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece), piece


def statistics(completion: Completion) -> dict[str, Any]:
    """What speculation did for a request; times in milliseconds since it arrived at the engine."""
    cycles = completion.cycles
    proposed, accepted = sum(c.proposed for c in cycles), sum(c.accepted for c in cycles)
    return {
        "cycles": len(cycles),
        "proposed": proposed,
        "accepted": accepted,
        "acceptance": accepted / proposed if proposed else None,
        "acceptance_length": sum(c.new_tokens for c in cycles) / len(cycles) if cycles else None,
        "queue_ms": 1e3 * completion.queue_s,
        "ttft_ms": 1e3 * completion.ttft_s,
        "total_ms": 1e3 * completion.total_s,
    }
