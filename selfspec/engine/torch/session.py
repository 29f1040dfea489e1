"""Continuous batching of the torch engine, over the rows of one key-value cache."""

import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from selfspec.engine import admission
from selfspec.engine.base import RequestOutput
from selfspec.engine.batching import Batching
from selfspec.model.cache import KVCache
from selfspec.serve.config import Order
from selfspec.speculation.decode import Speculation
from selfspec.speculation.sequence import Seq
from selfspec.types import Completion


class Scheduler(Batching):
    """As many requests at once as the cache has rows; row r of the batch is row r of the cache.

    A prompt that is prefilled in chunks lies in a cache of its own until it is whole: the batch's rows stand together.
    """

    def __init__(
        self,
        speculation: Speculation,
        cache: KVCache,
        order: Order = Order.fcfs,
        chunk: int = 64,
        positions: int | None = None,
    ) -> None:
        """``cache``: empty. ``positions``: the most of a request; ``None``: all that the cache has slots for."""
        most = cache.capacity + 1 if positions is None else positions  # the last token is never run
        super().__init__(cache.rows, most, admission.make(order, chunk))
        self.speculation, self.cache = speculation, cache
        self._aside: KVCache | None = None
        self._states: list[Tensor] = []

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """See :meth:`Batching.step <selfspec.engine.batching.Batching.step>`."""
        return super().step()

    @torch.inference_mode()
    def cancel(self, number: int) -> Completion | None:
        """See :meth:`Batching.cancel <selfspec.engine.batching.Batching.cancel>`."""
        return super().cancel(number)

    def _now(self) -> float:
        return time.perf_counter()

    def _start(self, seq: Seq) -> None:
        self.speculation.start(seq)

    def _prefill_part(self, seq: Seq, count: int) -> None:
        if self._aside is None:
            draft, model = self.speculation.draft, self.speculation.target.model
            self._aside = model.new_cache(self.cache.capacity, 1, draft.layers)
        if seq.prefilled == 0:
            if self._aside.lengths:  # of one that was cancelled
                self._aside.evict(0)
            self._aside.admit()
            self._states = []
        # Of every chunk: a draft observes all of the prompt's states at once, when its first token is known.
        self._states.append(self.speculation.prefill(seq, seq.prefilled, count, self._aside, 0))

    def _prefill_rest(self, seq: Seq) -> None:
        left = len(seq.request.tokens) - seq.prefilled
        if seq.prefilled:
            assert self._aside is not None, "the beginning lies there"
            self._prefill_part(seq, left)
            # Copied once, whole: a row of the batch would have to stay out of every cycle until then.
            index, states = self.cache.copy_from(self._aside), torch.cat(self._states)
            self._aside.evict(0)
            self._states = []
        else:
            index = self.cache.admit()
            states = self.speculation.prefill(seq, 0, left, self.cache, index)
        self.speculation.sample_first_token(seq, index, states, self.cache)

    def _cycle(self, rows: Sequence[Seq]) -> None:
        self.speculation.step(rows, self.cache)

    def _evict(self, index: int) -> None:
        self.cache.evict(index)

    def _finish_reason(self, seq: Seq) -> Literal["stop", "length"] | None:
        if seq.tokens[-1] in self.speculation.stop_tokens(seq.request):
            return "stop"
        return "length" if seq.remaining <= 0 else None

    def _kv_used(self) -> float:
        return sum(self.cache.lengths) / (self.cache.rows * self.cache.capacity)
