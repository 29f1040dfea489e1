"""What ``checkpoint.dir`` names, be it a folder or a bucket: the files beside the journals.

plans/<plan id>/    a plan's journal, and ``result.json`` once it has ended
heads/              fitted heads
fit/<id>/           the journal of the answers that heads are fitted on, and those of what was chosen by them
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock

from selfspec.checkpoint.bucket import Bucket, trimmed
from selfspec.checkpoint.folder import on_disk, read
from selfspec.checkpoint.lease import LEASE_S, Lease
from selfspec.checkpoint.segments import scratch
from selfspec.errors import JournalError
from selfspec.files import acquire, from_json, storing, write_atomic

AT_ONCE = 16
"""Questions to a store under way together."""
RESULT = "result.json"
"""Beside a plan's journal: what came of it, left there at its end."""


A = TypeVar("A")
T = TypeVar("T")


class Store(Protocol):
    """Files that outlive a machine."""

    def where(self, name: str) -> str:
        """Names a file in messages."""

    def path(self, name: str) -> Path:
        """Where a file lies on this disk once it was fetched."""

    def read(self, name: str, count: int | None = None) -> bytes | None:
        """A file, or its first bytes; ``None`` if it is not there."""

    def size(self, name: str) -> int | None:
        """Of a file, in bytes; ``None`` if it is not there."""

    def make(self, name: str, build: Callable[[Path], object]) -> None:
        """Have a file made unless it is there: by one process, while all others wait.

        Args:
            build: writes it, whole or not at all, to the path it is given.
        """

    def fetch(self, name: str) -> Path:
        """A file that is there, on this disk."""


def at(place: str, lease_s: float = LEASE_S) -> Store:
    """The store that ``checkpoint.dir`` names.

    Raises:
        ConfigError: a URL that is of no kind we know, or needs a package that is not installed.
    """
    path = on_disk(place)
    return InBucket(place, lease_s) if path is None else OnDisk(path)


def plan_place(place: str, plan_id: str) -> str:
    """Where below ``checkpoint.dir`` a plan's journal is kept."""
    return f"{trimmed(place)}/plans/{plan_id}"


def fit_place(place: str, name: str) -> str:
    """Where below ``checkpoint.dir`` a journal is kept that plans share: of fit answers, or of choices."""
    return f"{trimmed(place)}/fit/{name}"


def finished(place: str, plan_id: str) -> dict[str, Any] | None:
    """The ``result.json`` that a plan's job left in the store at its end, whatever its status; ``None`` without one.

    Args:
        place: ``checkpoint.dir``.

    Raises:
        JournalError: it cannot be read, or is none.
        StorageError: there is no such bucket, or no right to read it.
    """
    name = f"plans/{plan_id}/{RESULT}"
    data = at(place).read(name)
    if data is None:
        return None
    try:
        result = from_json(data)
        if not isinstance(result, dict):
            raise ValueError("no object")
    except ValueError:
        raise JournalError(f"{trimmed(place)}/{name}: is no result; delete it, and the job writes it again") from None
    return result


def map_concurrent(question: Callable[[A], T], those: Sequence[A]) -> list[T]:
    """The answers, in order: a bucket takes its time for each, and none to answer several. Raises the first's error."""
    if len(those) == 1:  # a client in another thread is another client, with a connection of its own
        return [question(those[0])]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(question, those))


class OnDisk:
    """A folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def where(self, name: str) -> str:
        """Its path."""
        return str(self.path(name))

    def path(self, name: str) -> Path:
        """Its place in the folder."""
        return self._folder / name

    def read(self, name: str, count: int | None = None) -> bytes | None:
        """As :meth:`Store.read`."""
        return read(self.path(name), -1 if count is None else count)

    def size(self, name: str) -> int | None:
        """As :meth:`Store.size`."""
        return self.path(name).stat().st_size if self.path(name).exists() else None

    def make(self, name: str, build: Callable[[Path], object]) -> None:
        """As :meth:`Store.make`."""
        path = self.path(name)
        with storing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            acquire(lock, f"makes {path}")
        try:
            if not path.exists():
                build(path)
        finally:
            lock.release()

    def fetch(self, name: str) -> Path:
        """It is here."""
        return self.path(name)


class InBucket:
    """A bucket. What is fetched from it lies in the cache."""

    def __init__(self, url: str, lease_s: float) -> None:
        self._bucket = Bucket(url)
        self._lease_s = lease_s

    def where(self, name: str) -> str:
        """Its URL."""
        return self._bucket.where(name)

    def path(self, name: str) -> Path:
        """Its place in the cache."""
        return scratch(self._bucket.url) / name

    def read(self, name: str, count: int | None = None) -> bytes | None:
        """As :meth:`Store.read`."""
        return self._bucket.read(name, *(() if count is None else (0, count)))

    def size(self, name: str) -> int | None:
        """As :meth:`Store.size`."""
        return self._bucket.size(name)

    def make(self, name: str, build: Callable[[Path], object]) -> None:
        """As :meth:`Store.make`. Should two make it all the same, the first to be done is right."""
        path = self.path(name)
        with storing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        with Lease(self._bucket, f"{name}.lease", self._lease_s):
            if self._bucket.size(name) is None:
                build(path)
                self._bucket.create(name, path.read_bytes())

    def fetch(self, name: str) -> Path:
        """Downloaded once a process, for it may have been made anew since the last one."""
        path, url = self.path(name), self._bucket.where(name)
        if url not in _fetched or not path.exists():
            data = self._bucket.read(name)
            if data is None:
                raise JournalError(f"{url}: was deleted; the same command makes it again")
            with storing(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)
            _fetched.add(url)
        return path


_fetched = set[str]()
"""URLs of what this process has downloaded."""
