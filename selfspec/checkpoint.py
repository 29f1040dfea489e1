"""The journal of finished units of work: what a job that was killed carries on from.

One line of JSON each, the first one a header::

    {"journal": 1, "plan": "<plan id>", "settings": {...}, "created": "<iso time>"}
    {"stage": "bench", "unit": "<prompt>/0", "at": <ms since epoch>, "on": "<hardware>", "data": {...}}
    {"note": "run_id", "value": "..."}

:class:`Journal` knows what the lines mean; :class:`_File` keeps them. A bucket can take the place of the
latter: ``load``, ``append``, ``set_aside`` and ``close`` over numbered objects, each created only if it does
not exist yet.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from selfspec.config import Resume
from selfspec.errors import JournalError
from selfspec.interrupt import shield
from selfspec.provenance import reason, storing, sync_folder

FORMAT = 1
"""Raise it when a selfspec that reads the former one would misread the file."""

FILE = "journal.jsonl"
LOCK = "lock"

log = logging.getLogger(__name__)


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


class Journal:
    """The finished units of one plan, held by one process at a time. Make one with :meth:`open`.

    Attributes:
        created: when the journal was begun, as an ISO time in UTC.
        on_append: called with each unit appended by this process, once it is safe on the disk.
    """

    def __init__(self, store: "_File", contents: _Contents) -> None:
        self._store = store
        self._records = contents.records
        self._notes = contents.notes
        self.created = contents.created
        self.on_append: list[Callable[[Record], None]] = []

    @classmethod
    def open(cls, folder: Path, plan_id: str, settings: Mapping[str, Any], resume: Resume) -> Self:
        """Begin a plan's journal or carry on with it, and hold it until closed; waits for who holds it.

        Args:
            folder: of this plan alone; created if need be.
            plan_id: the plan's identity; a journal of another plan is refused.
            settings: the plan as plain values, for whoever reads the journal.
            resume: ``auto`` carries on if there is a journal, ``require`` insists on one, ``never`` moves one
                that is there aside, to ``journal.<n>.jsonl``.

        Raises:
            JournalError: the journal is corrupt, another plan's or in a newer format; or there is none to resume.
            StorageError: the folder cannot be written.
        """
        if resume is Resume.require:
            inspect(folder, plan_id, resume)  # before anything is created
        store = _File(folder)
        try:
            if resume is Resume.never:
                store.set_aside()
            contents = _parse(store.path, store.load(), plan_id)
            if contents is None:
                if resume is Resume.require:
                    raise _nothing_to_resume(store.path)
                contents = _Contents(created=datetime.now(UTC).isoformat(timespec="seconds"))
                header = {"journal": FORMAT, "plan": plan_id, "settings": settings, "created": contents.created}
                store.append(_line(header))
            return cls(store, contents)
        except BaseException:
            store.close()
            raise

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._store.path

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

    def append(self, stage: str, unit: str, data: Mapping[str, Any], on: str) -> Record:
        """Record a finished unit. Once this returns, nothing short of a broken disk loses it.

        Raises:
            ValueError: the unit is in the journal already, or the journal is closed.
            TypeError: ``data`` is not JSON.
            StorageError: it cannot be written; the journal is as it was before, and takes no more.
            Interrupted: a trapped signal arrived; the unit is recorded, but ``on_append`` was not called.
        """
        if (stage, unit) in self._records:
            raise ValueError(f"unit {unit!r} of stage {stage!r} is in the journal already")
        line = _line({"stage": stage, "unit": unit, "at": time.time_ns() // 10**6, "on": on, "data": data})
        record = Record(**json.loads(line))  # as a resumed process will see it
        with shield():
            self._store.append(line)
            self._records[stage, unit] = record
        for observer in self.on_append:
            observer(record)
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
            self._store.append(line)
            self._notes[key] = json.loads(line)["value"]

    def close(self) -> None:
        """Let go of the journal; what it holds can still be read here."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def inspect(folder: Path, plan_id: str, resume: Resume = Resume.auto) -> None:
    """Check, before anything runs, that a plan's journal can be resumed. Changes and creates nothing.

    Raises:
        JournalError: it cannot be read, is corrupt, another plan's or in a newer format; or ``resume`` requires
            one and there is none.
    """
    path = folder / FILE
    if resume is Resume.never:
        return
    if _parse(path, _whole_lines(_read(path)), plan_id) is None and resume is Resume.require:
        raise _nothing_to_resume(path)


