"""The fit stage: sees to it that the plan's head exists (``fitting.py``)."""

from typing import Any

from selfspec.checkpoint import Journal
from selfspec.engine.base import LazyEngine
from selfspec.fitting import ready
from selfspec.plan import Plan
from selfspec.provenance import fingerprint
from selfspec.types import Measurements


def run(engine: LazyEngine, plan: Plan, journal: Journal) -> Measurements:
    """Sees to it that the plan's head exists; nothing to do for drafts without one."""
    if not plan.draft.fitted:
        return {}
    record = journal.get("fit", "head")
    if record is None:
        record = journal.append("fit", "head", ready(engine, plan), fingerprint())
    return measurements(record.data)


def measurements(facts: dict[str, Any]) -> Measurements:
    """What a head's facts say in numbers."""
    return {name: float(value) for name, value in facts.items() if isinstance(value, (int, float)) and name in _SHOWN}


_SHOWN = ("agreement", "raw_agreement", "sgd_gain", "train_tokens", "heldout_tokens", "parameters", "solve_s")
