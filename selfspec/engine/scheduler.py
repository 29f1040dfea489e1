"""Continuous batching: requests join as rows become free, advance by what each accepts, and leave when done."""

import time
from collections import deque
from collections.abc import Sequence

from selfspec.engine.cache import KVCache
from selfspec.engine.decode import Speculation
from selfspec.engine.draft.base import Row
from selfspec.types import Completion, Request


class Scheduler:
    """First come, first served, over the rows of one cache."""

    def __init__(self, speculation: Speculation, cache: KVCache) -> None:
        """``cache``: empty; as many requests are decoded at once as it has rows."""
        self.speculation, self.cache = speculation, cache
        self.waiting: deque[tuple[int, Request, float]] = deque()
        self.rows: list[tuple[int, Row]] = []
        self._submitted = 0

    def submit(self, request: Request) -> int:
        """Puts a request in the queue: its number."""
        self.waiting.append((self._submitted, request, time.perf_counter()))
        self._submitted += 1
        return self._submitted - 1

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or being decoded."""
        return bool(self.waiting or self.rows)

    def step(self) -> list[tuple[int, Completion]]:
        """Admits what there is room for, runs one cycle; those that are done, by number."""
        while self.waiting and len(self.rows) < self.cache.rows:
            number, request, arrival = self.waiting.popleft()
            self.rows.append((number, self.speculation.begin(request, self.cache, arrival)))
        done = self._leave()
        if self.rows:
            self.speculation.step([row for _, row in self.rows], self.cache)
            done += self._leave()
        return done

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """Decodes all of them, in the order given."""
        numbers = [self.submit(request) for request in requests]
        done: dict[int, Completion] = {}
        while self.busy:
            done |= self.step()
        return [done[number] for number in numbers]

    def _leave(self) -> list[tuple[int, Completion]]:
        """Evicts finished rows, last first: the last row takes the place of one that leaves, here and in the cache."""
        done = []
        for index in reversed(range(len(self.rows))):
            number, row = self.rows[index]
            if self.speculation.finished(row):
                done.append((number, self._completion(row)))
                self.cache.evict(index)
                self.rows[index] = self.rows[-1]
                self.rows.pop()
        return done

    def _completion(self, row: Row) -> Completion:
        stopped = row.tokens[-1] in self.speculation.stop_tokens(row.request)
        return Completion(
            tokens=tuple(row.new_tokens),
            cycles=tuple(row.cycles),
            ttft_s=row.first_token - row.arrival,
            total_s=time.perf_counter() - row.arrival,
            finish="stop" if stopped else "length",
        )
