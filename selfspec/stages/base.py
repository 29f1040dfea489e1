"""The contract of a stage: it yields its units of work, and says what they come to.

A new stage is one file here, with a class of this shape in it, and its name among ``config.STAGES``. It journals
nothing and tracks nothing itself: the job does, unit by unit (``job.py``).
"""

from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from selfspec.checkpoint import Journal
from selfspec.engine.base import LazyEngine
from selfspec.plan import Plan
from selfspec.types import Measurements


class Unit(NamedTuple):
    """A finished unit of work, for the journal.

    Attributes:
        name: the only one of its kind in the stage.
        data: what came of it, as JSON values.
        on: fingerprint of the hardware it ran on.
    """

    name: str
    data: Mapping[str, Any]
    on: str

    @classmethod
    def measured(cls, name: str, data: Mapping[str, Any], provenance: Mapping[str, Any]) -> Self:
        """One that carries where it ran; ``provenance`` as :func:`collected <selfspec.provenance.collect>`."""
        return cls(name, {**data, "provenance": provenance}, str(provenance["fingerprint"]))


Units = Generator[Unit, None, None]


class Stage:
    """A stage of one plan. It must have :meth:`units` and :meth:`measurements`; the rest, where it has a say in it."""

    name: ClassVar[str]

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def check(self) -> None:
        """Refuses, before anything is written, what would fail later.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """

    def installed(self) -> None:
        """Refuses what it needs and is not installed on the machine it is to run on.

        Raises:
            ConfigError: with what is needed.
        """

    def fetch(self) -> None:
        """Has the sources it alone needs on this disk.

        Raises:
            AssetError: one cannot be had.
        """

    def units(self, engine: LazyEngine, journal: Journal) -> Units:
        """Runs what the journal lacks. Each unit is in the journal before the next one is asked for.

        Args:
            engine: asked for only where there is something to run.
        """
        raise NotImplementedError

    def measurements(self, journal: Journal) -> Measurements:
        """What all of its units come to."""
        raise NotImplementedError

    def per_unit(self, data: dict[str, Any]) -> Measurements:
        """What a tracker is shown of a unit as it finishes."""
        return {}

    def write(self, folder: Path, journal: Journal) -> None:
        """Leaves files of its own in the result folder.

        Raises:
            StorageError: one cannot be written.
        """

    def facts(self, journal: Journal) -> dict[str, Any]:
        """Fields of the result that it fills, such as ``lossless``; the first stage to fill one has the say."""
        return {}

    def notes(self, journal: Journal) -> list[str]:
        """What the reader of its measurements must know."""
        return []

    def failures(self, journal: Journal) -> list[str]:
        """Why the job fails although the stage ran to its end."""
        return []

    def missing(self, wanted: Iterable[str], journal: Journal) -> list[str]:
        """Those units that the journal does not have."""
        return [unit for unit in wanted if journal.get(self.name, unit) is None]
