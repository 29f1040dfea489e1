"""The same K in every cycle."""

from dataclasses import dataclass
from typing import ClassVar

from selfspec.axes import ControllerOptions
from selfspec.speculation.controller.base import Controller


@dataclass
class Options(ControllerOptions):
    """K."""

    name: str = "fixed"

    adapts: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """Such as ``K=4``."""
        return f"K={self.K}"

    def make(self, seed: int = 0) -> Controller:
        """A controller that learns nothing."""
        return Controller(self.k)
