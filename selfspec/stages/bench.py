"""The bench stage: the configuration against plain decoding, prompt by prompt in the same process.

Each unit decodes its prompts both ways, in turn first, so that what drifts (clocks, neighbours) hits both;
the ratio is per unit. The references of ``bench.baselines`` (and, where the controller adapts, every fixed K of
``bench.fixed_k``) are decoded in the same turn. An exact policy must give plain decoding's tokens: where one
differs, the two candidates are compared in float32, and what the dtype's rounding explains is a tie.
"""

import io
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from selfspec import metrics
from selfspec.checkpoint import Journal, Record
from selfspec.data import workload
from selfspec.engine import factory
from selfspec.engine.base import Engine, LazyEngine
from selfspec.files import write_atomic
from selfspec.fitting import head_path, ready
from selfspec.plan import Plan
from selfspec.progress import progress
from selfspec.provenance import collect
from selfspec.types import GREEDY, Completion, Cycle, Measurements, Prompt, Request

Verdict = Literal["yes", "ties", "no", "sampled", "lossy", "reference"]
Way = Callable[[list[Request]], list[Completion]]


def run(engine: LazyEngine, plan: Plan, journal: Journal) -> Measurements:
    """Measures every unit that the journal does not have, and sums up all of them."""
    units = range(-(-plan.scale.prompts // plan.engine.max_batch))
    wanted = [(repeat, number) for repeat in range(plan.scale.repeats) for number in units]
    missing = [unit for unit in wanted if journal.get("bench", _name(*unit)) is None]
    if missing:
        _measure(engine(), plan, journal, missing)
    return metrics.summarise([record.data for record in poolable(journal.records("bench"))], plan.seed)


def poolable(records: list[Record]) -> list[Record]:
    """Those of the hardware that most units ran on: timings of different hardware are never pooled."""
    places = [record.on for record in records]
    most = max(dict.fromkeys(places), key=places.count)
    return [record for record in records if record.on == most]


def notes(plan: Plan, journal: Journal) -> list[str]:
    """What the reader of the summary must know."""
    records = journal.records("bench")
    left_out = len(records) - len(poolable(records))
    return [f"{left_out} of {len(records)} units ran on other hardware and are left out"] if left_out else []


def failures(plan: Plan, journal: Journal) -> list[str]:
    """An exact policy that changed tokens."""
    records = journal.records("bench")
    if verdict(records, plan) != "no":
        return []
    differing = sum(v["verdict"] == "differs" for record in records for v in record.data["verdicts"])
    return [f"not lossless: {differing} prompts differ from plain decoding"]


def facts(plan: Plan, journal: Journal) -> dict[str, Any]:
    """The verdict, where it was measured, and acceptance by position."""
    records = journal.records("bench")
    pooled = poolable(records)
    return {
        "lossless": verdict(records, plan),
        "acceptance_by_position": metrics.acceptance_by_position([record.data for record in pooled]),
        "provenance": pooled[0].data["provenance"],
    }


def per_unit(data: dict[str, Any]) -> Measurements:
    """What a tracker is shown of a unit."""
    return metrics.per_unit(data)


def write(folder: Path, plan: Plan, journal: Journal) -> None:
    """Every cycle, as ``cycles.parquet``.

    Raises:
        StorageError: it cannot be written.
    """
    write_cycles(folder / "cycles.parquet", journal.records("bench"))


def verdict(records: list[Record], plan: Plan) -> Verdict:
    """``yes``, ``ties`` (differences that rounding explains), ``no``, ``lossy`` by design, or ``reference``.

    ``sampled``: tokens were drawn from the exact distribution, and are not those that plain decoding drew.
    """
    if plan.draft.name == "none":
        return "reference"
    if not plan.exact:
        return "lossy"
    seen = {verdict["verdict"] for record in records for verdict in record.data["verdicts"]}
    words: tuple[tuple[str, Verdict], ...] = (("differs", "no"), ("drawn", "sampled"), ("tie", "ties"))
    return next((word for kind, word in words if kind in seen), "yes")


def write_cycles(path: Path, records: list[Record]) -> None:
    """Every cycle of every unit as a row of a Parquet file, with the unit it belongs to.

    Raises:
        StorageError: it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [*Cycle.__slots__]
    columns: dict[str, list[object]] = {name: [] for name in ("unit", "prompt", *names)}
    for record in records:
        for prompt, completion in zip(record.data["prompts"], record.data["configured"], strict=True):
            cycles = completion["cycles"]
            for name in names:
                columns[name] += cycles[name]
            columns["unit"] += [record.unit] * len(cycles["k_asked"])
            columns["prompt"] += [prompt] * len(cycles["k_asked"])
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())


def _measure(engine: Engine, plan: Plan, journal: Journal, missing: list[tuple[int, int]]) -> None:
    if plan.draft.fitted:
        ready(lambda: engine, plan)  # a job may be resumed after its head was deleted
        engine.use_head(head_path(plan))
    encode = lambda text: engine.encode(text, plan.workload.chat)  # noqa: E731
    size = plan.engine.max_batch
    prompts = workload.select(plan.workload, "bench", plan.scale.prompts, plan.seed, encode)
    ways = _ways(engine, plan)
    for prompt in workload.select(plan.workload, "fit", plan.scale.warmup, plan.seed, encode):
        _unit(engine, plan, ways, [prompt], 0)
    learned = [record.data["state"] for record in journal.records("bench")]
    if learned:
        engine.restore(learned[-1])
    provenance = collect(engine.describe())
    on = str(provenance["fingerprint"])
    units = -(-len(prompts) // size)
    total = plan.scale.repeats * units
    with progress("bench", total, total - len(missing)) as advance:
        for repeat, number in missing:
            together = prompts[number * size : (number + 1) * size]
            data = _unit(engine, plan, ways, together, repeat + number)
            journal.append("bench", _name(repeat, number), data | {"provenance": provenance}, on)
            advance()


def _ways(engine: Engine, plan: Plan) -> dict[str, Way]:
    """How a unit's prompts are decoded, by name: plainly, as configured, and by every reference."""
    ways: dict[str, Way] = {"plain": partial(engine.generate, plain=True)}
    if plan.draft.name != "none":
        ways["configured"] = engine.generate
    for k in plan.fixed_ks:
        ways[f"K={k}"] = partial(engine.generate, k=k)
    for name in plan.bench.baselines:
        ways[name] = factory.reference(name, plan).generate
    return ways


def _unit(
    engine: Engine, plan: Plan, ways: Mapping[str, Way], prompts: Sequence[Prompt], turn: int
) -> dict[str, object]:
    """Some prompts, every way, another one first in each turn. The reference itself is decoded once."""
    requests = [request(plan, prompt) for prompt in prompts]
    order = [*ways][turn % len(ways) :] + [*ways][: turn % len(ways)]
    wall, cpu = time.perf_counter(), time.process_time()
    done = {name: ways[name](requests) for name in order}
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    plain = done.pop("plain")
    configured = done.pop("configured", plain)
    return {
        "prompts": [prompt.id for prompt in prompts],
        "prompt_tokens": [len(prompt.tokens) for prompt in prompts],
        "plain": [metrics.pack(completion) for completion in plain],
        "configured": [metrics.pack(completion) for completion in configured],
        "against": {name: [metrics.pack(completion) for completion in those] for name, those in done.items()},
        "verdicts": [
            compared(engine, plan, prompt, one.tokens, other.tokens)
            for prompt, one, other in zip(prompts, plain, configured, strict=True)
        ],
        "state": engine.state(),
        "cpu_utilisation": cpu / wall,
        "device_utilisation": engine.device_utilisation(),
        "peak_memory_mb": engine.peak_memory_mb(),
    }


def request(plan: Plan, prompt: Prompt) -> Request:
    """A prompt with the plan's limits; where tokens are drawn, with randomness of its own."""
    policy, sampling = plan.policy, GREEDY
    if policy.samples:
        seed = zlib.crc32(prompt.id.encode(), plan.seed)
        sampling = replace(policy.sampling, seed=seed)
    return Request(prompt.tokens, plan.workload.new_tokens, plan.workload.ignore_eos, sampling)


def compared(
    engine: Engine, plan: Plan, prompt: Prompt, plain: Sequence[int], configured: Sequence[int]
) -> dict[str, object]:
    """The verdict on a prompt: ``equal``, ``tie``, ``drawn`` or ``differs``, and where and how far apart."""
    at = metrics.first_difference(plain, configured)
    if at is None:
        return {"verdict": "equal"}
    if plan.policy.samples and plan.exact:
        return {"verdict": "drawn", "differs_at": at}
    stopped_early = at == min(len(plain), len(configured))
    if stopped_early or not plan.exact:  # no second token to compare with, or nothing to excuse
        return {"verdict": "differs", "differs_at": at}
    tie = engine.compare((*prompt.tokens, *plain[:at]), plain[at], configured[at])
    verdict = "tie" if tie.explains else "differs"
    return {"verdict": verdict, "differs_at": at, "gap": tie.gap, "rounding": tie.rounding}


def _name(repeat: int, number: int) -> str:
    return f"unit-{number:04d}/repeat-{repeat}"
