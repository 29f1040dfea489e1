"""How the fake engine decodes: a world with set acceptance, whose time passes as it is told to."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple

from selfspec.engine.admission import Admission
from selfspec.engine.batching import Batching
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.sequence import Seq
from selfspec.types import Cycle, Logprob, Request

VOCAB = 256


class World:
    """What there is to be learned: how often a draft is right, and what time things take. Subclasses differ.

    Args:
        acceptance: the chance that a drafted token is right.
        draft_ms: milliseconds of a draft step.
    """

    def __init__(self, acceptance: float, draft_ms: float = 3.0) -> None:
        self._acceptance, self._draft_ms = acceptance, draft_ms

    def acceptance(self, request: Request, position: int, exit_layer: int | None) -> float:
        """The chance that a draft of a request's new token number ``position`` is right."""
        return self._acceptance

    def draft_ms(self, rows: int, exit_layer: int | None) -> float:
        """Of one draft step for so many rows."""
        return self._draft_ms * growth(rows)

    def pass_ms(self, tokens: int) -> float:
        """Of the target's pass over so many tokens."""
        return 10.0 * growth(tokens)

    def pace(self, now: float) -> float:
        """By how much the machine is slower than usual, ``now`` milliseconds after the engine was made."""
        return 1.0


def growth(tokens: int) -> float:
    """What a pass over so many tokens costs beside a pass over one: as measured, 1.01 at 4, 1.07 at 8, 1.28 at 16."""
    more, few = tokens - 1, min(tokens - 1, 15)
    return 1 + 0.00125 * few * (2 * more - few)  # a parabola that goes on as its tangent


@dataclass(slots=True)
class Clock:
    """Virtual milliseconds since the engine was made."""

    ms: float = 0.0


class Parts(NamedTuple):
    """What a session is made of."""

    world: World
    clock: Clock
    control: Controller
    stops: Gate


class FakeSession(Batching):
    """A session in virtual time, counted from its beginning; the engine's ``clock`` goes on from session to session."""

    def __init__(self, parts: Parts, rows: int, positions: int, admission: Admission) -> None:
        super().__init__(rows, positions, admission)
        self.world, self.clock, self.control, self.stops = parts
        self._ms = 0.0

    def _now(self) -> float:
        return self._ms / 1e3

    def _start(self, seq: Seq) -> None:
        seq.exit_layer = self.control.exit_layer(len(seq.request.tokens))
        seq.memory = whole_answer(seq.request)

    def _prefill_part(self, seq: Seq, count: int) -> None:
        self._pass(self.world.pass_ms(1))

    def _prefill_rest(self, seq: Seq) -> None:
        self._pass(self.world.pass_ms(1))
        seq.first_token = self._now()
        _say(seq, 1)

    def _cycle(self, rows: Sequence[Seq]) -> None:
        control, stops = self.control, self.stops
        stops.begin()
        ks = [min(control.num_draft_tokens(row.cycles, len(rows)), row.remaining - 1) for row in rows]
        drafts = [self._draft(row, k) for row, k in zip(rows, ks, strict=True)]
        steps = max(max(len(signals), proposed) for proposed, _, signals in drafts)
        draft_ms = self._pass(steps * self.world.draft_ms(len(rows), rows[0].exit_layer))
        verify_ms = self._pass(self.world.pass_ms(sum(proposed + 1 for proposed, _, _ in drafts)))
        cycles = [
            Cycle(k, proposed, proposed, accepted, accepted + 1, signals, draft_ms, verify_ms, len(rows))
            for k, (proposed, accepted, signals) in zip(ks, drafts, strict=True)
        ]
        for row, cycle in zip(rows, cycles, strict=True):
            row.cycles.append(cycle)
            _say(row, cycle.new_tokens)
        stops.observe(cycles)
        control.observe(cycles)

    def _draft(self, seq: Seq, k: int) -> tuple[int, int, tuple[float, ...]]:
        """Tokens proposed, tokens that stand, and the gate's signals.

        The draft is as sure of a token as the token is likely to be right: its probability is U^(1/a - 1),
        the mean of which is the acceptance a.
        """
        accepted, right, signals, said = 0, True, list[float](), seq.request.max_new_tokens - seq.remaining
        for j in range(k):
            acceptance = self.world.acceptance(seq.request, said + j, seq.exit_layer)
            luck, sure = chances(seq.request, seq.memory, said + j)
            sure = sure ** (1 / acceptance - 1) if acceptance else 0.0
            if self.stops.reads:
                signals.append(self.stops.signal_at(sure, VOCAB - 1))
                if self.stops.stops(signals[-1]):
                    return j, accepted, tuple(signals)
            right = right and luck < sure
            accepted += right
        return k, accepted, tuple(signals)

    def _pass(self, ms: float) -> float:
        """Lets time go by: how much, at the machine's pace."""
        ms *= self.world.pace(self.clock.ms)
        self.clock.ms += ms
        self._ms += ms
        return ms

    def _evict(self, index: int) -> None:
        """There is nothing to free."""

    def _finish_reason(self, seq: Seq) -> Literal["length"] | None:
        return None if seq.remaining else "length"

    def _kv_used(self) -> float:
        return sum(len(seq.tokens) for seq in self.running) / (self.capacity * self.positions)


def whole_answer(request: Request) -> list[int]:
    """All tokens of the answer."""
    tokens = list(request.tokens)
    for _ in range(request.max_new_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(request.tokens) :]


def next_token(tokens: Sequence[int]) -> int:
    """The "model": what follows."""
    return zlib.crc32(bytes(t % VOCAB for t in tokens[-8:])) % VOCAB


def _say(seq: Seq, count: int) -> None:
    """Gives so many more tokens of an answer, which is known.

    Tokens are as likely as their share of the vocabulary; the likeliest follow each other from the first on.
    """
    first = seq.request.max_new_tokens - seq.remaining
    seq.tokens += seq.memory[first : first + count]
    if seq.request.logprobs is not None:
        even = -math.log(VOCAB)
        seq.logprobs += [Logprob(even, tuple((token, even) for token in range(seq.request.logprobs)))] * count


def chances(request: Request, answer: Sequence[int], position: int) -> tuple[float, float]:
    """Two uniform numbers in [0, 1) for a token: the same ones, however decoding came to it."""
    before = (*request.tokens[-8:], *answer[max(position - 8, 0) : position])[-8:]
    digest = blake2b(bytes(t % VOCAB for t in before), digest_size=16, salt=position.to_bytes(8, "big")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:], "big") / 2**64