class _File:
    """The lines of a journal in a local file, locked from creation to ``close``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._fd: int | None = None
        self._end = 0
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / LOCK, thread_local=False)
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                print(f"waiting for another process that runs the same plan: {folder}", file=sys.stderr, flush=True)
                self._lock.acquire()

    def set_aside(self) -> None:
        """Move a journal that is there out of the way."""
        with storing(self.path), shield():
            if self.path.exists():
                aside = (self.path.with_name(f"journal.{n}.jsonl") for n in count(1))
                self.path.rename(next(path for path in aside if not path.exists()))
                sync_folder(self.path.parent)

    def load(self) -> list[bytes]:
        """The lines there are. A torn last one is cut off, and the file made ready for more."""
        data = _read(self.path)
        lines = _whole_lines(data)
        self._end = sum(len(line) + 1 for line in lines)
        with storing(self.path), shield():
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if self._end < len(data):
                log.warning("%s: the last line was torn when its writer died, and is dropped", self.path)
                os.ftruncate(self._fd, self._end)
                os.fsync(self._fd)
            sync_folder(self.path.parent)
        return lines

    def append(self, line: bytes) -> None:
        """Add a line and sync it to the disk, or fail and leave the file as it was."""
        if self._fd is None:
            raise ValueError(f"{self.path}: the journal is closed")
        with storing(self.path), shield():
            try:
                rest = line
                while rest:  # once; more only to learn from the next write why the last one fell short
                    rest = rest[os.write(self._fd, rest) :]
                os.fsync(self._fd)
            except BaseException:
                # After a failed sync nobody knows what the disk holds, so this file is not written to again.
                fd, self._fd = self._fd, None
                with suppress(OSError):  # what is left of the line is recognised next time
                    os.ftruncate(fd, self._end)
                os.close(fd)
                raise
            self._end += len(line)

    def close(self) -> None:
        with shield():
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
            self._lock.release()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise JournalError(f"{path}: cannot be read: {reason(error)}") from error


def _whole_lines(data: bytes) -> list[bytes]:
    """The lines of a journal, less a torn last one. Only the last can be: each is synced before the next."""
    *lines, tail = data.split(b"\n")
    if lines and not tail:
        try:
            json.loads(lines[-1])
        except ValueError:  # after a power loss, a file can have its new length and not yet its new content
            lines.pop()
    return lines


def _parse(path: Path, lines: list[bytes], plan_id: str) -> _Contents | None:
    """What the lines say; ``None`` if there is not even a header."""
    contents = _Contents()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            raise _corrupt(path, number, "is not JSON") from None
        match entry:
            case {"journal": int(version)} if number == 1 and version > FORMAT:
                raise JournalError(
                    f"{path}: was written by journal format {version}; this selfspec reads {FORMAT}: "
                    "upgrade selfspec, or use checkpoint.resume=never"
                )
            case {"journal": 1, "plan": str(plan), "settings": dict(), "created": str(created)} if number == 1:
                if plan != plan_id:
                    raise JournalError(
                        f"{path}: is the journal of plan {plan}, not of {plan_id}: "
                        "use another checkpoint.dir, or checkpoint.resume=never"
                    )
                contents.created = created
            case {"stage": str(stage), "unit": str(unit), "at": int(), "on": str(), "data": dict()} if number > 1:
                if (stage, unit) in contents.records:
                    raise _corrupt(path, number, f"repeats unit {unit!r} of stage {stage!r}")
                contents.records[stage, unit] = Record(**{key: entry[key] for key in Record.__slots__})
            case {"note": str(key), "value": value} if number > 1:
                contents.notes[key] = value
            case _:
                raise _corrupt(path, number, "is no line of a journal")
    return contents if lines else None


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _corrupt(path: Path, number: int, what: str) -> JournalError:
    return JournalError(f"{path}, line {number}: {what}: mend the file, or use checkpoint.resume=never")


def _nothing_to_resume(path: Path) -> JournalError:
    return JournalError(f"checkpoint.resume=require: there is no journal {path}; auto begins one")
