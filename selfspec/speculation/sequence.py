"""A request from its arrival to its last token: what is queued, batched, drafted for and decoded is one object."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from selfspec.types import Completion, Cycle, Logprob, Request

Status = Enum("Status", "waiting prefilling running finished")


@dataclass(slots=True, eq=False)
class Seq:
    """See the module's docstring. While it runs it has a row of the batch: row r of the batch has row r of the cache.

    Attributes:
        number: the session's for its request.
        arrival, admitted, first_token: when it came, when its prompt was begun and when its first token was out, in
            seconds of the session's clock; ``None`` before that.
        tokens: prompt and generated tokens; while it runs, all but the last have been through the model.
        prefilled: tokens of the prompt that have been read.
        reported: new tokens that have been reported.
        logprobs: of the new tokens, where the request asks for them.
        exit_layer: where an early-exit draft leaves, if its controller chose for this request.
        state: the target's normed final state, a tensor ``[1, D]``, that gave the last token.
        memory: whatever the draft keeps for it.
    """

    request: Request
    number: int = 0
    arrival: float = 0.0
    status: Status = Status.waiting
    admitted: float | None = None
    first_token: float | None = None
    tokens: list[int] = field(init=False)
    prefilled: int = 0
    reported: int = 0
    cycles: list[Cycle] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    exit_layer: int | None = None
    state: Any = None
    memory: Any = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.tokens)

    def output_tokens(self, start: int = 0) -> list[int]:
        """What has been generated, from new token number ``start`` on."""
        return self.tokens[len(self.request.tokens) + start :]

    @property
    def remaining(self) -> int:
        """Tokens still to come."""
        return self.request.max_new_tokens - (len(self.tokens) - len(self.request.tokens))

    def finish(self, why: Literal["stop", "length"], now: float) -> Completion:
        """What it has come to."""
        self.status = Status.finished
        return Completion(
            tokens=tuple(self.output_tokens()),
            cycles=tuple(self.cycles),
            ttft_s=(now if self.first_token is None else self.first_token) - self.arrival,
            total_s=now - self.arrival,
            finish=why,
            queue_s=(now if self.admitted is None else self.admitted) - self.arrival,
        )
