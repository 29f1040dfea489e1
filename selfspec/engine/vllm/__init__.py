"""vLLM in this process."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from selfspec.axes import EngineOptions
from selfspec.config import Device
from selfspec.engine.base import Fits, Opens, Scores
from selfspec.errors import ConfigError
from selfspec.options import bounded
from selfspec.plan import Plan
from selfspec.vllm_plugin import settings, versions

if TYPE_CHECKING:
    from selfspec.engine.vllm.engine import VLLMEngine

HOTTEST = 2.0
"""The highest temperature that vLLM accepts."""


@dataclass
class Options(EngineOptions):
    """What vLLM is started with."""

    name: str = "vllm"
    kv_gib: float = bounded(MISSING, 0.01)
    """Room for keys and values, in GiB; plain decoding and the configuration have as much each."""
    quantization: str | None = None
    """How the weights are quantised, by vLLM's name; ``None``: as the checkpoint says."""
    tensor_parallel: int = bounded(1, 1)
    """Devices that share the layers' matrices."""
    eager: bool = False
    """Run operators one by one, in the place of a compiled (on a GPU, captured) step."""

    runs_ours: ClassVar[bool] = False
    can: ClassVar[tuple[type, ...]] = (Fits, Opens, Scores)

    @property
    def label(self) -> str:
        """Who decodes."""
        return "by vllm"

    def refuse(self, plan: Any) -> None:
        """Refuses what vLLM cannot do, and what our plugin cannot do inside it."""
        super().refuse(plan)
        draft, gate, controller, policy = plan.draft, plan.gate, plan.controller, plan.policy
        if policy.relaxed:
            said = f"policy={policy.name}" if policy.verify else "policy.verify=false"
            raise ConfigError(f"{said}: engine=vllm verifies what it drafts, and decodes exactly")
        if policy.sampling.temperature > HOTTEST:
            asked = f"policy.temperature={policy.sampling.temperature:g}"
            raise ConfigError(f"{asked}: engine=vllm draws at up to {HOTTEST:g}")
        if plan.hardware.device is Device.mps:
            raise ConfigError("hardware.device=mps: engine=vllm runs on auto, cpu, cuda")
        if draft.inside_vllm:
            settings.check(draft, gate, controller, self.tensor_parallel)
            if controller.adapts and plan.bench.fixed_k:
                raise ConfigError(
                    f"bench.fixed_k={plan.bench.fixed_k}: vLLM is started with one controller; use bench.fixed_k=[]"
                )
        elif draft.speculates:
            settings.check_own(draft, gate, controller)

    def check_here(self) -> None:
        """It is an extra."""
        versions.check_engine()

    def make(self, plan: Plan) -> "VLLMEngine":
        """The engine."""
        from selfspec.engine.vllm.engine import VLLMEngine

        return VLLMEngine(plan)
