"""Engines by what they can do: what is said of them before they are imported is what their classes say."""

import importlib
import inspect

import pytest

from selfspec.config import EngineName
from selfspec.engine.base import Engine, Fits, Opens, Probes, Scores
from selfspec.engine.factory import KINDS


@pytest.mark.parametrize("name", EngineName)
def test_what_an_engine_can_do_is_what_its_class_says(name: EngineName) -> None:
    module, kind = KINDS[name].where.split(":")
    bases = inspect.getmro(getattr(importlib.import_module(module), kind))
    assert KINDS[name].can == tuple(able for able in (Opens, Fits, Scores, Probes) if able in bases)
    assert Engine in bases
