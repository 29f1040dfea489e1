"""A simulation in virtual time, with real gates and controllers; imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from selfspec.axes import EngineOptions
from selfspec.engine.base import Opens, Probes, Scores
from selfspec.options import bounded
from selfspec.plan import Plan

if TYPE_CHECKING:
    from selfspec.engine.fake.engine import FakeEngine


@dataclass
class Options(EngineOptions):
    """How good its drafts are."""

    name: str = "fake"
    acceptance: float = bounded(0.5, 0, 1)
    """The chance that a drafted token is right."""

    runs_ours: ClassVar[bool] = False
    can: ClassVar[tuple[type, ...]] = (Opens, Probes, Scores)
    reads_model: ClassVar[bool] = False
    alike: ClassVar[Sequence[int]] = (1,)

    def make(self, plan: Plan) -> "FakeEngine":
        """The engine."""
        from selfspec.engine.fake.engine import FakeEngine

        return FakeEngine(plan)
