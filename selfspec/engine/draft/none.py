"""No draft: plain decoding is speculative decoding that proposes nothing."""

from selfspec.config import Draft as DraftConfig
from selfspec.engine.cache import KVCache
from selfspec.engine.draft.base import Proposal, Verified
from selfspec.engine.gate import Gate
from selfspec.engine.head import Head
from selfspec.engine.llama import Llama


class NoDraft:
    """Hands over the verified token alone, with no layer run."""

    def __init__(self, model: Llama) -> None:
        self.model = model

    def propose(self, verified: Verified, k: int, gate: Gate, cache: KVCache) -> Proposal:
        """Nothing, whatever ``k``."""
        return Proposal([], self.model.embed([verified.token]), 0, [])


def make(draft: DraftConfig, model: Llama, head: Head | None) -> NoDraft:
    """The draft a config asks for."""
    return NoDraft(model)
