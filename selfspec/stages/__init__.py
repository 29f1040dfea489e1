"""The stages of a job, one module each: ``run(engine, plan, journal) -> Measurements``."""

from collections.abc import Callable

from selfspec.engine.base import Engine

LazyEngine = Callable[[], Engine]
"""Gives the engine, made at the first call: a stage whose units are all in the journal never asks."""
