"""The journal of finished units of work: what a job that was killed carries on from.

One line of JSON each, the first one a header::

    {"journal": 1, "plan": "<plan id>", "settings": {...}, "created": "<iso time>"}
    {"stage": "bench", "unit": "<prompt>/0", "at": <ms since epoch>, "on": "<hardware>", "data": {...}}
    {"note": "run_id", "value": "..."}

:class:`Journal` knows what the lines mean; :class:`Lines`, in a file or in a bucket, keep them.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from selfspec.checkpoint import folder
from selfspec.checkpoint.lease import LEASE_S
from selfspec.checkpoint.segments import Segments
from selfspec.checkpoint.store import RESULT
from selfspec.config import Resume
from selfspec.errors import JournalError, SelfspecError, one_line
from selfspec.files import from_json
from selfspec.interrupt import shield

FORMAT = 1
"""Raise it when a selfspec that reads the former one would misread the file."""


@dataclass(frozen=True, slots=True)
class Record:
    """A finished unit of work.

    Attributes:
        stage: the stage it belongs to.
        unit: its name, the only one of its kind in the stage.
        at: when it was finished, in milliseconds since the epoch.
        on: fingerprint of the hardware it ran on; timings with different ones are never pooled.
        data: what came of it, as read back from JSON: lists for tuples.
    """

    stage: str
    unit: str
    at: int
    on: str
    data: dict[str, Any]


@dataclass
class _Contents:
    created: str = ""
    records: dict[tuple[str, str], Record] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Lines(Protocol):
    """Where the lines of a journal are kept."""

    folder: Path
    """On this disk, for files that only this machine has a use for; may not exist yet."""

    def where(self, number: int | None = None) -> str:
        """Names the journal, or a line of it (the first is 1), in a message."""

    def peek(self) -> list[bytes]:
        """The lines there are; needs no hold and changes nothing."""

    def hold(self) -> None:
        """Keep all other processes out until ``close``; waits for who holds it."""

    def set_aside(self, *beside: str) -> None:
        """Put the lines there are out of the way, and the files beside the journal that are named."""

    def load(self) -> list[bytes]:
        """The lines there are, made ready for more."""

    def append(self, line: bytes) -> None:
        """Add a line that outlives the process once this returns; or fail, and take no more."""

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file beside the journal, whole or not at all."""

    def close(self) -> None:
        """Let go."""


