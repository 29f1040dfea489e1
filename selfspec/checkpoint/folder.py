"""The lines of a journal in a file on this disk: JSONL, synced line by line, under a file lock."""

import logging
import os
from contextlib import suppress
from itertools import count
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from selfspec.errors import JournalError
from selfspec.files import acquire, from_json, open_regular, own_folder, reason, storing, sync_folder, write_atomic
from selfspec.interrupt import shield

FILE = "journal.jsonl"
LOCK = "lock"

log = logging.getLogger(__name__)


class FileLines:
    """The lines of a journal in a local file, locked from ``hold`` to ``close``.

    Attributes:
        folder: of this journal alone.
        path: of the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE
        self._fd: int | None = None
        self._end = 0
        self._lock = FileLock(folder / LOCK, thread_local=False)

    def hold(self) -> None:
        """Lock the folder, which is made if need be; waits for who has locked it."""
        with storing(self.folder):
            own_folder(self.folder)
            acquire(self._lock, f"runs the same plan: {self.folder}")

    def where(self, number: int | None = None) -> str:
        """Names the journal, or a line of it (the first is 1), in a message."""
        return str(self.path) if number is None else f"{self.path}, line {number}"

    def peek(self) -> list[bytes]:
        """The lines there are; changes nothing."""
        return whole_lines(read(self.path) or b"")

    def set_aside(self, *beside: str) -> None:
        """Move a journal that is there out of the way, and the files beside it that are named."""
        with storing(self.path), shield():
            paths = [self.folder / name for name in (*beside, FILE)]  # the journal last: the others are made from it
            number = next(n for n in count(1) if not any(_aside(path, n).exists() for path in paths))
            for path in paths:
                with suppress(FileNotFoundError):
                    path.rename(_aside(path, number))
            sync_folder(self.folder)

    def load(self) -> list[bytes]:
        """The lines there are. A torn last one is cut off, and the file made ready for more."""
        data = read(self.path) or b""
        lines = whole_lines(data)
        self._end = sum(len(line) + 1 for line in lines)
        with storing(self.path), shield():
            self._fd = open_regular(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
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

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file beside the journal, whole or not at all."""
        write_atomic(self.folder / name, data)

    def close(self) -> None:
        """Let go of the file and its lock."""
        with shield():
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
            self._lock.release()


def on_disk(place: Path | str) -> Path | None:
    """The folder of this disk that ``place`` names, be it as ``file://``; ``None`` for another URL."""
    if isinstance(place, str) and "://" in place:
        return Path(unquote(urlsplit(place).path)) if place.startswith("file://") else None
    return Path(place)


def _aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def read(path: Path, count: int = -1) -> bytes | None:
    """What is in a file, or its first ``count`` bytes; ``None`` if there is none.

    Raises:
        JournalError: it cannot be read.
    """
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            return file.read(count)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"{path}: cannot be read: {reason(error)}") from error


def whole_lines(data: bytes) -> list[bytes]:
    """The lines of a journal, less a torn last one. Only the last can be: each is synced before the next."""
    *lines, tail = data.split(b"\n")
    if lines and not tail:
        try:
            from_json(lines[-1])
        except ValueError:  # after a power loss, a file can have its new length and not yet its new content
            lines.pop()
    return lines
