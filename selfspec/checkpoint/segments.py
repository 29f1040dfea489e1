"""The lines of a journal in a bucket: numbered objects, each created only if it is not there yet.

A segment's first line says who wrote it; the others, if any, are lines of the journal::

    {"segment": 1, "epoch": 3, "holder": "5f0c..."}
    {"stage": "bench", ...}

Whoever opens the journal reads all segments and then creates the next one, a *fence*: without lines, or with
``"fresh": true`` where all before it are set aside. So every writer has read all that stands before what it writes.
A process that was taken for dead and wakes up again finds its next number taken, and stops; and a write of its that
was under way all the time is refused too, or was there before the fence and is read.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from selfspec.checkpoint.bucket import Bucket
from selfspec.checkpoint.lease import LEASE_S, Lease
from selfspec.data import folders
from selfspec.errors import JournalError, LeaseError
from selfspec.files import from_json
from selfspec.interrupt import shield

FORMAT = 1
FOLDER, LEASE = "journal", "lease"

_NAME = re.compile(r"(\d{8,})\.jsonl")


@dataclass(frozen=True)
class _Segment:
    """What one object holds; ``fresh`` is ``None`` where it cannot be read."""

    number: int
    fresh: bool | None
    lines: list[bytes]


class Segments:
    """The lines of a journal below a URL, kept from other processes from ``hold`` to ``close``.

    Attributes:
        folder: for files of this machine's.
    """

    def __init__(self, url: str, lease_s: float = LEASE_S) -> None:
        self._bucket = Bucket(url)
        self._lease = Lease(self._bucket, LEASE, lease_s)
        self._fresh = False
        self._next: int | None = None
        self._names: list[str] = []
        self.folder = scratch(url)

    def where(self, number: int | None = None) -> str:
        """Names the journal, or the object that a line of it is in, in a message."""
        return self._bucket.where(FOLDER if number is None else self._names[number - 1])

    def peek(self) -> list[bytes]:
        """The lines there are; needs no hold and changes nothing."""
        return self._lines(self._segments())

    def hold(self) -> None:
        """Take the lease; waits for who has it."""
        self._lease.hold()

    def set_aside(self, *beside: str) -> None:
        """Have all lines that are there ignored from ``load`` on, and delete the files beside them."""
        self._fresh = True
        for name in beside:
            self._bucket.remove(name)

    def load(self) -> list[bytes]:
        """The lines there are; nobody else adds any from now on."""
        while True:
            segments = self._segments()
            lines = [] if self._fresh else self._lines(segments)
            number = segments[-1].number + 1 if segments else 0
            with shield():
                # Refused: somebody wrote after we read. That is read too, and the fence goes behind it.
                if self._bucket.create(_name(number), self._head(fresh=self._fresh and number > 0)):
                    self._next = number + 1
                    return lines

    def append(self, line: bytes) -> None:
        """Add a line as an object of its own."""
        if self._next is None:
            raise ValueError(f"{self.where()}: the journal is closed")
        number, self._next = self._next, None  # should this fail, nobody knows what the bucket holds
        with shield():
            # Spares a refusal where it is known already; what keeps a zombie out is `create`, whatever it believes.
            self._lease.check()
            if not self._bucket.create(_name(number), self._head() + line):
                raise LeaseError(
                    f"{self._bucket.where(_name(number))}: was written by another process, which has taken this "
                    "journal over since this one gave no sign of life: it goes on there, and ends here"
                )
            self._next = number + 1

    def write_file(self, name: str, data: bytes) -> None:
        """Write an object beside the journal."""
        # Asks the store: this object is overwritten, so no number would refuse a zombie's.
        self._lease.renew()
        self._bucket.write(name, data)

    def close(self) -> None:
        """Give the lease back."""
        self._next = None
        self._lease.release()

    def _segments(self) -> list[_Segment]:
        numbers = [int(found[1]) for found in map(_NAME.fullmatch, self._bucket.names(FOLDER)) if found]
        data = self._bucket.read_all([_name(number) for number in numbers])
        return [_parse(number, each) for number, each in zip(numbers, data, strict=True)]

    def _lines(self, segments: list[_Segment]) -> list[bytes]:
        """Of those that are not set aside, which must all be there and be ours."""
        start = max((n for n, segment in enumerate(segments) if segment.fresh), default=0)
        used = segments[start:]
        for number, segment in enumerate(used, used[0].number if used and used[0].fresh else 0):
            if segment.number != number or segment.fresh is None:
                what = "is no segment of a journal" if segment.number == number else "is missing"
                where = self._bucket.where(_name(number))
                raise JournalError(f"{where}: {what}: use another checkpoint.dir, or checkpoint.resume=never")
        self._names = [_name(segment.number) for segment in used for _ in segment.lines]
        return [line for segment in used for line in segment.lines]

    def _head(self, fresh: bool = False) -> bytes:
        head = {"segment": FORMAT, "epoch": self._lease.epoch, "holder": self._lease.holder}
        return json.dumps(head | ({"fresh": True} if fresh else {})).encode() + b"\n"


def scratch(url: str) -> Path:
    """A folder of this machine's for what belongs to a URL; may not exist yet."""
    return folders.cache_dir() / "checkpoint" / hashlib.sha256(url.encode()).hexdigest()[:16]


def _parse(number: int, data: bytes) -> _Segment:
    head, *lines = data.split(b"\n")
    try:
        said = from_json(head)
        known = said["segment"] == FORMAT and lines.pop() == b""
        return _Segment(number, bool(said.get("fresh")) if known else None, lines)
    except (ValueError, LookupError, TypeError, AttributeError):
        return _Segment(number, None, [])


def _name(number: int) -> str:
    return f"{FOLDER}/{number:08d}.jsonl"
