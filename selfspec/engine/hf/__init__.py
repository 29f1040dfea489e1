"""Hugging Face's own ``generate``, one request at a time: a peer to measure against."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from selfspec.axes import EngineOptions
from selfspec.engine.base import Probes, Scores
from selfspec.errors import ConfigError
from selfspec.plan import Plan

if TYPE_CHECKING:
    from selfspec.engine.hf.engine import HFEngine


@dataclass
class Options(EngineOptions):
    """Nothing of its own."""

    name: str = "hf"

    runs_ours: ClassVar[bool] = False
    can: ClassVar[tuple[type, ...]] = (Probes, Scores)

    @property
    def label(self) -> str:
        """Who decodes."""
        return "by hf"

    def refuse(self, plan: Any) -> None:
        """Refuses what ``generate`` does not have, and what would have no effect there."""
        super().refuse(plan)
        draft, gate, controller, policy = plan.draft, plan.gate, plan.controller, plan.policy
        for key, value in draft.changed().items():
            if key not in draft.engines["hf"]:
                raise ConfigError(f"draft.{key}={value}: means nothing to engine=hf")
        if draft.get("min_match", 1) != 1:
            raise ConfigError(f"draft.min_match={draft.min_match}: engine=hf looks up single tokens too; must be 1")
        if policy.relaxed:
            raise ConfigError(f"policy={policy.name}: engine=hf decodes exactly, and verifies what it drafts")
        if policy.samples and draft.speculates:
            temperature = policy.sampling.temperature
            raise ConfigError(f"policy.temperature={temperature:g}: engine=hf drafts greedily; use draft=none")
        if gate.stops and draft.speculates:
            raise ConfigError(f"gate={gate.name}: engine=hf asks no gate; use gate=none")
        if draft.speculates and not controller.constant:
            raise ConfigError(f"controller={controller.name}: engine=hf drafts K tokens always; use fixed")
        if self.max_batch > 1:
            raise ConfigError(f"engine.max_batch={self.max_batch}: engine=hf decodes one request at a time")

    def make(self, plan: Plan) -> "HFEngine":
        """The engine."""
        from selfspec.engine.hf.engine import HFEngine

        return HFEngine(plan)
