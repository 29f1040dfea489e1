"""Controllers: how many tokens to draft next? Pure, from what came of earlier cycles."""

from collections.abc import Sequence
from typing import Protocol

from selfspec.config import Controller as ControllerConfig
from selfspec.types import Cycle


class Controller(Protocol):
    """Chooses K for the next cycle."""

    def ask(self, history: Sequence[Cycle]) -> int:
        """Draft tokens to ask for (>= 0), given this request's cycles so far."""
        ...


class Fixed:
    """The same K every time."""

    def __init__(self, k: int) -> None:
        self.k = k

    def ask(self, history: Sequence[Cycle]) -> int:
        """K, whatever happened."""
        return self.k


def make(controller: ControllerConfig) -> Controller:
    """The controller a config asks for."""
    return Fixed(controller.K)
