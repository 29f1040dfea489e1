"""What Prometheus is told. A registry of its own: two gateways in one process do not add up."""

import asyncio
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from selfspec.engine.base import Load

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Counted(Collector):
    """A histogram, by back end, that takes any number of equal observations at once: the library's takes one."""

    def __init__(self, name: str, words: str, registry: CollectorRegistry, buckets: tuple[float, ...]) -> None:
        self._name, self._words, self._bounds = name, words, (*buckets, float("inf"))
        self._counts: defaultdict[str, list[int]] = defaultdict(lambda: [0] * len(self._bounds))
        self._sums: defaultdict[str, float] = defaultdict(float)
        registry.register(self)

    def observe(self, backend: str, value: float, count: int) -> None:
        """``count`` times the same."""
        self._counts[backend][bisect_left(self._bounds, value)] += count
        self._sums[backend] += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Called by the registry."""
        family = HistogramMetricFamily(self._name, self._words, labels=("backend",))
        for backend, counts in self._counts.items():
            upto = zip(map(floatToGoString, self._bounds), accumulate(counts), strict=True)
            family.add_metric((backend,), list(upto), self._sums[backend])
        yield family


def _tasks() -> int:
    """Of the loop that asks; none, where none does."""
    with suppress(RuntimeError):
        return len(asyncio.all_tasks())
    return 0


class Metrics:
    """All of them, by the names that the dashboard reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        by, of = ("backend",), self.registry
        self.request = Histogram("selfspec_request_seconds", "Arrival to last token", by, registry=of, buckets=_SECONDS)
        self.ttft = Histogram("selfspec_ttft_seconds", "Arrival to first token", by, registry=of, buckets=_SECONDS)
        self.inter_token = Counted(
            "selfspec_inter_token_seconds", "From chunk to chunk, for each of its tokens", of, _TOKEN_SECONDS
        )
        self.queue = Histogram("selfspec_queue_seconds", "Arrival to admission", registry=of, buckets=_SECONDS)
        self.proposed = Counter("selfspec_proposed_tokens", "Tokens drafted", ("draft",), registry=of)
        self.accepted = Counter("selfspec_accepted_tokens", "Drafted tokens that stood", ("draft",), registry=of)
        self.generated = Counter("selfspec_generated_tokens", "Tokens answered", by, registry=of)
        self.cache_lookups = Counter("selfspec_cache_lookups", "For an answer to give again", ("result",), registry=of)
        self.routes = Counter("selfspec_routes", "Choices of a back end", ("policy", "backend", "reason"), registry=of)
        self.errors = Counter("selfspec_errors", "Requests not answered", ("kind",), registry=of)
        self._loads: list[Callable[[], Load]] = []
        rows = Gauge("selfspec_batch_rows", "Requests being decoded", registry=of)
        waiting = Gauge("selfspec_waiting_requests", "Requests not yet admitted", registry=of)
        kv_used = Gauge("selfspec_kv_used_ratio", "Key-value slots that hold tokens", registry=of)
        tasks = Gauge("selfspec_tasks", "Of the event loop: what grows where something is never let go", registry=of)
        tasks.set_function(_tasks)
        rows.set_function(lambda: sum(load().rows for load in self._loads))
        waiting.set_function(lambda: sum(load().waiting for load in self._loads))
        kv_used.set_function(lambda: max((load().kv_used for load in self._loads), default=0.0))

    def watch(self, load: Callable[[], Load]) -> None:
        """Reads the gauges from there whenever they are asked for; of several sessions, their sum or the fullest."""
        self._loads.append(load)

    def exposition(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)
