"""A deterministic engine without a model: set acceptance, virtual time. For tests of all around an engine.

The "model" continues a context by a hash of its last tokens; a draft token is right with the chance that the world
(``session.py``) says, by another hash. Gates and controllers are the real ones, and requests are batched as
they really are, so that both can be studied over a hundred thousand cycles in seconds.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfspec.config import Order
from selfspec.engine import admission
from selfspec.engine.admission import Admission
from selfspec.engine.base import Limits, Tie
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
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.gate.entropy import Entropy
from selfspec.speculation.gate.varH import VarEntropy
from selfspec.types import Completion, Request, Score, Signals


class FakeEngine:
    """See the module's docstring."""

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

    @property
    def vocab(self) -> int:
        """Bytes."""
        return VOCAB

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
            control = Controller(k)
            stops = self._fixed_gates.setdefault(k, self.plan.gate.make(self.plan.seed))
        if plain or not self.plan.speculative:
            control, stops = Controller(0), Gate()
        rows = max_batch or self.plan.engine.max_batch
        positions = max((len(r.tokens) + r.max_new_tokens for r in requests), default=0)
        session = FakeSession(self._parts(control, stops), rows, positions, Admission())
        return session.run(requests)

    def open(self, rows: int, positions: int, order: Order) -> FakeSession:
        """As :meth:`Engine.open <selfspec.engine.base.Engine.open>`; there is no limit to positions."""
        control, stops = self.controller, self.gate
        if not self.plan.speculative:
            control, stops = Controller(0), Gate()
        return FakeSession(self._parts(control, stops), rows, positions, admission.make(order, self.plan.serve.chunk))

    def _parts(self, control: Controller, stops: Gate) -> Parts:
        return Parts(self.world, self.clock, control, stops)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Every message's role and content."""
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages), chat=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """As UTF-8 bytes."""
        return bytes(tokens).decode(errors="replace")

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
        """Any length; the byte 0 comes first."""
        return Limits(1 << 30, 0, False)

    def peak_memory_mb(self) -> float:
        """None to speak of."""
        return 0.0

    def device_utilisation(self) -> float | None:
        """No device."""
        return None
