"""A job: what it leaves behind, and that no kill loses or repeats a unit. The fake engine's times are virtual."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
from plans import planned, run_job

from selfspec import job
from selfspec.checkpoint import FILE, Journal, Record
from selfspec.config import Resume
from selfspec.engine import factory
from selfspec.engine.fake.engine import FakeEngine
from selfspec.errors import Interrupted, JournalError
from selfspec.plan import Plan
from selfspec.report import results
from selfspec.report.results import Result
from selfspec.stages.base import Stage, Unit, Units
from selfspec.tracking import MLflowTracker
from selfspec.types import Completion, Request

pytestmark = pytest.mark.slow

SLOW = """
import itertools, os, signal, sys, time
from selfspec.engine.fake.engine import FakeEngine
from selfspec.run import main
from selfspec.tracking import MLflowTracker
generate, calls, most = FakeEngine.generate, itertools.count(), int(sys.argv.pop(1))
def slow(*args, **options):
    time.sleep(0.01 if next(calls) < most else 600)
    return generate(*args, **options)
FakeEngine.generate = slow
finish = MLflowTracker.finish
def interrupted(*args, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return finish(*args, **options)
MLflowTracker.finish = interrupted
main()
"""
"""The command line with an engine slow enough to be killed at work: after so many calls it waits for that.

Where it is interrupted, it is so again while it cleans up.
"""

Make = Callable[..., Plan]
MEASURED_ON_A_REAL_CLOCK = "bench/cpu_utilisation"


@pytest.fixture
def make(fake: list[str]) -> Make:
    """A plan of those and more overrides."""
    return partial(planned, *fake)


def elsewhere(made: Plan, folder: Path) -> Plan:
    """The same plan with a journal of its own."""
    return replace(made, checkpoint=replace(made.checkpoint, dir=str(folder)))


@pytest.mark.parametrize(
    "change",
    [
        {"plain": 3},
        {"configured": [{"tokens": ["a"], "cycles": {}}]},
        {"state": {"gate": [[[]]], "controller": 3}, "verdicts": [3]},
        {"prompts": None},
        {"against": 3},
    ],
)
def test_units_that_no_stage_left_are_refused_in_one_line(make: Make, tmp_path: Path, change: dict[str, Any]) -> None:
    made = elsewhere(make(), tmp_path / "journal")
    run_job(made, tmp_path / "first")
    path = tmp_path / "journal" / "plans" / made.id / FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = max(n for n, line in enumerate(lines) if line.get("stage") == "bench")
    lines[last]["data"] |= change
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(JournalError, match=r"journal\.jsonl: holds units that are none of a stage's") as refused:
        run_job(made, tmp_path / "second")
    assert "\n" not in str(refused.value)


def units(made: Plan) -> list[Record]:
    """What is in the journal; opening it fails if a unit is there twice."""
    with Journal.open(job.place(made), made.id, {}, Resume.require) as journal:
        return journal.records("bench")


def wanted(made: Plan) -> set[str]:
    return {f"unit-{n:04d}/repeat-{r}" for n in range(made.scale.prompts) for r in range(made.scale.repeats)}


def timeless(result: Result) -> dict[str, Any]:
    """Less what a real clock measured, and less paths."""
    measured = {key: value for key, value in result["measurements"].items() if key != MEASURED_ON_A_REAL_CLOCK}
    return {**result, "measurements": measured, "settings": None, "provenance": None}


def counted(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[bool]:
    """Every call of the engine from now on, whether it is a plain one; the given one fails."""
    calls = list[bool]()
    generate = FakeEngine.generate

    def spy(self: FakeEngine, requests: list[Request], *, plain: bool = False) -> list[Completion]:
        calls.append(plain)
        if len(calls) == fail_at:
            raise RuntimeError("out of memory")
        return generate(self, requests, plain=plain)

    monkeypatch.setattr(FakeEngine, "generate", spy)
    return calls


def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(made: Plan) -> None:
        raise AssertionError("an engine is made")

    monkeypatch.setattr(factory, "make", refuse)


def test_what_a_job_leaves_behind(make: Make, tmp_path: Path) -> None:
    made = make("scale.repeats=2")
    result = run_job(made, tmp_path)
    records = units(made)
    cycles = [c["cycles"] for record in records for c in record.data["configured"]]
    proposed, accepted = (sum(sum(c[name]) for c in cycles) for name in ("proposed", "accepted"))
    measured = result["measurements"]

    assert {record.unit for record in records} == wanted(made)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (result["plan_id"], result["status"], result["lossless"], result["notes"]) == (
        made.id,
        "finished",
        "yes",
        [],
    )
    assert measured["bench/acceptance"] == accepted / proposed
    assert (measured["bench/units"], measured["bench/prompts"]) == (len(records), made.scale.prompts)
    assert measured["bench/new_tokens"] == 12 * len(records) and measured["bench/plain_tok_s"] == pytest.approx(100)
    assert result["provenance"] == records[0].data["provenance"]

    table = pq.read_table(tmp_path / "cycles.parquet").to_pydict()
    assert table["accepted"] == [n for c in cycles for n in c["accepted"]]
    assert set(table["unit"]) == wanted(made) and set(table["prompt"]) == {
        prompt for r in records for prompt in r.data["prompts"]
    }
    (row,) = csv.DictReader((tmp_path / "summary.csv").read_text().splitlines())
    assert (row["plan_id"], float(row["bench/speedup"])) == (made.id, measured["bench/speedup"])
    rates = [line.split("\t")[2] for line in (tmp_path / "accept.tsv").read_text().splitlines()[1:]]
    assert [float(rate) for rate in rates] == result["acceptance_by_position"] and len(rates) == made.controller.K
    assert "| layerskip3 K=4 |" in (tmp_path / "report.txt").read_text()
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("tok_s", "acceptance"))


def test_a_finished_job_answers_from_its_journal(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_job(make(), tmp_path / "first")
    no_engine(monkeypatch)
    again = make("name=other", "checkpoint.resume=require")
    assert timeless(run_job(again, tmp_path / "again")) == {**timeless(first), "name": "other"}
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(
        p.name for p in (tmp_path / "first").iterdir()
    )


def test_resume_never_starts_afresh(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_job(make(), tmp_path)
    kept = (Path(job.place(make())) / FILE).read_bytes()
    calls = counted(monkeypatch)
    assert timeless(run_job(make("checkpoint.resume=never"), tmp_path)) == timeless(first)
    assert len(calls) == 2 * (3 + 1)  # units and warm-up, both ways
    assert (Path(job.place(make())) / "journal.1.jsonl").read_bytes() == kept


def test_resume_require_insists(make: Make, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="there is no journal"):
        run_job(make("checkpoint.resume=require"), tmp_path)
    assert not Path(job.place(make())).exists() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("done", range(4))
def test_only_what_is_missing_is_run(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    made = make("scale.warmup=0", "scale.prompts=4")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        counted(patch, fail_at=2 * done + 2)
        run_job(made, tmp_path)
    assert len(units(made)) == done and not (tmp_path / "result.json").exists()
    calls = counted(monkeypatch)
    resumed = run_job(made, tmp_path)
    assert calls == [True, False, False, True][2 * (done % 2) :] + [True, False, False, True] * ((3 - done) // 2)
    assert timeless(resumed) == timeless(run_job(elsewhere(made, tmp_path / "b"), tmp_path / "undisturbed"))


def slow(units: int, *overrides: str) -> "subprocess.Popen[str]":
    """Gets no further than so many units, each of a plain answer and a drafted one."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(2 * units), *overrides],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(made: Plan, process: "subprocess.Popen[str]", lines: int) -> None:
    """Until the journal has so many lines, or its process has ended."""
    path = Path(job.place(made)) / FILE
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)


