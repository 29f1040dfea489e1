"""The contract of a controller: how many tokens to draft, by what came of earlier cycles."""

from collections.abc import Sequence
from typing import Any

from selfspec.types import Cycle


class Controller:
    """The same K every time. The base of the others."""

    def __init__(self, k: int) -> None:
        self.k = k

    def num_draft_tokens(self, history: Sequence[Cycle], batch: int) -> int:
        """Positions ahead the draft is to look (>= 0), given this request's cycles and how many are decoded at once."""
        return self.k

    def exit_layer(self, prompt_tokens: int) -> int | None:
        """The exit layer for a request about to begin; ``None``: the draft's own."""
        return None

    def observe(self, cycles: list[Cycle]) -> None:
        """What came of a step, one record a row of the batch."""

    def state(self) -> dict[str, Any]:
        """What it has learned, as JSON values; for the checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what an earlier process had learned."""
