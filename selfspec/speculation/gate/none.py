"""No gate: a draft is never stopped."""

from dataclasses import dataclass
from typing import ClassVar

from selfspec.axes import GateOptions
from selfspec.speculation.gate.base import Gate


@dataclass
class Options(GateOptions):
    """Nothing to set."""

    name: str = "none"
    stops: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """Nothing: there is none."""
        return ""

    def make(self, seed: int = 0) -> Gate:
        """A gate that reads nothing."""
        return Gate()
