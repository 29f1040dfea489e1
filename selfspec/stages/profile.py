"""The profile stage: what decoding spends its time on, operator by operator, by part of a cycle.

It decodes a prompt as configured under torch's profiler, which slows it down: its times say what is dear, the bench
says how fast. The trace opens in Perfetto (https://ui.perfetto.dev) and in ``chrome://tracing``.
"""

import csv
import io
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from selfspec import checkpoint
from selfspec.checkpoint import Journal
from selfspec.data import workload
from selfspec.engine import factory
from selfspec.engine.base import LazyEngine, Operator, Profiles
from selfspec.files import storing, write_atomic
from selfspec.fitting import install
from selfspec.progress import progress
from selfspec.provenance import collect
from selfspec.report import plots
from selfspec.speculation.phases import PHASES
from selfspec.stages.base import Stage, Unit, Units
from selfspec.stages.bench import request
from selfspec.types import Measurements, Request

DEAREST = 10
"""Operators of a part that are named, of those that take a hundredth of it."""
_MEMORY = ("ms", "resident_mb", "allocated_mb", "reserved_mb")


class Profile(Stage):
    """One unit: the operators, and memory over time. The trace lies in the checkpoint, beside heads."""

    name = "profile"

    def check(self) -> None:
        """Refuses engines that torch's profiler cannot look into."""
        factory.require(self.plan, Profiles, "stages=profile needs an engine that decodes in this process, by torch:")

    def units(self, engine: LazyEngine, journal: Journal) -> Units:
        """Decodes the first prompt of the bench, once to warm up, once to look at."""
        if not self.missing(["decode"], journal):
            return
        made, plan = engine(), self.plan
        assert isinstance(made, Profiles), "checked"
        install(made, plan)
        encode = partial(made.tokenizer.encode, chat=plan.workload.chat)
        with progress(self.name, 1, 0) as advance:
            (prompt,) = workload.select(plan.workload, "bench", 1, plan.seed, encode)
            asked: list[Request] = [request(plan, prompt)]
            made.generate(asked)
            kept: list[Any] = []
            self._store.make(self._trace, lambda path: kept.append(made.profile(asked, path)))
            found = kept[0] if kept else made.profile(asked, Path(self._store.fetch(self._trace)))
            provenance = collect(made.describe())
            yield Unit.measured("decode", {"operators": found.operators, "memory": found.memory}, provenance)
            advance()

    def measurements(self, journal: Journal) -> Measurements:
        """Each part's share of the time on the host, of its own and of its operators', and on the device."""
        operators = _operators(journal)
        found = {}
        for side in ("host_us", "device_us"):
            total = sum(getattr(one, side) for one in operators if one.phase in PHASES)
            for phase in PHASES if total else ():
                share = sum(getattr(one, side) for one in operators if one.phase == phase) / total
                found[f"{side.removesuffix('_us')}_share/{phase}"] = share
        return found

    def write(self, folder: Path, journal: Journal) -> None:
        """``trace.json.gz``, ``operators.csv``, ``memory.csv`` and ``memory.png``."""
        (record,) = journal.records(self.name)
        write_atomic(folder / "operators.csv", _table(Operator._fields, _operators(journal)))
        write_atomic(folder / "memory.csv", _table(_MEMORY, record.data["memory"]))
        write_atomic(folder / "memory.png", plots.memory(record.data["memory"], _MEMORY[1:]))
        if self._store.size(self._trace) is not None:
            with storing(folder):
                shutil.copy(self._store.fetch(self._trace), folder / "trace.json.gz")

    def notes(self, journal: Journal) -> list[str]:
        """The dearest operators of every part."""
        operators = _operators(journal)
        return [_dearest(phase, [one for one in operators if one.phase == phase]) for phase in PHASES]

    @property
    def _store(self) -> checkpoint.Store:
        return checkpoint.at(self.plan.checkpoint.dir, self.plan.checkpoint.lease_s)

    @property
    def _trace(self) -> str:
        return f"profiles/{self.plan.id}.json.gz"


def _dearest(phase: str, operators: Sequence[Operator]) -> str:
    """In a line; on a device, by its time."""
    device = any(one.device_us for one in operators)
    took = [(one.device_us if device else one.host_us, one) for one in operators]
    total = sum(us for us, _ in took) or 1.0
    shares = (f"{one.name} ({one.calls} x) {us / total:.0%}" for us, one in took[:DEAREST] if us >= total / 100)
    return f"profile: {phase} {total / 1e3:.1f} ms on the {'device' if device else 'host'}: {', '.join(shares)}"


def _operators(journal: Journal) -> list[Operator]:
    return [Operator(*row) for record in journal.records("profile") for row in record.data["operators"]]


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue()
