"""Continuous batching: requests join as rows become free, advance by what each accepts, and leave when done.

What a row is and how it is decoded, an engine says (:class:`Batching` is the base of its session). A step is what
happens between two looks at the queue: prompts are prefilled, or there is a cycle. So first tokens are out before the
next cycle, and nobody who is being decoded waits for more prompts than the order of admission allows.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from selfspec.engine.admission import Admission, Waiting
from selfspec.engine.base import Load, RequestOutput, Session, check_room
from selfspec.types import Completion, Cycle, Logprob, Request


class Decoded(Protocol):
    """What an engine's row must say of itself; times in seconds of the session's clock."""

    request: Request
    arrival: float
    admitted: float
    first_token: float
    cycles: list[Cycle]
    logprobs: list[Logprob]

    def output_tokens(self, start: int) -> Sequence[int]:
        """Its new tokens from number ``start`` on."""
        ...


R = TypeVar("R", bound=Decoded)


@dataclass(slots=True)
class Member(Generic[R]):
    """A row of the batch, and how many of its tokens have been reported."""

    number: int
    row: R
    reported: int = 0


@dataclass(slots=True)
class Prefilling(Generic[R]):
    """A prompt that is prefilled in chunks; it has no row of the batch yet."""

    number: int
    row: R
    done: int = 0


class Batching(Session, ABC, Generic[R]):
    """A :class:`~selfspec.engine.base.Session`; row r of the batch is its member r."""

    def __init__(self, capacity: int, positions: int, admission: Admission) -> None:
        """Up to ``capacity`` requests at once, each of up to ``positions`` tokens, prompt and answer."""
        self.capacity, self.positions, self.admission = capacity, positions, admission
        self.waiting: list[Waiting] = []
        self.members: list[Member[R]] = []
        self.prefilling: Prefilling[R] | None = None
        self._submitted = 0
        self._prefilled = False

    @abstractmethod
    def _now(self) -> float:
        """The clock, in seconds."""

    @abstractmethod
    def _start(self, request: Request, arrival: float) -> R:
        """A row for a request, of which nothing has been read."""

    @abstractmethod
    def _prefill_rest(self, row: R, done: int) -> None:
        """Reads a prompt from token ``done`` on into the batch's next row, and gives its first token."""

    @abstractmethod
    def _prefill_part(self, row: R, done: int, count: int) -> None:
        """Reads ``count`` tokens of a prompt from token ``done`` on, aside; some remain for :meth:`_prefill_rest`."""

    @abstractmethod
    def _cycle(self, rows: Sequence[R]) -> None:
        """Drafts, verifies and accepts, once for every row."""

    @abstractmethod
    def _evict(self, index: int) -> None:
        """Frees a row; the last one takes its place."""

    @abstractmethod
    def _finish_reason(self, row: R) -> Literal["stop", "length"] | None:
        """How it ended, if it did."""

    @abstractmethod
    def _kv_used(self) -> float:
        """The share of slots that hold tokens."""

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or being decoded."""
        return bool(self.waiting or self.members or self.prefilling)

    @property
    def load(self) -> Load:
        """How full it is; may be asked for by any thread."""
        return Load(len(self.waiting) + (self.prefilling is not None), len(self.members), self._kv_used())

    def submit(self, request: Request) -> int:
        """See :meth:`Session.submit <selfspec.engine.base.Session.submit>`."""
        check_room(request, self.positions)
        self.waiting.append(Waiting(self._submitted, request, self._now()))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, number: int) -> Completion | None:
        """Drops a request; its row is free at once. What it had come to, if it was being decoded."""
        self.waiting = [one for one in self.waiting if one.number != number]
        if self.prefilling is not None and self.prefilling.number == number:
            self.prefilling = None
        for index, member in enumerate(self.members):
            if member.number == number:
                return self._retire(index, "stop")
        return None

    def step(self) -> list[RequestOutput]:
        """Reads prompts where there is room, or runs a cycle, by turns: what is new."""
        # Before any are admitted: who joins now has a first token to report before the next cycle.
        decodes = bool(self.members)
        self._prefilled = not (self._prefilled and decodes) and self._admit()
        if decodes and not self._prefilled:
            began, rows = self._now(), [member.row for member in self.members]
            self._cycle(rows)
            new = sum(row.cycles[-1].new_tokens for row in rows)
            self.admission.observe_decode(new / len(rows), self._now() - began)
        return self._report()

    def _admit(self) -> bool:
        """Reads what may be read before the next cycle; whether anything was."""
        read = 0
        while len(self.members) < self.capacity:
            left = None if self.admission.chunk is None else self.admission.chunk - read
            if left == 0:
                break
            if self.prefilling is None:
                index = self.admission.choose(self.waiting, read, self._now()) if self.waiting else None
                if index is None:
                    break
                chosen = self.waiting.pop(index)
                self.prefilling = Prefilling(chosen.number, self._start(chosen.request, chosen.arrival))
            read += self._go_on(self.prefilling, left)
        return read > 0

    def _go_on(self, prefilling: Prefilling[R], most: int | None) -> int:
        """Reads up to ``most`` tokens of a prompt; how many."""
        began, left = self._now(), len(prefilling.row.request.tokens) - prefilling.done
        if most is None or left <= most:
            self._prefill_rest(prefilling.row, prefilling.done)
            self.members.append(Member(prefilling.number, prefilling.row))
            self.prefilling, count = None, left
        else:
            self._prefill_part(prefilling.row, prefilling.done, most)
            prefilling.done += most
            count = most
        self.admission.observe_prefill(count, self._now() - began)
        return count

    def _report(self) -> list[RequestOutput]:
        """What is new, by number; those that are done leave, last first."""
        reported = []
        # From the last on: who moves into a freed row has been reported already.
        for index in reversed(range(len(self.members))):
            member = self.members[index]
            tokens, finish = tuple(member.row.output_tokens(member.reported)), self._finish_reason(member.row)
            if tokens:
                logprobs = tuple(member.row.logprobs[member.reported :])
                member.reported += len(tokens)
                done = self._retire(index, finish) if finish else None
                reported.append(RequestOutput(member.number, tokens, done, logprobs))
        return sorted(reported, key=lambda progress: progress.number)

    def _retire(self, index: int, finish: Literal["stop", "length"]) -> Completion:
        row = self.members[index].row
        self._evict(index)
        # As `_evict` moves the last row: member r must stay row r.
        self.members[index] = self.members[-1]
        self.members.pop()
        return Completion(
            tokens=tuple(row.output_tokens(0)),
            cycles=tuple(row.cycles),
            ttft_s=row.first_token - row.arrival,
            total_s=self._now() - row.arrival,
            finish=finish,
            queue_s=row.admitted - row.arrival,
        )
