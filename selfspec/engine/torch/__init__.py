"""Our own engine: the decode step on one device, with continuous batching."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from selfspec.axes import EngineOptions
from selfspec.engine.base import Chooses, Fits, Opens, Probes, Profiles, Scores
from selfspec.model.base import Graphs, Kernels, Layers, Width
from selfspec.plan import Plan

if TYPE_CHECKING:
    from selfspec.engine.torch.engine import TorchEngine


@dataclass
class Options(EngineOptions):
    """Whose layers and kernels, and how its weights are kept."""

    name: str = "torch"
    layers: Layers = Layers.auto
    weights: Width = Width.auto
    """Our own layers on a CPU: ``packed`` reads what a GGUF file packs, exactly; ``int8`` is another model, a little
    worse."""
    kernels: Kernels = Kernels.auto
    graphs: Graphs = Graphs.auto

    can: ClassVar[tuple[type, ...]] = (Chooses, Fits, Opens, Probes, Profiles, Scores)
    chooses: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """The weights, where they were chosen."""
        return "" if self.weights is Width.auto else self.weights.name

    @property
    def fits_as(self) -> dict[str, Any]:
        """Other weights give other answers."""
        return {"weights": self.weights} if self.weights is Width.int8 else {}

    def int8(self) -> "Options":
        """The same model, a little worse."""
        return replace(self, weights=Width.int8)

    def make(self, plan: Plan) -> "TorchEngine":
        """The engine."""
        from selfspec.engine.torch.engine import TorchEngine

        return TorchEngine(plan)
