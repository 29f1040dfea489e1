"""One job: for each stage of the plan, restore what is journalled, run what is not, track; then report."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from selfspec import assets, checkpoint, metrics, provenance, report, results, tracking
from selfspec.checkpoint import Journal, Record
from selfspec.config import EngineName
from selfspec.engine import factory
from selfspec.errors import Interrupted, one_line
from selfspec.interrupt import shield, trap
from selfspec.plan import Plan
from selfspec.stages import bench, fit
from selfspec.tracking import Tracker
from selfspec.types import Measurements

STAGES = {"fit": fit, "bench": bench}


def check(plan: Plan) -> None:
    """Refuses, before anything is written, what would make the job fail later.

    Raises:
        UserError: an unreadable journal, a head that is corrupt or of another model, a missing head.
    """
    checkpoint.inspect(journal_folder(plan), plan.id, plan.checkpoint.resume)
    tracking.make(plan.tracking, plan.output_dir)
    new = not (journal_folder(plan) / checkpoint.FILE).exists()
    if plan.draft.fitted and (fit.head_path(plan).exists() or (new and not fit.may_fit(plan))):
        fit.check_head(plan)


def fetch(plan: Plan) -> None:
    """Has the plan's sources on this disk before anything is written; a plan with a journal has had them.

    Raises:
        AssetError: one cannot be had.
    """
    if (journal_folder(plan) / checkpoint.FILE).exists():
        return
    assets.fetch(plan.workload.source, plan.workload.sha256)
    if plan.engine.name is not EngineName.fake:
        assets.fetch(plan.model.source, plan.model.sha256)


def run(plan: Plan, folder: Path, sweep: str | None = None) -> results.Result:
    """Runs a plan to its end and leaves its result in ``folder``.

    Args:
        sweep: the tracker's run of the sweep this job belongs to.

    Returns:
        The result, as written to ``result.json``; its status is ``failed`` where an exact policy changed tokens.

    Raises:
        UserError: something the user can put right.
        Interrupted: SIGTERM or SIGINT; what is finished is kept.
    """
    with (
        trap(),
        Journal.open(journal_folder(plan), plan.id, plan.settings(), plan.checkpoint.resume) as journal,
        _tracked(plan, journal, sweep) as tracker,
    ):
        engine = cache(lambda: factory.make(plan))
        measured: Measurements = {}
        for stage in plan.stages:
            found = STAGES[stage].run(engine, plan, journal)
            measured |= {f"{stage}/{name}": value for name, value in found.items()}

        result = _result(plan, journal, measured)
        report.write(folder, [result])
        bench.write_cycles(folder / "cycles.parquet", journal.records("bench"))
        provenance.write_atomic(folder / results.FILE, json.dumps(result, indent=1))

        ended = max((record.at for stage in plan.stages for record in journal.records(stage)), default=0)
        tracker.log(measured, 0, ended)
        tracker.set_tags({"selfspec.lossless": result["lossless"] or "not checked"})
        head = [fit.head_path(plan)] if plan.draft.fitted and fit.head_path(plan).exists() else []
        tracker.artifacts([folder, *head])
        tracker.finish("FAILED" if result["status"] == "failed" else "FINISHED", ended or None)
    return result


@contextmanager
def _tracked(plan: Plan, journal: Journal, sweep: str | None) -> Iterator[Tracker]:
    """The plan's run of the tracker, resumed where there is one; units are logged as they finish."""
    tracker = tracking.make(plan.tracking, plan.output_dir)
    known = journal.notes.get("run_id")
    try:
        with shield():  # a run that is started and not noted would be started again
            run_id = tracker.start(plan.label, _tags(plan), plan.settings(), known, sweep)
            if run_id not in (None, known):
                journal.note("run_id", run_id)
        for step, record in enumerate(journal.records("bench")):  # again: what is stored already stays as it is
            tracker.log(metrics.per_unit(record.data), step, record.at)
        journal.on_append.append(lambda record: _log_unit(tracker, journal, record))
        yield tracker
    except Interrupted:
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise


def failed(plan: Plan, folder: Path, error: Exception) -> None:
    """Leaves a result that says why there is none, unless the job wrote one before it failed."""
    path = folder / results.FILE
    known = dict(results.read(path)) if path.exists() else _nothing(plan)
    provenance.write_atomic(path, json.dumps({**known, "status": "failed", "error": one_line(error)}, indent=1))


def journal_folder(plan: Plan) -> Path:
    """Where the plan's journal is kept."""
    return Path(plan.checkpoint.dir) / "plans" / plan.id


def _log_unit(tracker: Tracker, journal: Journal, record: Record) -> None:
    if record.stage == "bench":
        tracker.log(metrics.per_unit(record.data), len(journal.records("bench")) - 1, record.at)


def _tags(plan: Plan) -> dict[str, str]:
    ours = {"plan": plan.id, "experiment": plan.name, "hardware": str(provenance.hardware()["cpu"])}
    return {f"selfspec.{k}": v for k, v in ours.items()} | {f"git.{k}": v for k, v in provenance.git().items()}


def _result(plan: Plan, journal: Journal, measured: Measurements) -> results.Result:
    records = journal.records("bench")
    result = _nothing(plan)
    result["measurements"] = measured
    if records:
        if bench.verdict(records, plan) == "no":
            differing = sum(v["verdict"] == "differs" for record in records for v in record.data["verdicts"])
            result["status"] = "failed"
            result["error"] = f"not lossless: {differing} prompts differ from plain decoding"
        result["acceptance_by_position"] = metrics.acceptance_by_position([r.data for r in bench.poolable(records)])
        result["lossless"] = bench.verdict(records, plan)
        result["notes"] = bench.notes(records)
        result["provenance"] = bench.poolable(records)[0].data["provenance"]
    return result


def _nothing(plan: Plan) -> results.Result:
    """The result of a plan that has measured nothing yet."""
    return {
        "version": results.VERSION,
        "plan_id": plan.id,
        "label": plan.label,
        "name": plan.name,
        "settings": plan.settings(),
        "measurements": {},
        "lossless": None,
        "notes": [],
        "provenance": provenance.collect(),
        "acceptance_by_position": [],
        "status": "finished",
        "error": None,
    }
