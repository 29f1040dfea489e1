"""The bench stage: the configuration against plain decoding, prompt by prompt in the same process.

Each unit decodes its prompts both ways, in turn first, so that what drifts (clocks, neighbours) hits both;
the ratio is per unit. The references of ``bench.baselines`` (and, where the controller adapts, every fixed K of
``bench.fixed_k``) are decoded in the same turn. An exact policy must give plain decoding's tokens: where one
differs, the two candidates are compared in float32, and what the dtype's rounding explains is a tie.

Of conversations that are asked turn by turn, every way is asked the same: after plain decoding's answers to the turns
before, which are in the journal. Each turn is a unit of its own.
"""

import io
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal

from selfspec import costs, export, metrics, sense
from selfspec.checkpoint import Journal, Record
from selfspec.data import parts, workload
from selfspec.engine import factory
from selfspec.engine.base import Engine, LazyEngine, TieJudge, Tokenizer
from selfspec.errors import StageError
from selfspec.files import csv_text, write_atomic
from selfspec.fitting import install
from selfspec.plan import Plan
from selfspec.progress import progress
from selfspec.provenance import collect
from selfspec.stages.base import Stage, Unit, Units
from selfspec.types import GREEDY, Completion, Cycle, Measurements, Prompt, Request

Verdict = Literal["yes", "ties", "no", "sampled", "lossy", "reference"]
Way = Callable[[list[Request]], list[Completion]]


class Bench(Stage):
    """A unit is as many prompts as are decoded at once, in one repeat and at one turn."""

    name = "bench"

    def units(self, engine: LazyEngine, journal: Journal) -> Units:
        """Measures what is missing; what was learned by the last unit of an earlier run is taken up first.

        Raises:
            StageError: what came of a unit cannot be.
        """
        scale, size = self.plan.scale, self.plan.engine.max_batch
        chunks = parts.chunks(self.plan.workload, scale.prompts, size)
        each = product(range(scale.repeats), range(len(chunks)), range(self.plan.workload.turns))
        wanted = {_name(*numbers): numbers for numbers in each}
        missing = self.missing(wanted, journal)
        if not missing:
            return
        made = engine()
        prompts, ways = self._prepare(made, journal)
        provenance = collect(made.describe())
        with progress(self.name, len(wanted), len(wanted) - len(missing)) as advance:
            for unit in missing:
                repeat, n, turn = wanted[unit]
                asked = self._asked(made.tokenizer, prompts[chunks[n]], journal, repeat, n, turn)
                data = _unit(made, self.plan, ways, asked, repeat + n + turn)
                if (wrong := sense.impossible(data)) is not None:
                    raise StageError(f"what was measured makes no sense: {wrong}")
                yield Unit.measured(unit, data, provenance)
                advance()

    def _prepare(self, engine: Engine, journal: Journal) -> tuple[list[Prompt], dict[str, Way]]:
        """The prompts and the ways to decode them, warmed up."""
        plan = self.plan
        install(engine, plan)  # a job may be resumed after its head was deleted
        encode = partial(engine.tokenizer.encode, chat=plan.workload.chat)
        prompts = parts.select(plan.workload, plan.scale.prompts, plan.seed, encode)
        ways = _ways(engine, plan)
        for prompt in workload.select(plan.workload, "fit", plan.scale.warmup, plan.seed, encode):
            _unit(engine, plan, ways, [prompt], 0)
        if records := journal.records(self.name):
            with journal.reading():
                engine.restore(records[-1].data["state"])
        return prompts, ways

    def _asked(
        self, tokenizer: Tokenizer, prompts: Sequence[Prompt], journal: Journal, repeat: int, n: int, turn: int
    ) -> Sequence[Prompt]:
        """What a turn asks: the conversation so far, by the model's chat template.

        Raises:
            StageError: the template refuses it.
        """
        if not turn:
            return prompts
        before = [record for t in range(turn) if (record := journal.get(self.name, _name(repeat, n, t)))]
        answers = zip(*([answer["tokens"] for answer in record.data["plain"]] for record in before), strict=True)
        try:
            return [
                replace(prompt, tokens=tuple(tokenizer.encode_chat(_messages(prompt, [*map(tokenizer.decode, said)]))))
                for prompt, said in zip(prompts, answers, strict=True)
            ]
        except ValueError as error:
            asked = f"workload.turns={self.plan.workload.turns}"
            raise StageError(f"{asked}: the model's chat template refuses turn {turn + 1}: {error}") from error

    def measurements(self, journal: Journal) -> Measurements:
        """Speed, latency and acceptance, with intervals; also of every part by itself."""
        units = [record.data for record in poolable(journal.records(self.name))]
        by_part = metrics.by_part(parts.grouped(self.plan.workload, units), self.plan.seed)
        return metrics.summarise(units, self.plan.seed) | by_part | costs.measured(units)

    def per_unit(self, data: dict[str, Any]) -> Measurements:
        """Its speedup, and what gave it."""
        return metrics.per_unit(data)

    def notes(self, journal: Journal) -> list[str]:
        """What is left out of the summary."""
        records = journal.records(self.name)
        pooled = poolable(records)
        left_out = len(records) - len(pooled)
        said = [f"{left_out} of {len(records)} units ran on other hardware and are left out"] if left_out else []
        if (turns := self.plan.workload.turns) > 1:
            said.append(f"{turns} turns of each conversation, asked after plain decoding's answers to those before")
        said += parts.notes(self.plan.workload, self.plan.scale.prompts)
        untimed = sum(metrics.speedup(record.data) is None for record in pooled)
        if untimed and self._drafts:
            said.append(f"{untimed} of {len(pooled)} units have no speed-up: no tokens after the first to time")
        return said

    def failures(self, journal: Journal) -> list[str]:
        """Numbers that make no sense, and an exact policy that changed tokens."""
        records = journal.records(self.name)
        if (senseless := self._senseless(records)) is not None:
            return [f"what was measured makes no sense: {senseless}"]
        if verdict(records, self.plan) != "no":
            return []
        differing = sum(v["verdict"] == "differs" for record in records for v in record.data["verdicts"])
        return [f"not lossless: {differing} prompts differ from plain decoding"]

    def facts(self, journal: Journal) -> dict[str, Any]:
        """The verdict, where it was measured, and acceptance by position."""
        records = journal.records(self.name)
        pooled = poolable(records)
        return {
            "lossless": None if self._senseless(records) else verdict(records, self.plan),
            "acceptance_by_position": metrics.acceptance_by_position([record.data for record in pooled]),
            "provenance": pooled[0].data["provenance"],
        }

    @property
    def _drafts(self) -> bool:
        return self.plan.draft.name != "none"

    def _senseless(self, records: list[Record]) -> str | None:
        return sense.senseless([record.data for record in records], self._drafts)

    def write(self, folder: Path, journal: Journal) -> None:
        """Every cycle, as ``cycles.parquet``; every unit, as ``units.csv``; and ``speculation_profile.json``."""
        records = journal.records(self.name)
        write_cycles(folder / "cycles.parquet", records)
        units = [record.data for record in poolable(records)]
        write_atomic(folder / "units.csv", csv_text(metrics.table(units)))
        write_atomic(folder / export.FILE, export.profile(self.plan, units))


