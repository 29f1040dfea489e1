"""The fit stage: chooses the exit layer where the plan leaves it open, and sees to it that the head exists."""

from selfspec.checkpoint import Journal
from selfspec.engine.base import LazyEngine
from selfspec.fitting import choice, ready, settled
from selfspec.plan import Plan
from selfspec.provenance import fingerprint
from selfspec.stages.base import Stage, Unit, Units
from selfspec.types import Measurements

_SHOWN = ("agreement", "raw_agreement", "sgd_gain", "train_tokens", "heldout_tokens", "parameters", "solve_s")


class Fit(Stage):
    """Up to two units, the choice and the head's facts; none for drafts without either."""

    name = "fit"

    def units(self, engine: LazyEngine, journal: Journal) -> Units:
        """What is to be chosen, and then the head, unless an earlier run has seen to it."""
        if self.plan.open and self.missing(["choice"], journal):
            yield Unit("choice", choice(engine, self.plan), fingerprint())
        plan = chosen(self.plan, journal)
        if plan.draft.fitted and self.missing(["head"], journal):
            yield Unit("head", ready(engine, plan), fingerprint())

    def measurements(self, journal: Journal) -> Measurements:
        """What the head's facts say in numbers, and what each exit layer was foretold to be worth."""
        facts = [item for record in journal.records(self.name) for item in record.data.items() if item[0] in _SHOWN]
        found = {name: float(value) for name, value in facts if isinstance(value, (int, float))}
        if made := journal.get(self.name, "choice"):
            found |= {name: float(made.data[name]) for name in ("exit_layer", "K", "speedup", "plain_ms")}
            for layer, exit in made.data["exits"].items():
                found |= {f"exits/{layer}/{name}": float(value) for name, value in exit.items()}
        return found

    def notes(self, journal: Journal) -> list[str]:
        """That the choice is another machine's."""
        made = journal.get(self.name, "choice")
        elsewhere = made is not None and made.on != fingerprint()
        return ["the exit layer was chosen on other hardware, by what cycles cost there"] if elsewhere else []


def chosen(plan: Plan, journal: Journal) -> Plan:
    """A plan as all stages after this one are to run it: what it left open is as was chosen."""
    made = journal.get(Fit.name, "choice") if plan.open else None
    return settled(plan, made.data) if made else plan
