"""Controllers: how many tokens to draft next? From what came of earlier cycles. One file a controller."""

from selfspec.config import Controller as ControllerConfig
from selfspec.config import ControllerName
from selfspec.speculation.controller.adaptive import Adaptive
from selfspec.speculation.controller.autotune import Autotune
from selfspec.speculation.controller.base import Controller, Fixed
from selfspec.speculation.controller.cost import Cost

__all__ = ["Adaptive", "Autotune", "Controller", "Cost", "Fixed", "make"]


def make(controller: ControllerConfig, seed: int = 0) -> Controller:
    """The controller a config asks for."""
    match controller.name:
        case ControllerName.fixed:
            return Fixed(controller.K)
        case ControllerName.adaptive:
            low, high, step, window = controller.low, controller.high, controller.step, controller.window
            assert low is not None and high and step and window and controller.target is not None, "see the plan"
            return Adaptive(controller.K, low, high, step, window, controller.target)
        case ControllerName.cost:
            assert controller.window, "checked by the plan"
            return Cost(controller.K, controller.window)
        case ControllerName.autotune:
            assert controller.exits, "checked by the plan"
            return Autotune(controller.K, controller.exits, seed)
