"""Early exit: the model's own first layers draft (LayerSkip, 2404.16710; Draft & Verify, 2309.08168).

Weights, KV and hidden states are shared with verification, which starts where the draft left off: the
exit layers are never run twice for a token.
"""

import torch
from torch import Tensor

from selfspec.config import Draft as DraftConfig
from selfspec.engine.cache import KVCache
from selfspec.engine.draft.base import Proposal, Verified
from selfspec.engine.gate import Gate
from selfspec.engine.head import ExitHead, Head, RawExit
from selfspec.engine.llama import Llama


class EarlyExit:
    """Drafts with layers below ``exit_layer`` and a readout of their hidden state."""

    def __init__(self, model: Llama, exit_layer: int, head: ExitHead) -> None:
        self.model, self.exit_layer, self.head = model, exit_layer, head

    def propose(self, verified: Verified, k: int, gate: Gate, cache: KVCache) -> Proposal:
        """Drafts until ``k`` tokens are proposed or the gate doubts one.

        The last proposed token is run through the exit layers too: verification needs its hidden state
        to give the token after it.
        """
        tokens: list[int] = []
        signals: list[float] = []
        hidden: list[Tensor] = []
        token, state = verified
        while True:
            h = self.model.run(self.model.embed([token]), cache, cache.length + len(tokens), 0, self.exit_layer)
            hidden.append(h)
            if len(tokens) == k:
                break
            state = self.head(h, state)
            logits = self.model.logits(state)[0]
            if gate.signal is not None:
                signals.append(gate.signal(logits))
                if gate.stops(signals[-1]):
                    break
            token = int(logits.argmax())
            tokens.append(token)
        return Proposal(tokens, torch.cat(hidden), self.exit_layer, signals)


def make(draft: DraftConfig, model: Llama, head: Head | None) -> EarlyExit:
    """The raw exit: read out through the model's own norm and head."""
    assert draft.exit_layer is not None, "checked by the plan"
    return EarlyExit(model, draft.exit_layer, RawExit(model))
