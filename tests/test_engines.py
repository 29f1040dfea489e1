"""Engines by what they can do: what is said of them before they are imported is what their classes say."""

import importlib
import inspect
from typing import get_type_hints

import pytest

from selfspec.axes import ENGINE, EngineOptions
from selfspec.engine.base import Chooses, Engine, Fits, Opens, Probes, Profiles, Scores


@pytest.mark.parametrize("option", ENGINE.options.values(), ids=ENGINE.options)
def test_what_an_engine_can_do_is_what_its_class_says(option: type[EngineOptions]) -> None:
    module = importlib.import_module(f"{option.__module__}.engine")
    bases = inspect.getmro(get_type_hints(option.make, vars(module))["return"])
    assert set(option.can) == {able for able in (Chooses, Opens, Fits, Scores, Probes, Profiles) if able in bases}
    assert Engine in bases
