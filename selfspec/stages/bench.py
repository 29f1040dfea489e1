"""The bench stage: the configuration against plain decoding, prompt by prompt in the same process.

Each unit decodes one prompt both ways, in turn first, so that what drifts (clocks, neighbours) hits both;
the ratio is per prompt. An exact policy must give plain decoding's tokens: where one differs, the two
candidates are compared in float32, and what the dtype's rounding explains is a tie.
"""

import io
import time
from pathlib import Path
from typing import Literal

from selfspec import metrics, workload
from selfspec.checkpoint import Journal, Record
from selfspec.engine.base import Engine
from selfspec.plan import Plan
from selfspec.progress import progress
from selfspec.provenance import collect, write_atomic
from selfspec.stages import LazyEngine
from selfspec.stages.fit import head_path, ready
from selfspec.types import Completion, Cycle, Measurements, Prompt, Request

Verdict = Literal["yes", "ties", "no", "lossy", "reference"]


def run(engine: LazyEngine, plan: Plan, journal: Journal) -> Measurements:
    """Measures every unit that the journal does not have, and sums up all of them."""
    wanted = [(repeat, number) for repeat in range(plan.scale.repeats) for number in range(plan.scale.prompts)]
    missing = [unit for unit in wanted if journal.get("bench", _name(*unit)) is None]
    if missing:
        _measure(engine(), plan, journal, missing)
    return metrics.summarise([record.data for record in poolable(journal.records("bench"))], plan.seed)


def poolable(records: list[Record]) -> list[Record]:
    """Those of the hardware that most units ran on: timings of different hardware are never pooled."""
    places = [record.on for record in records]
    most = max(dict.fromkeys(places), key=places.count)
    return [record for record in records if record.on == most]


def notes(records: list[Record]) -> list[str]:
    """What the reader of the summary must know."""
    left_out = len(records) - len(poolable(records))
    return [f"{left_out} of {len(records)} units ran on other hardware and are left out"] if left_out else []


def verdict(records: list[Record], plan: Plan) -> Verdict:
    """``yes``, ``ties`` (differences that rounding explains), ``no``, ``lossy`` by design, or ``reference``."""
    if plan.draft.name == "none":
        return "reference"
    if not plan.exact:
        return "lossy"
    seen = {record.data["verdict"] for record in records}
    return "no" if "differs" in seen else "ties" if "tie" in seen else "yes"


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
        cycles = record.data["configured"]["cycles"]
        for name in names:
            columns[name] += cycles[name]
        columns["unit"] += [record.unit] * len(cycles["k_asked"])
        columns["prompt"] += [record.data["prompt"]] * len(cycles["k_asked"])
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())


def _measure(engine: Engine, plan: Plan, journal: Journal, missing: list[tuple[int, int]]) -> None:
    if plan.draft.fitted:
        ready(lambda: engine, plan)  # a job may be resumed after its head was deleted
        engine.use_head(head_path(plan))
    encode = lambda text: engine.encode(text, plan.workload.chat)  # noqa: E731
    prompts = workload.select(plan.workload, "bench", plan.scale.prompts, plan.seed, encode)
    for prompt in workload.select(plan.workload, "fit", plan.scale.warmup, plan.seed, encode):
        _unit(engine, plan, prompt, plain_first=True)
    provenance = collect(engine.describe())
    on = str(provenance["fingerprint"])
    total = plan.scale.repeats * plan.scale.prompts
    with progress("bench", total, total - len(missing)) as advance:
        for repeat, number in missing:
            data = _unit(engine, plan, prompts[number], plain_first=(repeat + number) % 2 == 0)
            journal.append("bench", _name(repeat, number), data | {"provenance": provenance}, on)
            advance()


def _unit(engine: Engine, plan: Plan, prompt: Prompt, plain_first: bool) -> dict[str, object]:
    """One prompt, both ways. The reference itself is decoded once."""
    request = Request(prompt.tokens, plan.workload.new_tokens, plan.workload.ignore_eos)
    wall, cpu = time.perf_counter(), time.process_time()
    if plan.draft.name == "none":
        plain = configured = engine.generate(request, plain=True)
    elif plain_first:
        plain = engine.generate(request, plain=True)
        configured = engine.generate(request)
    else:
        configured = engine.generate(request)
        plain = engine.generate(request, plain=True)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    data: dict[str, object] = {
        "prompt": prompt.id,
        "prompt_tokens": len(prompt.tokens),
        "plain": metrics.pack(plain),
        "configured": metrics.pack(configured),
        "cpu_utilisation": cpu / wall,
        "device_utilisation": engine.device_utilisation(),
        "peak_memory_mb": engine.peak_memory_mb(),
    }
    return data | _compared(engine, plan, prompt, plain, configured)


def _compared(
    engine: Engine, plan: Plan, prompt: Prompt, plain: Completion, configured: Completion
) -> dict[str, object]:
    """The verdict on a unit: ``equal``, ``tie`` or ``differs``, and where and how far apart."""
    at = metrics.first_difference(plain.tokens, configured.tokens)
    if at is None:
        return {"verdict": "equal"}
    stopped_early = at == min(len(plain.tokens), len(configured.tokens))
    if stopped_early or not plan.exact:  # no second token to compare with, or nothing to excuse
        return {"verdict": "differs", "differs_at": at}
    tie = engine.compare((*prompt.tokens, *plain.tokens[:at]), plain.tokens[at], configured.tokens[at])
    verdict = "tie" if tie.explains else "differs"
    return {"verdict": verdict, "differs_at": at, "gap": tie.gap, "rounding": tie.rounding}


def _name(repeat: int, number: int) -> str:
    return f"prompt-{number:04d}/repeat-{repeat}"
