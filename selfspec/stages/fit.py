"""The fit stage: sees to it that the plan's head exists (``fitting.py``)."""

from selfspec.checkpoint import Journal
from selfspec.engine.base import LazyEngine
from selfspec.fitting import ready
from selfspec.provenance import fingerprint
from selfspec.stages.base import Stage, Unit, Units
from selfspec.types import Measurements

_SHOWN = ("agreement", "raw_agreement", "sgd_gain", "train_tokens", "heldout_tokens", "parameters", "solve_s")


class Fit(Stage):
    """One unit, the head's facts; none for drafts without a head."""

    name = "fit"

    def units(self, engine: LazyEngine, journal: Journal) -> Units:
        """The head, unless an earlier run has seen to it."""
        if self.plan.draft.fitted and self.missing(["head"], journal):
            yield Unit("head", ready(engine, self.plan), fingerprint())

    def measurements(self, journal: Journal) -> Measurements:
        """What the head's facts say in numbers."""
        facts = [item for record in journal.records(self.name) for item in record.data.items() if item[0] in _SHOWN]
        return {name: float(value) for name, value in facts if isinstance(value, (int, float))}
