"""A call as our engine takes it, and the engine's progress as chunks of text."""

import secrets
from typing import Any

from selfspec.config import Serve
from selfspec.engine.base import Opens, RequestOutput, Tokenizer
from selfspec.metrics import pack
from selfspec.serve.backend import Call, Chunk, TokenLogprob, Usage
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
    if call.messages is not None:
        try:
            return "messages", tuple(engine.tokenizer.encode_chat(call.messages))
        except ValueError as error:
            raise Invalid(f"messages: {error}", "messages") from error
    if isinstance(call.prompt, str):
        return "prompt", tuple(engine.tokenizer.encode(call.prompt, chat=False))
    tokens, vocab = call.prompt or (), engine.limits().vocab
    if any(not 0 <= token < vocab for token in tokens):
        raise Invalid(f"prompt: token ids are from 0 to {vocab - 1}", "prompt")
    return "prompt", tokens


def _sampling(call: Call) -> Sampling:
    if call.temperature < COLDEST:
        return Sampling()
    seed = secrets.randbits(32) if call.seed is None else call.seed
    return Sampling(call.temperature, call.top_k, max(call.top_p, LEAST) if call.top_p < 1 else None, seed)


class Answer:
    """Makes chunks of a request's progress."""

    def __init__(self, tokenizer: Tokenizer, call: Call, asked: Request) -> None:
        self._decode, self._call, self._asked = tokenizer.decode, call, asked
        self._detokenizer, self._stops = Detokenizer(tokenizer.decode), Stops(call.stop)
        self._count = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop text came: the rest of the progress is not asked for."""
        return self._stops.hit

    def take(self, progress: RequestOutput) -> Chunk:
        """What is new of the text; token by token, so that nothing counts after a stop text."""
        text, count = "", 0
        for token in progress.tokens:
            text, count = text + self._stops.push(self._detokenizer.push(token)), count + 1
            if self.stopped:
                break
        self._count += count
        if self._call.logprobs is None:
            return Chunk(text, count)
        ended = progress.completion is not None and progress.completion.finish == "stop" and not self.stopped
        shown = count - 1 if ended else count  # the end-of-sequence token is no part of the text
        logprobs = [self._logprob(*pair) for pair in zip(progress.tokens[:shown], progress.logprobs, strict=False)]
        return Chunk(text, count, logprobs)

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
        top = tuple((self._decode([other]), value) for other, value in logprob.top)
        return TokenLogprob(self._decode([token]), logprob.logprob, top)


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
