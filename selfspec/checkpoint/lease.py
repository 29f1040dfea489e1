"""One holder at a time of something in a bucket, wherever processes run.

Each holder has a numbered object of its own, its *epoch*, which only one process can create. It renews it by
overwriting it now and then. A waiter that finds the latest epoch released, or unrenewed for a full term, creates the
next one and holds the lease. So there is never a moment without a holder known to all, and nothing is asked of the
store but to create an object once.

Two processes can still *believe* that they hold it, for a while: one was stopped, or cut off, and does not know what
happened since. What must not be written twice is therefore kept apart by other means (``segments.py``).

A term is measured by the waiting process's own watch, from the last change it saw: clocks that differ between
machines do not shorten it. Only a lease whose time was over long ago by anybody's clock is taken at once.
"""

import json
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from selfspec.checkpoint.bucket import Bucket
from selfspec.errors import JournalError, LeaseError, StorageError
from selfspec.files import from_json
from selfspec.interrupt import shield

LEASE_S = 60.0
MOST_S = 86_400.0
"""The longest term that is waited for, in seconds, whatever a lease says."""
POLL_S = 5.0
"""How often one that is held is looked at, by who waits for it."""
SKEW_S = 60.0
"""By how much clocks are thought to differ at most, in seconds."""
_PATIENCE_S = 5.0
"""How long who gives one back waits for a sign of life that is under way."""


@dataclass(frozen=True)
class Clock:
    """What time it is; tests have another one."""

    now: Callable[[], float] = time.time
    elapsed: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass
class Lease:
    """See the module's docstring. Held from ``hold`` to ``release``, or within a ``with``.

    Attributes:
        bucket: where it lies.
        folder: of its objects there.
        term_s: seconds without a sign of life after which it is anybody's.
        epoch: the holder's number, from 1; 0 while it is not held.
        holder: a random word, new with each ``Lease``, by which the holder knows its own objects.
    """

    bucket: Bucket
    folder: str
    term_s: float = LEASE_S
    clock: Clock = field(default_factory=Clock)
    epoch: int = 0
    holder: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self._lost = False
        self._stop = threading.Event()
        self._renewing = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)

    def hold(self) -> None:
        """Wait until it is free, take it, and renew it from now on.

        Raises:
            StorageError: the bucket cannot be read or written.
        """
        try:
            self._hold()
        except BaseException:  # a signal that came while it was taken
            self.release()
            raise

    def _hold(self) -> None:
        seen: tuple[int, dict[str, Any]] | None = None
        since, said = 0.0, False
        while True:
            at, looked = self.clock.now(), self.clock.elapsed()  # our pause after a look is not their silence
            now = self._latest()
            if now != seen:
                # Read after the look, as `looked` is before it: silence is measured too short, never too long.
                seen, since = now, self.clock.elapsed()
            if self._free(now[1], at, looked - since):
                with shield():
                    # Else a signal between the object and `epoch` would leave a lease that nobody gives back.
                    if self._take(now[0] + 1):
                        return
                continue
            if not said:
                print(f"waiting for another process that holds {self.bucket.where(self.folder)}", file=sys.stderr)
                said = True
            self.clock.sleep(min(POLL_S, self.term_s / 10))

    def check(self) -> None:
        """Make sure that nobody has taken it since, as far as is known without asking.

        Raises:
            LeaseError: somebody has.
        """
        if self._lost:
            raise LeaseError(
                f"{self.bucket.where(self.folder)}: another process has taken this over, since this one gave no sign "
                f"of life for {self.term_s:g} s: it goes on there, and ends here"
            )

    def renew(self) -> None:
        """Give a sign of life, unless somebody has taken it.

        Raises:
            LeaseError: somebody has.
            StorageError: the bucket cannot be read or written.
        """
        epoch = self.epoch
        # Not atomic with the write below, and need not be: who takes over writes an object of its own.
        if self._newest() > epoch:
            self._lost = True
        self.check()
        self.bucket.write(self._name(epoch), self._says(self.clock.now() + self.term_s))

    def release(self) -> None:
        """Give it back, so that nobody need wait; does nothing if it is not held."""
        if not self.epoch:
            return
        with shield():
            self._stop.set()
            if self._renewing.ident is not None:
                self._renewing.join(_PATIENCE_S)
            # Before the write: a renewal that is still under way sees the 0, and gives back after us.
            epoch, self.epoch = self.epoch, 0
            if not self._lost:
                with suppress(StorageError):  # it runs out by itself
                    self.bucket.write(self._name(epoch), self._says(0.0))

    def __enter__(self) -> Self:
        self.hold()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _free(self, lease: dict[str, Any], at: float, silent_s: float) -> bool:
        until, term_s = float(lease["until"]), float(lease["term_s"])
        given_back = until == 0
        return given_back or at > until + SKEW_S or silent_s >= min(term_s, MOST_S)

    def _take(self, epoch: int) -> bool:
        if not self.bucket.create(self._name(epoch), self._says(self.clock.now() + self.term_s)):
            return False
        # Should the store write over it after all, what is left says given back: nobody waits for our refusal.
        self.bucket.check_exclusive(self._name(epoch), self._says(0.0))
        self.epoch = epoch
        self._renewing.start()
        return True

    def _renew_until_stopped(self) -> None:
        epoch = self.epoch
        # Four signs of life a term: one that fails or comes late does not cost the lease.
        while not self._stop.wait(self.term_s / 4):
            with suppress(StorageError):  # the next one may come through, and until then nobody else need take it
                try:
                    self.renew()
                except LeaseError:
                    return
                if not self.epoch:  # it was given back meanwhile, by who could not wait for us
                    self.bucket.write(self._name(epoch), self._says(0.0))

    def _newest(self) -> int:
        return max((int(name) for name in self.bucket.names(self.folder) if name.isdecimal()), default=0)

    def _latest(self) -> tuple[int, dict[str, Any]]:
        """The latest epoch, and what its holder says; one that is free, where there has been none."""
        epoch = self._newest()
        data = self.bucket.read(self._name(epoch)) if epoch else None
        if data is None:
            return epoch, {"until": 0.0, "term_s": 0.0}
        try:
            lease = from_json(data)
            until, term_s = float(lease["until"]), float(lease["term_s"])
            if not (until >= 0 and term_s >= 0):  # NaN is not: it would be waited for without end
                raise ValueError
            return epoch, {"until": until, "term_s": term_s, "holder": lease["holder"]}
        except (ValueError, LookupError, TypeError, OverflowError):
            where = self.bucket.where(self._name(epoch))
            raise JournalError(f"{where}: is no lease; delete it if nothing runs that uses it") from None

    def _name(self, epoch: int) -> str:
        return f"{self.folder}/{epoch:08d}"

    def _says(self, until: float) -> bytes:
        return json.dumps({"until": until, "term_s": self.term_s, "holder": self.holder}).encode()
