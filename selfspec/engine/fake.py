"""A deterministic engine without a model: set acceptance, virtual time. For tests of all around an engine.

The "model" continues a context by a hash of its last tokens; a draft token is right with the acceptance
asked for, by another hash; a pass takes ten virtual milliseconds and a draft step three.
"""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfspec.engine.base import Tie
from selfspec.plan import Plan
from selfspec.types import Completion, Cycle, Request

VOCAB = 256
PASS_S, DRAFT_S = 0.010, 0.003


class FakeEngine:
    """See the module's docstring."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.acceptance = plan.engine.acceptance if plan.engine.acceptance is not None else 0.5

    def describe(self) -> Mapping[str, object]:
        """Nothing that varies."""
        return {"engine": "fake", "device": "none", "dtype": "none", "threads": 1}

    def encode(self, text: str, chat: bool) -> list[int]:
        """UTF-8 bytes."""
        return list(text.encode())

    def generate(self, request: Request, *, plain: bool = False) -> Completion:
        """Always as many tokens as asked for."""
        tokens = [_next(request.tokens)]
        cycles = list[Cycle]()
        now = PASS_S
        while len(tokens) < request.max_new_tokens:
            context = (*request.tokens, *tokens)
            room = request.max_new_tokens - len(tokens) - 1
            k = 0 if plain or not self.plan.speculative else min(self.plan.controller.K, room)
            accepted = 0
            while accepted < k and _chance(context, accepted) < self.acceptance:
                accepted += 1
            for _ in range(accepted + 1):
                tokens.append(_next((*request.tokens, *tokens)))
            cycles.append(Cycle(k, k, accepted, accepted + 1, (), 1e3 * DRAFT_S * k, 1e3 * PASS_S))
            now += DRAFT_S * k + PASS_S
        return Completion(tuple(tokens), tuple(cycles), PASS_S, now, "length")

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[tuple[int, ...]]:
        """As :meth:`generate`."""
        return [self.generate(Request(tuple(p), max_new_tokens), plain=True).tokens for p in prompts]

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


def _next(context: Sequence[int]) -> int:
    return zlib.crc32(bytes(t % VOCAB for t in context[-8:])) % VOCAB


def _chance(context: Sequence[int], position: int) -> float:
    return zlib.crc32(bytes(t % VOCAB for t in context[-8:]), position + 1) / 2**32
