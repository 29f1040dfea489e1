"""The speculative loop: draft, verify, accept (Leviathan et al., 2211.17192; Chen et al., 2302.01318).

Plain greedy decoding is the same loop with a draft that proposes nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from selfspec.engine.cache import KVCache
from selfspec.engine.controller import Controller
from selfspec.engine.draft.base import Draft, Verified
from selfspec.engine.gate import Gate
from selfspec.engine.llama import Llama
from selfspec.engine.policy import Policy
from selfspec.types import Completion, Cycle, Request


@dataclass(frozen=True, slots=True)
class Target:
    """What decides: a model's first ``depth`` layers and the readout of their state.

    The whole model, normally; a truncated one with an exit head is plain layer skipping.
    """

    model: Llama
    depth: int
    readout: Callable[[Tensor], Tensor]

    def run(self, hidden: Tensor, cache: KVCache, first: int) -> Tensor:
        """Layers ``first`` to ``depth`` on new tokens ``[T, D]``, and their normed final states ``[T, D]``."""
        return self.readout(self.model.run(hidden, cache, cache.length, first, self.depth))


def decode(
    target: Target, draft: Draft, gate: Gate, controller: Controller, policy: Policy, request: Request, cache: KVCache
) -> Completion:
    """Generates until a stop token or the length asked for.

    Args:
        cache: empty, of one row, with room for the prompt and all new tokens.
    """
    arrival = time.perf_counter()
    stop = frozenset() if request.ignore_eos else target.model.shape.eos

    states = target.run(target.model.embed(request.tokens), cache, 0)[-1:]
    cache.advance(len(request.tokens))
    verified = Verified(int(target.model.logits(states).argmax()), states)
    tokens, cycles = [verified.token], list[Cycle]()
    first = time.perf_counter()

    while len(tokens) < request.max_new_tokens and tokens[-1] not in stop:
        begin = time.perf_counter()
        k = min(controller.ask(cycles), request.max_new_tokens - len(tokens) - 1)
        proposal = draft.propose(verified, k, gate, cache)
        drafted = time.perf_counter()

        states = target.run(proposal.hidden, cache, proposal.depth)
        accepted, token = policy(proposal.tokens, target.model.logits(states))
        cache.advance(accepted + 1)
        verified = Verified(token, states[accepted : accepted + 1])

        new = _until_stop([*proposal.tokens[:accepted], token], stop)
        tokens += new
        cycles.append(
            Cycle(
                k_asked=k,
                proposed=len(proposal.tokens),
                accepted=accepted,
                new_tokens=len(new),
                signals=tuple(proposal.signals),
                draft_ms=1e3 * (drafted - begin),
                verify_ms=1e3 * (time.perf_counter() - drafted),
            )
        )

    return Completion(
        tokens=tuple(tokens),
        cycles=tuple(cycles),
        ttft_s=first - arrival,
        total_s=time.perf_counter() - arrival,
        finish="stop" if tokens[-1] in stop else "length",
    )


def _until_stop(tokens: list[int], stop: frozenset[int]) -> list[int]:
    """The tokens up to the first stop token, that one included."""
    for i, token in enumerate(tokens):
        if token in stop:
            return tokens[: i + 1]
    return tokens
