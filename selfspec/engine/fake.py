"""A deterministic engine without a model: set acceptance, virtual time. For tests of all around an engine.

The "model" continues a context by a hash of its last tokens; a draft token is right with the chance that the
:class:`World` says, by another hash. Gates and controllers are the real ones, and requests are batched as they
really are, so that both can be studied over a hundred thousand cycles in seconds.
"""

import math
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from selfspec.config import GateName
from selfspec.engine import controller, gate
from selfspec.engine.base import Tie
from selfspec.engine.controller import Controller
from selfspec.engine.gate import Gate
from selfspec.plan import Plan
from selfspec.types import Completion, Cycle, Request

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
class Row:
    """A request being decoded: its whole answer is known, and how much of it is out."""

    number: int
    request: Request
    answer: list[int]
    exit_layer: int | None
    first_token: float
    done: int = 1
    cycles: list[Cycle] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Tokens still to come."""
        return len(self.answer) - self.done


class FakeEngine:
    """See the module's docstring."""

    def __init__(self, plan: Plan, world: World | None = None) -> None:
        self.plan = plan
        acceptance = plan.engine.acceptance if plan.engine.acceptance is not None else 0.5
        self.world = world or World(acceptance)
        self.gate = gate.make(plan.gate, plan.seed)
        self.controller = controller.make(plan.controller, plan.seed)
        self._fixed_gates: dict[int, Gate] = {}
        self._signal = _SIGNALS[plan.gate.name]
        self._before = self._now = 0.0  # milliseconds of earlier calls, and into this one

    def describe(self) -> Mapping[str, object]:
        """Nothing that varies."""
        return {"engine": "fake", "device": "none", "dtype": "none", "threads": 1}

    def encode(self, text: str, chat: bool) -> list[int]:
        """UTF-8 bytes."""
        return list(text.encode())

    def generate(
        self,
        requests: Sequence[Request],
        *,
        plain: bool = False,
        k: int | None = None,
        max_batch: int | None = None,
    ) -> list[Completion]:
        """As :meth:`Engine.generate <selfspec.engine.base.Engine.generate>`; always as many tokens as asked for."""
        control, stops = self.controller, self.gate
        if k is not None:
            control = controller.Fixed(k)
            stops = self._fixed_gates.setdefault(k, gate.make(self.plan.gate, self.plan.seed))
        if plain or not self.plan.speculative:
            control, stops = controller.Fixed(0), gate.Gate()
        waiting, rows = deque(enumerate(requests)), list[Row]()
        done: dict[int, Completion] = {}
        self._before, self._now = self._before + self._now, 0.0
        while waiting or rows:
            while waiting and len(rows) < (max_batch or self.plan.engine.max_batch):
                number, request = waiting.popleft()
                exit_layer = control.exit_layer(len(request.tokens))
                self._pass(self.world.pass_ms(1))
                rows.append(Row(number, request, _answer(request), exit_layer, self._now))
            going = [row for row in rows if row.remaining]
            if going:
                self._step(going, control, stops)
            for row in rows:
                if not row.remaining:
                    tokens, cycles = tuple(row.answer), tuple(row.cycles)
                    done[row.number] = Completion(tokens, cycles, row.first_token / 1e3, self._now / 1e3, "length")
            rows = [row for row in rows if row.remaining]
        return [done[number] for number in range(len(requests))]

    def _step(self, rows: Sequence[Row], control: Controller, stops: Gate) -> None:
        stops.begin()
        ks = [min(control.ask(row.cycles, len(rows)), row.remaining - 1) for row in rows]
        drafts = [self._draft(row, k, stops) for row, k in zip(rows, ks, strict=True)]
        steps = max(max(len(signals), proposed) for proposed, _, signals in drafts)
        draft_ms = self._pass(steps * self.world.draft_ms(len(rows), rows[0].exit_layer))
        verify_ms = self._pass(self.world.pass_ms(sum(proposed + 1 for proposed, _, _ in drafts)))
        cycles = [
            Cycle(k, proposed, proposed, accepted, accepted + 1, signals, draft_ms, verify_ms, len(rows))
            for k, (proposed, accepted, signals) in zip(ks, drafts, strict=True)
        ]
        for row, cycle in zip(rows, cycles, strict=True):
            row.cycles.append(cycle)
            row.done += cycle.new_tokens
        stops.observe(cycles)
        control.observe(cycles)

    def _draft(self, row: Row, k: int, stops: Gate) -> tuple[int, int, tuple[float, ...]]:
        """Tokens proposed, tokens that stand, and the gate's signals.

        The draft is as sure of a token as the token is likely to be right: its probability is U^(1/a - 1),
        the mean of which is the acceptance a.
        """
        accepted, right, signals = 0, True, list[float]()
        for j in range(k):
            acceptance = self.world.acceptance(row.request, row.done + j, row.exit_layer)
            luck, sure = _chances(row.request, row.answer, row.done + j)
            sure = sure ** (1 / acceptance - 1) if acceptance else 0.0
            if stops.reads:
                signals.append(self._signal(sure))
                if stops.stops(signals[-1]):
                    return j, accepted, tuple(signals)
            right = right and luck < sure
            accepted += right
        return k, accepted, tuple(signals)

    def _pass(self, ms: float) -> float:
        """Lets time go by: how much, at the machine's pace."""
        ms *= self.world.pace(self._before + self._now)
        self._now += ms
        return ms

    def state(self) -> Mapping[str, Any]:
        """What gate and controller have learned so far."""
        return {"gate": self.gate.state(), "controller": self.controller.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what an earlier process had learned."""
        self.gate.restore(state["gate"])
        self.controller.restore(state["controller"])

    def fit(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], path: Path, facts: Mapping[str, Any]) -> None:
        """Not offered: ``conf/engine/fake.yaml`` leaves fitted drafts out, and the plan refuses them."""
        raise NotImplementedError

    def use_head(self, path: Path) -> None:
        """Not offered, see :meth:`fit`."""
        raise NotImplementedError

    def compare(self, context: Sequence[int], a: int, b: int) -> Tie:
        """No rounding here: different tokens are different."""
        return Tie(1.0, 0.0)

    def peak_memory_mb(self) -> float:
        """None to speak of."""
        return 0.0

    def device_utilisation(self) -> float | None:
        """No device."""
        return None


def _answer(request: Request) -> list[int]:
    """All tokens of the answer."""
    tokens = list(request.tokens)
    for _ in range(request.max_new_tokens):
        tokens.append(zlib.crc32(bytes(t % VOCAB for t in tokens[-8:])) % VOCAB)
    return tokens[len(request.tokens) :]


def _chances(request: Request, answer: Sequence[int], position: int) -> tuple[float, float]:
    """Two uniform numbers in [0, 1) for a token: the same ones, however decoding came to it."""
    before = (*request.tokens[-8:], *answer[max(position - 8, 0) : position])[-8:]
    digest = blake2b(bytes(t % VOCAB for t in before), digest_size=16, salt=position.to_bytes(8, "big")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:], "big") / 2**64


def _entropy(p: float) -> float:
    """In nats, where one token has probability p and the others share the rest."""
    best, other = _surprisals(p)
    return p * best + (1 - p) * other


def _var_entropy(p: float) -> float:
    """The variance of surprisal there, in nats squared: small where p is, too, as then nearly all tokens are alike."""
    best, other = _surprisals(p)
    return p * (1 - p) * (best - other) ** 2


def _surprisals(p: float) -> tuple[float, float]:
    p = min(max(p, 1e-9), 1 - 1e-9)
    return -math.log(p), -math.log((1 - p) / (VOCAB - 1))


_SIGNALS: Mapping[GateName, Callable[[float], float]] = {
    GateName.none: float,
    GateName.maxp: float,
    GateName.bandit: float,
    GateName.entropy: _entropy,
    GateName.varH: _var_entropy,
}
