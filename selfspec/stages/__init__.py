"""The stages of a job, one module each: ``run(engine, plan, journal) -> Measurements``.

A stage may also define any of these; what it does not define, :func:`ask` answers for it:

    check(plan) -> None                     refuses, before anything is written, what would fail later
    installed(plan) -> None                 refuses what it needs and is not installed on the machine it is to run on
    fetch(plan) -> None                     has the sources it alone needs on this disk
    per_unit(data) -> Measurements          what a tracker is shown of a unit (its record's data) as it finishes
    write(folder, plan, journal) -> None    files of its own in the result folder
    facts(plan, journal) -> dict            fields of the result that it fills, such as ``lossless``
    notes(plan, journal) -> list[str]       what the reader of its measurements must know
    failures(plan, journal) -> list[str]    why the job fails although it ran to its end
"""

import importlib
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def load(stage: str) -> ModuleType:
    """A stage's module; imported when it is asked for, as some bring heavy packages along."""
    return importlib.import_module(f"{__name__}.{stage}")


def ask(stage: str, what: str, *args: Any, otherwise: T) -> T:
    """What a stage's optional function answers, or ``otherwise`` where it defines none."""
    function = getattr(load(stage), what, None)
    answer: T = otherwise if function is None else function(*args)
    return answer
