"""The contract of a draft: given the verified state, propose up to K tokens, asking the gate after each.

A new draft is one file here, with a class of this shape behind ``make(plan_draft, model, head)``, and one
YAML file in ``conf/draft/``.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from selfspec.engine.cache import KVCache
from selfspec.engine.gate import Gate


class Verified(NamedTuple):
    """What is certain when drafting begins.

    Attributes:
        token: the last emitted token; it has not been through the model yet.
        state: the target's normed final state ``[1, D]`` that gave it.
    """

    token: int
    state: Tensor


class Proposal(NamedTuple):
    """What a draft hands to verification.

    Attributes:
        tokens: the k proposed tokens.
        hidden: ``[k + 1, D]``, the residual stream of the verified token and the proposed ones after
            ``depth`` layers: verification goes on from there.
        depth: how many of the target's layers the draft has run, and written the KV of, for those tokens.
        signals: the gate's signal for each token looked at, the doubted one included.
    """

    tokens: list[int]
    hidden: Tensor
    depth: int
    signals: list[float]


class Draft(Protocol):
    """Proposes tokens. Writes the KV of layers below ``Proposal.depth`` from position ``cache.length`` on."""

    def propose(self, verified: Verified, k: int, gate: Gate, cache: KVCache) -> Proposal:
        """Up to ``k`` (>= 0) tokens that may follow ``verified.token``."""
        ...
