"""Sweeps whose processes are killed: what they leave, and what must hold of it.

Every call of an engine is put on record by the process that makes it (``witness/sitecustomize.py``), apart from the
journal: what the journal says is held against what was really run.
"""

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from selfspec.checkpoint import Journal, fit_place, plan_place
from selfspec.config import Resume

WITNESS = Path(__file__).with_name("witness")
TIMED = re.compile(
    r"tok_s|_ms|speedup|/ratio|utilisation|memory|solve_s|goodput|soak/(?!error|intervals|sentinels|users)"
)
"""Measurements that a clock has a part in; of a soak, all but who asked, what failed, and the sentinels."""
PLACES = {"answers": fit_place}
SHOWN = {"bench": "unit/tok_s", "quality": "quality/unit/reference_ppl", "soak": "interval/errors"}
"""What MLflow is told of each unit."""


class Call(NamedTuple):
    """Of an engine; ``at`` is when it began, in milliseconds since the epoch."""

    stage: str
    scope: str
    """Whose it is: the identity of a plan, or of the answers or the head that several plans share."""
    what: str
    pid: int
    at: int


@dataclass
class Sweep:
    """A sweep on a shared machine, and all that its launches leave in a folder of its own.

    Attributes:
        overrides: of the command line, less those that say where things go.
        checkpoint: ``checkpoint.dir``, unless it is to be in the folder.
        sleep: by how many seconds every call of an engine is slower.
        virtual: its engine's time is, so that of all that a clock has a part in only the CPU's use may differ.
    """

    folder: Path
    overrides: Sequence[str]
    checkpoint: str = ""
    sleep: float = 0.0
    virtual: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.checkpoint = self.checkpoint or str(self.folder / "checkpoint")
        self.uri = f"sqlite:///{self.folder / 'mlflow.db'}"
        self.hold, self.log = self.folder / "hold", self.folder / "said"

    def launch(self, hold_at: int = 1) -> "subprocess.Popen[bytes]":
        """The same command every time; what it says is kept.

        Args:
            hold_at: at which of its calls of an engine a process goes no further while the file ``hold`` is there.
        """
        places = [f"output_dir={self.folder / 'outputs'}", f"checkpoint.dir={self.checkpoint}"]
        places += [f"tracking.uri={self.uri}"] * ("tracking=mlflow" in self.overrides)
        path = f"{WITNESS}:{os.environ.get('PYTHONPATH', '')}"
        env = os.environ | {"PYTHONPATH": path, "ENGINE_CALLS": str(self.folder / "calls")}
        env |= {"ENGINE_HOLD": str(self.hold), "ENGINE_HOLD_AT": str(hold_at)}
        env |= {"ENGINE_SLEEP": str(self.sleep), "OMP_NUM_THREADS": "1", **self.environment}
        with self.log.open("ab") as said:
            argv = [sys.executable, "-m", "selfspec.run", "-m", *self.overrides, *places]
            return subprocess.Popen(argv, stdout=said, stderr=subprocess.STDOUT, env=env)

    def finish(self) -> "Sweep":
        """Launched once more, and left alone."""
        code = self.launch().wait()
        assert code == 0, f"exit code {code}:\n{self.said()}"
        return self

    def said(self) -> str:
        """By all launches."""
        return self.log.read_text()

    def calls(self) -> list[Call]:
        """Of engines, in the order they began."""
        record = self.folder / "calls"
        return [Call(**json.loads(line)) for line in record.read_text().splitlines()] if record.exists() else []

    def table(self) -> dict[str, dict[str, str]]:
        """The last launch's, by plan, less what was timed."""
        timed = re.compile("utilisation") if self.virtual else TIMED
        last = max(self.folder.rglob("sweep.json"), key=lambda path: path.parent.name)
        rows = csv.DictReader((last.parent / "summary.csv").read_text().splitlines())
        return {row["plan_id"]: {key: value for key, value in row.items() if not timed.search(key)} for row in rows}

    def finished(self, scopes: set[tuple[str, str]]) -> dict[tuple[str, str], list[tuple[str, int]]]:
        """Units and when they were finished, in that order, by the journals."""
        found = {}
        for stage, scope in scopes:
            place = PLACES.get(stage, plan_place)(self.checkpoint, scope)
            with Journal.open(place, scope, {}, Resume.require) as journal:
                records = [record for record in journal.records(stage) if not record.unit.startswith("locust-")]
                found[stage, scope] = [(record.unit, record.at) for record in records]
        return found

    def tracked(self) -> list[tuple[str, str, list[int]]]:
        """The jobs' runs of MLflow: name, status, and which units were logged, each as often as it was."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        known = client.get_experiment_by_name("selfspec")
        runs = client.search_runs([known.experiment_id])
        jobs = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
        assert len(runs) == len(jobs) + 1, "one run stands for the sweep, and nothing beside it"
        units = [
            sorted(m.step for key in SHOWN.values() for m in client.get_metric_history(run.info.run_id, key))
            for run in jobs
        ]
        return sorted((run.info.run_name, run.info.status, steps) for run, steps in zip(jobs, units, strict=True))


def violations(disturbed: Sweep, undisturbed: Sweep) -> list[str]:
    """What does not hold of a sweep that lost processes and was then finished, in words.

    Nothing is lost, nothing that was finished is run again, no two processes work at the same thing, each death costs
    at most the unit in hand, and the table is the same.
    """
    wanted, ran = _by_scope(undisturbed.calls()), _by_scope(disturbed.calls())
    found = [f"{scope}: ran in one sweep only" for scope in wanted.keys() ^ ran.keys()]
    journalled = {scope for scope in wanted if scope[0] != "fit"}
    planned, done = undisturbed.finished(journalled), disturbed.finished(journalled)
    for scope in wanted.keys() & ran.keys():
        ways = 1
        if scope in journalled:
            units = [unit for unit, _ in planned[scope]]
            ways = len(wanted[scope]) // len(units)  # calls of a unit; an undisturbed run makes them unit by unit
            unit_of = {call.what: units[at // ways] for at, call in enumerate(wanted[scope])}
            ended = dict(done[scope])
            found += [f"{scope} {unit}: lost, or added" for unit in ended.keys() ^ set(units)]
            late = [call for call in ran[scope] if call.at > ended.get(unit_of.get(call.what, ""), 0)]
            found += [f"{call}: began when that was finished" for call in late]
        times, once = (Counter(call.what for call in calls[scope]) for calls in (ran, wanted))
        found += [f"{scope} {what}: never ran" for what in once - times]
        workers = [pid for pid, _ in groupby(call.pid for call in ran[scope])]
        if len(set(workers)) < len(workers):
            found.append(f"{scope}: processes at once: {workers}")
        if (times - once).total() > ways * (len(workers) - 1):
            found.append(f"{scope}: more was run again than was in hand: {times - once}")
    if disturbed.table() != undisturbed.table():
        found.append(f"tables differ: {disturbed.table()} is not {undisturbed.table()}")
    return found


def _by_scope(calls: Sequence[Call]) -> dict[tuple[str, str], list[Call]]:
    scopes = defaultdict[tuple[str, str], list[Call]](list)
    for call in calls:
        scopes[call.stage, call.scope].append(call)
    return dict(scopes)
