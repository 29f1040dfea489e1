"""A deterministic engine without a model: set acceptance, virtual time. For tests of all around an engine.

The "model" continues a context by a hash of its last tokens; a draft token is right with the chance that the world
(``session.py``) says, by another hash. Gates and controllers are the real ones, and requests are batched as
they really are, so that both can be studied over a hundred thousand cycles in seconds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from selfspec.engine import admission
from selfspec.engine.admission import Admission
from selfspec.engine.base import Limits, Opens, Prefix, Probes, Scores, Tie, TieJudge, Tokenizer
from selfspec.engine.fake.session import (
    VOCAB,
    Clock,
    FakeSession,
    Parts,
    World,
    chances,
    next_token,
)
from selfspec.plan import Plan
from selfspec.serve.config import Order
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.gate.entropy import Entropy
from selfspec.speculation.gate.varH import VarEntropy
from selfspec.types import Completion, Request, Score, Signals


class Bytes(Tokenizer):
    """A token is a byte of UTF-8; a text's first is 0, where there must be one."""

    def encode(self, text: str, chat: bool) -> list[int]:
        """UTF-8 bytes."""
        return list(text.encode())

    def encode_part(self, text: str) -> list[int]:
        """UTF-8 bytes."""
        return list(text.encode())

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Every message's role and content."""
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages), chat=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """As UTF-8 bytes."""
        return bytes(tokens).decode(errors="replace")

    def piece(self, token: int) -> bytes:
        """The byte."""
        return bytes([token])

    def prefix(self) -> Prefix:
        """The byte 0."""
        return Prefix(0, False)


class NoTies(TieJudge):
    """No rounding here: different tokens are different."""

    def compare(self, context: Sequence[int], a: int, b: int) -> Tie:
        """No tie."""
        return Tie(1.0, 0.0)


class FakeEngine(Opens, Scores, Probes):
    """See the module's docstring."""

    tokenizer, ties = Bytes(), NoTies()

    def __init__(self, plan: Plan, world: World | None = None) -> None:
        self.plan = plan
        self.world = world or World(plan.engine.get("acceptance"))
        self.gate: Gate = plan.gate.make(plan.seed)
        self.controller: Controller = plan.controller.make(plan.seed)
        self._fixed_gates: dict[int, Gate] = {}
        self.clock = Clock()

    def describe(self) -> Mapping[str, object]:
        """Nothing that varies."""
        return {"engine": "fake", "device": "none", "dtype": "none", "threads": 1}

    def generate(
        self, requests: Sequence[Request], *, plain: bool = False, k: int | None = None, max_batch: int | None = None
    ) -> list[Completion]:
        """As :meth:`Engine.generate <selfspec.engine.base.Engine.generate>`; always as many tokens as asked for."""
        positions = max((len(r.tokens) + r.max_new_tokens for r in requests), default=0)
        return self._session(max_batch or self.plan.engine.max_batch, positions, Admission(), plain, k).run(requests)

    def open(self, rows: int, positions: int, order: Order) -> FakeSession:
        """As :meth:`Opens.open <selfspec.engine.base.Opens.open>`; there is no limit to positions."""
        return self._session(rows, positions, admission.make(order, self.plan.serve.chunk))

    def _session(
        self, rows: int, positions: int, order: Admission, plain: bool = False, k: int | None = None
    ) -> FakeSession:
        control, stops = self.controller, self.gate
        if k is not None:
            control = Controller(k)
            stops = self._fixed_gates.setdefault(k, self.plan.gate.make(self.plan.seed))
        if plain or not self.plan.speculative:
            control, stops = Controller(0), Gate()
        return FakeSession(Parts(self.world, self.clock, control, stops), rows, positions, order)

    def state(self) -> Mapping[str, Any]:
        """What gate and controller have learned so far."""
        return {"gate": self.gate.state(), "controller": self.controller.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what an earlier process had learned."""
        self.gate.restore(state["gate"])
        self.controller.restore(state["controller"])

    def score(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]], *, plain: bool = False
    ) -> list[Score]:
        """The token that follows by hash has probability 1/2, all others share the rest; unverified, it has 2/5."""
        sure = 0.5 if plain or self.plan.policy.verify else 0.4
        scores = []
        for tokens in continuations:
            before = [list((*context, *tokens)[: len(context) + i]) for i in range(len(tokens))]
            hits = [next_token(known) == token for known, token in zip(before, tokens, strict=True)]
            p = [sure if hit else (1 - sure) / (VOCAB - 1) for hit in hits]
            scores.append(Score(tuple(math.log(each) for each in p), all(hits)))
        return scores

    def probe(self, prompt: Sequence[int], answer: Sequence[int], exits: Sequence[int] | None = None) -> list[Signals]:
        """As sure, and as often right, as drafts of this engine are."""
        request, found = Request(tuple(prompt), len(answer)), list[Signals]()
        for layer in exits or [self.plan.draft.get("exit_layer", 1)]:
            luck_of = [chances(request, answer, position) for position in range(1, len(answer))]
            odds = [self.world.acceptance(request, position, layer) for position in range(1, len(answer))]
            sure = [s ** (1 / a - 1) if a else 0.0 for (_, s), a in zip(luck_of, odds, strict=True)]
            entropies, variances = (tuple(g.signal_at(s, VOCAB - 1) for s in sure) for g in (Entropy(0), VarEntropy(0)))
            accepted = tuple(luck < s for (luck, _), s in zip(luck_of, sure, strict=True))
            found.append(Signals(layer, "raw", tuple(sure), entropies, variances, accepted))
        return found

    def limits(self) -> Limits:
        """Any length; bytes."""
        return Limits(1 << 30, VOCAB)
