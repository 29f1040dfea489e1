"""The stages of a job, one module each: a class of :class:`~selfspec.stages.base.Stage` in a module of its name."""

import importlib
import inspect

from selfspec.plan import Plan
from selfspec.stages.base import Stage


def of(plan: Plan) -> list[Stage]:
    """The plan's stages in their order; only theirs are imported, as some bring heavy packages along."""
    return [_find(name)(plan) for name in plan.stages]


def _find(name: str) -> type[Stage]:
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Stage) and c is not Stage)
    return found