def poolable(records: list[Record]) -> list[Record]:
    """Those of the hardware that most units ran on: timings of different hardware are never pooled."""
    places = [record.on for record in records]
    most = max(dict.fromkeys(places), key=places.count)
    return [record for record in records if record.on == most]


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
            compared(engine.ties, plan, prompt, one.tokens, other.tokens)
            for prompt, one, other in zip(prompts, plain, configured, strict=True)
        ],
        "state": engine.state(),
        "cpu_utilisation": cpu / wall,
        **engine.usage()._asdict(),
    }


def request(plan: Plan, prompt: Prompt) -> Request:
    """A prompt with the plan's limits; where tokens are drawn, with randomness of its own."""
    policy, sampling = plan.policy, GREEDY
    if policy.samples:
        seed = zlib.crc32(prompt.id.encode(), plan.seed)
        sampling = replace(policy.sampling, seed=seed)
    return Request(prompt.tokens, plan.workload.new_tokens, plan.workload.ignore_eos, sampling)


def compared(
    ties: TieJudge, plan: Plan, prompt: Prompt, plain: Sequence[int], configured: Sequence[int]
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
    tie = ties.compare((*prompt.tokens, *plain[:at]), plain[at], configured[at])
    verdict = "tie" if tie.explains else "differs"
    return {"verdict": verdict, "differs_at": at, "gap": tie.gap, "rounding": tie.rounding}


def _messages(prompt: Prompt, answers: Sequence[str]) -> list[dict[str, str]]:
    """A conversation up to the turn after these answers."""
    asked = [{"role": "user", "content": text} for text in prompt.turns]
    said = [{"role": "assistant", "content": text} for text in answers]
    return [*chain.from_iterable(zip(asked, said, strict=False)), asked[len(said)]]


def _name(repeat: int, number: int, turn: int) -> str:
    return f"unit-{number:04d}/repeat-{repeat}" + (f"/turn-{turn}" if turn else "")