def test_killed_again_and_again_nothing_is_lost_or_done_twice(fake: list[str], make: Make, tmp_path: Path) -> None:
    more = ("scale.prompts=60", "scale.warmup=0")
    made, rng, seen = make(*more), random.Random(0), list[Record]()
    for target in (1, 12, 30):  # the header, then the units
        with slow(target - len(seen) + 8, *fake, *more) as process:
            wait_for(made, process, target)
            time.sleep(rng.random() * 0.05)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        now = units(made) if target > 1 else []
        assert now[: len(seen)] == seen, "a finished unit stays as it was"
        seen = now
    assert 29 <= len(seen) < 60
    resumed = run_job(made, tmp_path / "resumed")
    assert units(made)[: len(seen)] == seen and {unit.unit for unit in units(made)} == wanted(made)
    assert timeless(resumed) == timeless(run_job(elsewhere(made, tmp_path / "b"), tmp_path / "undisturbed"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_and_resumed_in_one_tracker_run(
    fake: list[str], make: Make, uri: str, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    experiment = f"interrupted by {signum.name}"
    work = ("scale.prompts=40", "scale.warmup=0")
    more = (*work, "tracking=mlflow", f"tracking.uri={uri}", f"tracking.experiment='{experiment}'")
    made = make(*more)
    with slow(13, *fake, *more) as process:
        wait_for(made, process, 5)
        process.send_signal(signum)  # the one that follows must not break the clean-up
        out, err = process.communicate()
    assert (process.returncode, out) == (code, "")
    assert err == f"{signum.name}: finished work is kept; the same command carries on\n"
    (before,), done = runs(uri, experiment), len(units(made))
    assert before.info.status == "KILLED" and 3 <= done < 40

    resumed = run_job(made, tmp_path / "resumed")
    (after,) = runs(uri, experiment)
    assert (after.info.run_id, after.info.status) == (before.info.run_id, "FINISHED")
    assert after.data.tags["selfspec.lossless"] == "yes"
    steps = {key: [m.step for m in history(uri, after, key)] for key in after.data.metrics}
    assert sorted(steps["unit/tok_s"]) == list(range(40))
    assert all(len(set(found)) == len(found) for found in steps.values())
    assert set(resumed["measurements"]) <= set(steps)
    assert timeless(resumed) == timeless(run_job(elsewhere(make(*work), tmp_path / "b"), tmp_path / "undisturbed"))


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs(uri: str, experiment: str) -> list[Any]:
    found = client(uri).get_experiment_by_name(experiment)
    return list(client(uri).search_runs([found.experiment_id]))


def history(uri: str, tracked: Any, key: str) -> list[Any]:
    return list(client(uri).get_metric_history(tracked.info.run_id, key))


def test_interrupted_while_the_tracker_starts(
    make: Make, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("tracking=mlflow", f"tracking.uri={uri}", "tracking.experiment=early")
    start = MLflowTracker.start

    def interrupted(*args: Any) -> str | None:
        started = start(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        return started

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(MLflowTracker, "start", interrupted)
        run_job(made, tmp_path / "first")
    run_job(made, tmp_path / "again")
    assert [tracked.info.status for tracked in runs(uri, "early")] == ["FINISHED"]


@pytest.mark.parametrize("after", ["create_run", "log_batch", "start"])
def test_killed_before_the_tracker_run_is_noted(
    make: Make, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    from mlflow import MlflowClient

    made = make("tracking=mlflow", f"tracking.uri={uri}", f"tracking.experiment=unnoted-{after}")
    owner = MLflowTracker if after == "start" else MlflowClient
    method = getattr(owner, after)

    class Killed(BaseException):
        """What comes after it in this process does not count."""

    def killing(*args: Any, **options: Any) -> None:
        method(*args, **options)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, after, killing)
        patch.setattr(MLflowTracker, "finish", lambda *args: None)
        run_job(made, tmp_path / "first")
    run_job(made, tmp_path / "again")
    assert [tracked.info.status for tracked in runs(uri, f"unnoted-{after}")] == ["FINISHED"]


@pytest.mark.parametrize("method", ["start", "log", "artifacts", "finish"])
def test_a_tracker_that_fails_does_not_fail_the_job(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    def broken(*args: object) -> None:
        raise ConnectionError("the server is down")

    for name in ("start", "log", "set_tags", "artifacts", "finish"):
        monkeypatch.setattr(MLflowTracker, name, lambda *args: None)
    monkeypatch.setattr(MLflowTracker, method, broken)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    result = run_job(make("tracking=mlflow", "tracking.uri=null"), tmp_path)
    assert result["status"] == "finished" and len(units(make())) == 3
    warning = "warning: not tracking to http://127.0.0.1:9: ConnectionError: the server is down\n"
    assert capsys.readouterr().err == warning


def change_tokens(monkeypatch: pytest.MonkeyPatch, stop_early: bool) -> None:
    """An engine that is wrong in its last token, or ends before it."""
    generate = FakeEngine.generate

    def wrong(self: FakeEngine, requests: list[Request], *, plain: bool = False) -> list[Completion]:
        made = generate(self, requests, plain=plain)
        if plain:
            return made
        return [replace(c, tokens=c.tokens[:-1] if stop_early else (*c.tokens[:-1], c.tokens[-1] ^ 1)) for c in made]

    monkeypatch.setattr(FakeEngine, "generate", wrong)


@pytest.mark.parametrize("stop_early", [False, True])
def test_an_exact_policy_that_changes_tokens_fails(
    make: Make, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_early: bool
) -> None:
    made = make("tracking=mlflow", f"tracking.uri={uri}", f"tracking.experiment=lossy-{stop_early}")
    change_tokens(monkeypatch, stop_early)
    for folder in (tmp_path / "first", tmp_path / "again"):
        result = run_job(made, folder)
        assert (result["status"], result["lossless"], result["measurements"]["bench/differing"]) == ("failed", "no", 3)
        assert result["error"] == "not lossless: 3 prompts differ from plain decoding"
        assert json.loads((folder / "result.json").read_text()) == result
        (row,) = csv.DictReader((folder / "summary.csv").read_text().splitlines())
        assert (row["status"], row["lossless"]) == ("failed", "no")
        assert "| FAILED " in (folder / "report.txt").read_text()
        no_engine(monkeypatch)  # a rerun says the same from the journal
    (tracked,) = runs(uri, made.tracking.experiment)
    assert tracked.info.status == "FAILED" and tracked.data.metrics["bench/differing"] == 3


def test_what_is_lossy_by_design_does_not_fail(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_tokens(monkeypatch, stop_early=False)
    result = run_job(make("policy.verify=false"), tmp_path)
    assert result["lossless"] == "lossy" and "LOSSY" in (tmp_path / "report.txt").read_text()


def test_plain_decoding_is_its_own_reference(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    result = run_job(make("draft=none"), tmp_path)
    assert result["lossless"] == "reference" and calls == [True] * 4
    assert result["measurements"]["bench/speedup"] == 1


def test_a_failed_job_leaves_its_reason_and_what_it_measured(make: Make, tmp_path: Path) -> None:
    results.failed(make(), tmp_path, RuntimeError("out of\nmemory"), {})
    nothing = json.loads((tmp_path / "result.json").read_text())
    assert (nothing["status"], nothing["error"], nothing["measurements"]) == ("failed", "out of memory", {})
    result = run_job(make(), tmp_path)
    results.failed(make(), tmp_path, MemoryError(), {})
    failed = json.loads((tmp_path / "result.json").read_text())
    assert failed == {**result, "status": "failed", "error": "MemoryError"}


def test_a_plan_without_a_bench(make: Make, tmp_path: Path) -> None:
    result = run_job(make("stages=[fit]"), tmp_path)
    assert (result["measurements"], result["lossless"], result["status"]) == ({}, None, "finished")


def test_what_a_stage_may_say_for_itself(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = list[tuple[dict[str, float], int]]()

    class Rain(Stage):
        name = "soak"

        def units(self, engine: object, journal: Journal) -> Units:
            if self.missing(["0"], journal):
                yield Unit("0", {"errors": 2}, "here")
                assert journal.get("soak", "0") and logged[-1] == ({"soak/unit/errors": 2.0}, 0), "before it goes on"

        def measurements(self, journal: Journal) -> dict[str, float]:
            return {"errors": 2.0}

        def per_unit(self, data: dict[str, Any]) -> dict[str, float]:
            return {"soak/unit/errors": float(data["errors"])}

        def write(self, folder: Path, journal: Journal) -> None:
            (folder / "soak.csv").write_text("errors\n2\n")

        def facts(self, journal: Journal) -> dict[str, Any]:
            return {"lossless": "no", "provenance": {"fingerprint": "soak"}}

        def notes(self, journal: Journal) -> list[str]:
            return ["it rained"]

        def failures(self, journal: Journal) -> list[str]:
            return ["2 errors", "it leaks"]

    soak = ModuleType("soak")
    vars(soak)["Rain"] = Rain
    monkeypatch.setitem(sys.modules, "selfspec.stages.soak", soak)
    monkeypatch.setattr(MLflowTracker, "start", lambda *args: "run")
    for name in ("set_tags", "artifacts", "finish"):
        monkeypatch.setattr(MLflowTracker, name, lambda *args: None)
    monkeypatch.setattr(MLflowTracker, "log", lambda self, metrics, step, at: logged.append((metrics, step)))
    made = make("stages=[soak,bench]", "tracking=mlflow")
    job.check(made)
    job.fetch(made)
    result = run_job(made, tmp_path)
    assert (result["status"], result["error"]) == ("failed", "2 errors; it leaks")
    assert (result["measurements"]["soak/errors"], result["notes"]) == (2.0, ["it rained"])
    assert result["lossless"] == "yes" and result["provenance"] == units(made)[0].data["provenance"]
    assert (tmp_path / "soak.csv").exists() and (tmp_path / "cycles.parquet").exists()
    assert ({"soak/unit/errors": 2.0}, 0) in logged


def test_units_are_tracked_as_they_finish(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = list[int]()
    monkeypatch.setattr(MLflowTracker, "start", lambda *args: "run")
    for name in ("set_tags", "artifacts", "finish"):
        monkeypatch.setattr(MLflowTracker, name, lambda *args: None)
    monkeypatch.setattr(MLflowTracker, "log", lambda self, metrics, step, at: logged.append(step))
    made = make("tracking=mlflow", "scale.warmup=0")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        counted(patch, fail_at=5)
        run_job(made, tmp_path)
    assert logged == [0, 1]
    run_job(made, tmp_path)
    assert logged == [0, 1, 0, 1, 2, 0], "the restored ones again, the new one, the summary"
    with Journal.open(job.place(made), made.id, {}, Resume.require) as journal:
        assert journal.notes == {"run_id": "run"}
