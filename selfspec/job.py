"""One job: for each stage of the plan, restore what is journalled, run what is not, track; then report."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

from selfspec import assets, checkpoint, provenance, report, results, stages, tracking
from selfspec.checkpoint import Journal, Record
from selfspec.config import EngineName
from selfspec.engine import factory
from selfspec.errors import Interrupted, one_line
from selfspec.interrupt import shield, trap
from selfspec.plan import Plan
from selfspec.stages import fit
from selfspec.tracking import Tracker
from selfspec.types import Measurements


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
    for stage in plan.stages:
        stages.ask(stage, "check", plan, otherwise=None)


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
    for stage in plan.stages:
        stages.ask(stage, "fetch", plan, otherwise=None)


def run(plan: Plan, folder: Path, sweep: str | None = None) -> results.Result:
    """Runs a plan to its end and leaves its result in ``folder``.

    Args:
        sweep: the tracker's run of the sweep this job belongs to.

    Returns:
        The result, as written to ``result.json``; its status is ``failed`` where a stage says so
        (an exact policy changed tokens, a soak did not hold).

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
            found: Measurements = stages.load(stage).run(engine, plan, journal)
            measured |= {f"{stage}/{name}": value for name, value in found.items()}

        result = _result(plan, journal, measured)
        report.write(folder, [result])
        for stage in plan.stages:
            stages.ask(stage, "write", folder, plan, journal, otherwise=None)
        provenance.write_atomic(folder / results.FILE, json.dumps(result, indent=1))

        ended = max((record.at for stage in plan.stages for record in journal.records(stage)), default=0)
        tracker.log(measured, 0, ended)
        tracker.set_tags(
            {"selfspec.lossless": result["lossless"] or "not checked", "selfspec.error": result["error"] or ""}
        )
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
        for stage in plan.stages:
            for step, record in enumerate(journal.records(stage)):  # again: what is stored already stays as it is
                _log_unit(tracker, record, step)
        journal.on_append.append(lambda record: _log_unit(tracker, record, len(journal.records(record.stage)) - 1))
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


def _log_unit(tracker: Tracker, record: Record, step: int) -> None:
    shown: Measurements = stages.ask(record.stage, "per_unit", record.data, otherwise={})
    if shown:
        tracker.log(shown, step, record.at)


def _tags(plan: Plan) -> dict[str, str]:
    ours = {"plan": plan.id, "experiment": plan.name, "hardware": str(provenance.hardware()["cpu"])}
    return {f"selfspec.{k}": v for k, v in ours.items()} | {f"git.{k}": v for k, v in provenance.git().items()}


def _result(plan: Plan, journal: Journal, measured: Measurements) -> results.Result:
    facts: dict[str, Any] = {}
    notes, failures = list[str](), list[str]()
    for stage in plan.stages:
        facts = stages.ask(stage, "facts", plan, journal, otherwise=facts) | facts  # the first to say something stands
        notes += stages.ask(stage, "notes", plan, journal, otherwise=[])
        failures += stages.ask(stage, "failures", plan, journal, otherwise=[])
    result = cast(results.Result, {**_nothing(plan), **facts, "measurements": measured, "notes": notes})
    if failures:
        result["status"], result["error"] = "failed", "; ".join(failures)
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
