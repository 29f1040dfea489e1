"""What decoding spends its time on: torch's profiler over it, by part of a cycle, and memory meanwhile."""

import os
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, record_function

from selfspec.engine.base import Operator, Profile
from selfspec.files import storing
from selfspec.speculation import phases

PYTHON = "between operators"
"""What a part takes besides its operators: Python, launches and waiting."""
_SAMPLE_S = 0.005


def profiled(decode: Callable[[], object], device: torch.device, trace: Path) -> Profile:
    """Decodes under the profiler, and writes a Chrome trace, compressed, to ``trace`` (``*.json.gz``).

    Raises:
        StorageError: it cannot be written.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:  # else kernels of graphs that were captured before are not seen
        torch.profiler._utils._init_for_cuda_graphs()
    with (
        phases.marked(record_function),
        _sampled(device) as memory,
        torch.profiler.profile(activities=activities) as seen,
    ):
        decode()
    written = trace.with_name(f".{trace.name}")  # the profiler compresses what is named so
    with storing(trace.parent):
        seen.export_chrome_trace(str(written))
        written.replace(trace)
    return Profile(tuple(by_phase(seen.events())), tuple(memory))


def by_phase(events: Any) -> list[Operator]:
    """Each part's operators, by the time spent in them and in nothing that they call, the dearest first.

    An operator belongs to the part that had begun last when it began. On a GPU that is when a kernel runs, which may
    be after the host has gone on to the next part.
    """
    begins = sorted((event.time_range.start, event.name) for event in events if event.name in phases.PHASES)
    calls, host, device = Counter[tuple[str, str]](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for event in events:
        at = bisect_right(begins, (event.time_range.start, chr(0x10FFFF))) - 1
        key = (begins[at][1] if at >= 0 else "before", PYTHON if event.name in phases.PHASES else event.name)
        calls[key] += 1
        host[key] += event.self_cpu_time_total
        device[key] += event.self_device_time_total
    found = [Operator(*key, calls[key], round(host[key], 1), round(device[key], 1)) for key in calls]
    return sorted(found, key=lambda one: -max(one.host_us, one.device_us))


@contextmanager
def _sampled(device: torch.device) -> Iterator[list[tuple[float, ...]]]:
    """Samples of memory while it is open: milliseconds since then, and MiB resident, allocated, reserved."""
    samples, ended, began = list[tuple[float, ...]](), Event(), time.perf_counter()
    process = psutil.Process(os.getpid())

    def sample() -> None:
        sizes = (process.memory_info().rss, *_of_device(device))
        taken = [1e3 * (time.perf_counter() - began), *(size / 2**20 for size in sizes)]
        samples.append(tuple(round(value, 2) for value in taken))

    def watch() -> None:
        while not ended.wait(_SAMPLE_S):
            sample()

    sample()
    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
        sample()


def _of_device(device: torch.device) -> tuple[int, int]:
    """Bytes that tensors have on the device, and that torch's allocator has."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
    return 0, 0
