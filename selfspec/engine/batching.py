"""Continuous batching: requests join as rows become free, advance by what each accepts, and leave when done.

How prompts are read and rows decoded, an engine says (:class:`Batching` is the base of its session). A step is what
happens between two looks at the queue: prompts are prefilled, or there is a cycle. So first tokens are out before the
next cycle, and nobody who is being decoded waits for more prompts than the order of admission allows.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from selfspec.engine.admission import Admission
from selfspec.engine.base import Load, RequestOutput, Session, check_room
from selfspec.speculation.sequence import Seq, Status
from selfspec.types import Completion, Request


class Batching(Session, ABC):
    """A :class:`~selfspec.engine.base.Session`; row r of the batch is ``running[r]``."""

    def __init__(self, capacity: int, positions: int, admission: Admission) -> None:
        """Up to ``capacity`` requests at once, each of up to ``positions`` tokens, prompt and answer."""
        self.capacity, self.positions, self.admission = capacity, positions, admission
        self.queue: list[Seq] = []
        """Those that have no row of the batch yet: they wait, or are the one that is prefilled in chunks."""
        self.running: list[Seq] = []
        self._submitted = 0
        self._prefilled = False

    @abstractmethod
    def _now(self) -> float:
        """The clock, in seconds."""

    @abstractmethod
    def _start(self, seq: Seq) -> None:
        """What there is to do before any of a prompt is read."""

    @abstractmethod
    def _prefill_rest(self, seq: Seq) -> None:
        """Reads what is left of a prompt into the batch's next row, and gives its first token."""

    @abstractmethod
    def _prefill_part(self, seq: Seq, count: int) -> None:
        """Reads the next ``count`` tokens of a prompt, aside; some remain for :meth:`_prefill_rest`."""

    @abstractmethod
    def _cycle(self, rows: Sequence[Seq]) -> None:
        """Drafts, verifies and accepts, once for every row."""

    @abstractmethod
    def _evict(self, index: int) -> None:
        """Frees a row; the last one takes its place."""

    @abstractmethod
    def _finish_reason(self, seq: Seq) -> Literal["stop", "length"] | None:
        """How it ended, if it did."""

    @abstractmethod
    def _kv_used(self) -> float:
        """The share of slots that hold tokens."""

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or being decoded."""
        return bool(self.queue or self.running)

    @property
    def load(self) -> Load:
        """How full it is; may be asked for by any thread."""
        return Load(len(self.queue), len(self.running), self._kv_used())

    def submit(self, request: Request) -> int:
        """See :meth:`Session.submit <selfspec.engine.base.Session.submit>`."""
        check_room(request, self.positions)
        self.queue.append(Seq(request, self._submitted, self._now()))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, number: int) -> Completion | None:
        """Drops a request; its row is free at once. What it had come to, if it was being decoded."""
        self.queue = [seq for seq in self.queue if seq.number != number]
        running = [seq.number for seq in self.running]
        return self._retire(running.index(number), "stop") if number in running else None

    def step(self) -> list[RequestOutput]:
        """Reads prompts where there is room, or runs a cycle, by turns: what is new."""
        # Before any are admitted: who joins now has a first token to report before the next cycle.
        decodes = bool(self.running)
        self._prefilled = not (self._prefilled and decodes) and self._admit()
        if decodes and not self._prefilled:
            began, rows = self._now(), self.running
            self._cycle(rows)
            new = sum(seq.cycles[-1].new_tokens for seq in rows)
            self.admission.observe_decode(new / len(rows), self._now() - began)
        return self._report()

    def _admit(self) -> bool:
        """Reads what may be read before the next cycle; whether anything was."""
        read = 0
        while self.queue and len(self.running) < self.capacity:
            left = None if self.admission.chunk is None else self.admission.chunk - read
            seq = self._next(read) if left != 0 else None
            if seq is None:
                break
            read += self._prefill(seq, left)
        return read > 0

    def _next(self, read: int) -> Seq | None:
        """The one that is being prefilled, else whom the order of admission chooses of those that wait."""
        seq = next((seq for seq in self.queue if seq.status is Status.prefilling), None)
        if seq is None and (index := self.admission.choose(self.queue, read, self._now())) is not None:
            seq = self.queue[index]
            seq.status, seq.admitted = Status.prefilling, self._now()
            self._start(seq)
        return seq

    def _prefill(self, seq: Seq, most: int | None) -> int:
        """Reads up to ``most`` tokens of a prompt; how many."""
        began, left = self._now(), len(seq.request.tokens) - seq.prefilled
        if most is None or left <= most:
            self._prefill_rest(seq)
            self.queue.remove(seq)
            self.running.append(seq)
            seq.status, count = Status.running, left
        else:
            self._prefill_part(seq, most)
            count = most
        seq.prefilled += count
        self.admission.observe_prefill(count, self._now() - began)
        return count

    def _report(self) -> list[RequestOutput]:
        """What is new, by number; those that are done leave, last first."""
        reported = []
        # From the last on: who moves into a freed row has been reported already.
        for index in reversed(range(len(self.running))):
            seq = self.running[index]
            tokens, finish = tuple(seq.output_tokens(seq.reported)), self._finish_reason(seq)
            if tokens:
                logprobs = tuple(seq.logprobs[seq.reported :])
                seq.reported += len(tokens)
                done = self._retire(index, finish) if finish else None
                reported.append(RequestOutput(seq.number, tokens, done, logprobs))
        return sorted(reported, key=lambda progress: progress.number)

    def _retire(self, index: int, finish: Literal["stop", "length"]) -> Completion:
        seq = self.running[index]
        self._evict(index)
        # As `_evict` moves the last row: running[r] must stay row r.
        self.running[index] = self.running[-1]
        self.running.pop()
        return seq.finish(finish, self._now())