class Journal:
    """The finished units of one plan, held by one process at a time. Make one with :meth:`open`.

    Attributes:
        created: when the journal was begun, as an ISO time in UTC.
    """

    def __init__(self, lines: Lines, contents: _Contents) -> None:
        self._lines = lines
        self._records = contents.records
        self._restored = bool(contents.records)
        self._notes = contents.notes
        self.created = contents.created

    @classmethod
    def open(
        cls,
        place: Path | str,
        plan_id: str,
        settings: Mapping[str, Any],
        resume: Resume,
        *,
        launch: str | None = None,
        lease_s: float = LEASE_S,
    ) -> Self:
        """Begin a plan's journal or carry on with it, and hold it until closed; waits for who holds it.

        Args:
            place: a folder, or a URL of fsspec's, of this plan alone; created if need be.
            plan_id: the plan's identity; a journal of another plan is refused.
            settings: the plan as plain values, for whoever reads the journal.
            resume: ``auto`` carries on if there is a journal, ``require`` insists on one, ``never`` moves one
                that is there aside, to ``journal.<n>.jsonl``, unless this same launch has begun it.
            launch: names the sweep that this process is a part of; a job of it that was killed and comes back
                carries on, even with ``never``.
            lease_s: in a bucket, for how many seconds without a sign of life the journal stays held.

        Raises:
            JournalError: the journal is corrupt, another plan's or in a newer format; or there is none to resume.
            StorageError: the place cannot be written.
        """
        if resume is Resume.require:
            inspect(place, plan_id, resume)  # before anything is created
        lines = _lines(place, lease_s)
        try:
            lines.hold()
            # Only now that it is held: until then another process may be adding to what would be set aside.
            if resume is Resume.never and (launch is None or _launch(lines) != launch):
                lines.set_aside(RESULT)
            contents = _parse(lines, lines.load(), plan_id)
            if contents is None:
                if resume is Resume.require:
                    raise _nothing_to_resume(lines)
                contents = _Contents(created=datetime.now(UTC).isoformat(timespec="seconds"))
                header = {"journal": FORMAT, "plan": plan_id, "settings": settings, "created": contents.created}
                lines.append(_line(header if launch is None else {**header, "launch": launch}))
            return cls(lines, contents)
        except BaseException:
            lines.close()
            raise

    @property
    def folder(self) -> Path:
        """On this disk, for files that only this machine has a use for; may not exist yet."""
        return self._lines.folder

    @property
    def notes(self) -> dict[str, Any]:
        """The latest value of each note."""
        return dict(self._notes)

    def records(self, stage: str) -> list[Record]:
        """The finished units of a stage, in the order they were finished."""
        return [record for record in self._records.values() if record.stage == stage]

    def get(self, stage: str, unit: str) -> Record | None:
        """A finished unit; ``None`` if it has not been."""
        return self._records.get((stage, unit))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A block that makes something of the units' data, which in a shared folder anybody may have written.

        Raises:
            JournalError: units of an earlier process are not as a stage leaves them.
        """
        try:
            yield
        except SelfspecError:
            raise
        except Exception as error:
            if not self._restored:  # what is in it is ours
                raise
            raise JournalError(
                f"{self._lines.where()}: holds units that are none of a stage's ({type(error).__name__}: "
                f"{one_line(error)[:200]}): mend it, or use checkpoint.resume=never"
            ) from error

    def append(self, stage: str, unit: str, data: Mapping[str, Any], on: str) -> Record:
        """Record a finished unit. Once this returns, nothing short of a broken disk loses it.

        Raises:
            ValueError: the unit is in the journal already, or the journal is closed.
            TypeError: ``data`` is not JSON.
            StorageError: it cannot be written; the journal is as it was before, and takes no more.
            Interrupted: a trapped signal arrived; the unit is recorded, but its record was not given back.
        """
        if (stage, unit) in self._records:
            raise ValueError(f"unit {unit!r} of stage {stage!r} is in the journal already")
        line = _line({"stage": stage, "unit": unit, "at": time.time_ns() // 10**6, "on": on, "data": data})
        record = Record(**json.loads(line))  # as a resumed process will see it
        with shield():
            self._lines.append(line)
            self._records[stage, unit] = record
        return record

    def note(self, key: str, value: Any) -> None:
        """Keep a small fact that is no unit of work, such as the id of the tracker's run; the last one stands.

        Raises:
            ValueError: the journal is closed.
            TypeError: ``value`` is not JSON.
            StorageError: it cannot be written; the journal is as it was before, and takes no more.
            Interrupted: a trapped signal arrived; the note is recorded.
        """
        line = _line({"note": key, "value": value})
        with shield():
            self._lines.append(line)
            self._notes[key] = json.loads(line)["value"]

    def write_result(self, result: str) -> None:
        """Leave what came of the plan, as JSON, for :func:`finished`.

        Raises:
            StorageError: it cannot be written.
            LeaseError: another process holds the journal by now.
        """
        self._lines.write_file(RESULT, result.encode())

    def close(self) -> None:
        """Let go of the journal; what it holds can still be read here."""
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def inspect(place: Path | str, plan_id: str, resume: Resume = Resume.auto) -> bool:
    """Check, before anything runs, that a plan's journal can be resumed. Changes and creates nothing.

    Returns:
        Whether there is one to resume.

    Raises:
        JournalError: it cannot be read, is corrupt, another plan's or in a newer format; or ``resume`` requires
            one and there is none.
        StorageError: there is no such bucket, or no right to read it.
    """
    if resume is Resume.never:
        return False
    lines = _lines(place)
    there = _parse(lines, lines.peek(), plan_id) is not None
    if not there and resume is Resume.require:
        raise _nothing_to_resume(lines)
    return there


def begun_here(place: Path | str) -> bool:
    """Whether a plan's journal lies in a folder of this disk; one in a bucket tells nothing of this machine."""
    path = folder.on_disk(place)
    return path is not None and (path / folder.FILE).exists()


def _lines(place: Path | str, lease_s: float = LEASE_S) -> Lines:
    path = folder.on_disk(place)
    return Segments(str(place), lease_s) if path is None else folder.FileLines(path)


def _launch(lines: Lines) -> str | None:
    """What launch a journal was begun by; one that cannot be read, by none that we know."""
    try:
        return str(from_json(lines.peek()[0])["launch"])
    except (JournalError, ValueError, LookupError, TypeError):
        return None


def _parse(source: Lines, lines: list[bytes], plan_id: str) -> _Contents | None:
    """What the lines say; ``None`` if there is not even a header."""
    contents = _Contents()
    for number, line in enumerate(lines, 1):
        try:
            entry = from_json(line)
        except ValueError:
            raise _corrupt(source, number, "is not JSON") from None
        match entry:
            # Before the header's full shape is asked for: a newer format may have another, and is not corrupt.
            case {"journal": int(version)} if number == 1 and version > FORMAT:
                raise JournalError(
                    f"{source.where()}: was written by journal format {version}; this selfspec reads {FORMAT}: "
                    "upgrade selfspec, or use checkpoint.resume=never"
                )
            case {"journal": 1, "plan": str(plan), "settings": dict(), "created": str(created)} if number == 1:
                if plan != plan_id:
                    raise JournalError(
                        f"{source.where()}: is the journal of plan {plan}, not of {plan_id}: "
                        "use another checkpoint.dir, or checkpoint.resume=never"
                    )
                contents.created = created
            case {"stage": str(stage), "unit": str(unit), "at": int(), "on": str(), "data": dict()} if number > 1:
                if (stage, unit) in contents.records:
                    raise _corrupt(source, number, f"repeats unit {unit!r} of stage {stage!r}")
                contents.records[stage, unit] = Record(**{key: entry[key] for key in Record.__slots__})
            case {"note": str(key), "value": value} if number > 1:
                contents.notes[key] = value
            case _:
                raise _corrupt(source, number, "is no line of a journal")
    return contents if lines else None


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _corrupt(source: Lines, number: int, what: str) -> JournalError:
    return JournalError(f"{source.where(number)}: {what}: mend the file, or use checkpoint.resume=never")


def _nothing_to_resume(source: Lines) -> JournalError:
    return JournalError(f"checkpoint.resume=require: there is no journal {source.where()}; auto begins one")
