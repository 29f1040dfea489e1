"""One job: for each stage of the plan, restore what is journalled, run what is not, track; then report."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

from selfspec import checkpoint, fitting, provenance, stages, tracking
from selfspec.checkpoint import Journal, Record
from selfspec.data import assets
from selfspec.engine import factory
from selfspec.errors import Interrupted, LeaseError
from selfspec.interrupt import shield, trap
from selfspec.plan import Plan
from selfspec.report import results, tables
from selfspec.sweep_context import ALONE, SweepContext
from selfspec.tracking import Tracker
from selfspec.types import Measurements


def check(*plans: Plan, here: bool = True, ask_buckets: bool = True) -> None:
    """Refuses, before anything is written, what would make a job fail later.

    Args:
        here: they run on this machine, which must have what they need installed.
        ask_buckets: for what is kept there; else what is kept on this disk alone is checked.

    Raises:
        UserError: an unreadable journal, a head that is corrupt or of another model, a missing head or package.
    """
    for plan in plans:
        tracking.make(plan.tracking, plan.output_dir)
        for stage in plan.stages:
            stages.ask(stage, "check", plan, otherwise=None)
        if here:
            factory.check(plan)
            for stage in plan.stages:
                stages.ask(stage, "installed", plan, otherwise=None)
    kept = [plan for plan in plans if ask_buckets or checkpoint.on_disk(plan.checkpoint.dir) is not None]
    checkpoint.map_concurrent(_check_kept, kept)


def _check_kept(plan: Plan) -> None:
    """What the checkpoint holds of a plan."""
    new = not checkpoint.inspect(place(plan), plan.id, plan.checkpoint.resume)
    if plan.draft.fitted and (fitting.fitted(plan) or (new and not fitting.may_fit(plan))):
        fitting.check_head(plan)


def fetch(plan: Plan) -> None:
    """Has the plan's sources on this disk before anything is written; one with a journal on it has had them.

    Raises:
        AssetError: one cannot be had.
    """
    if checkpoint.begun_here(place(plan)):
        return
    assets.fetch(plan.workload.source, plan.workload.sha256)
    if plan.engine.reads_model:
        assets.fetch(plan.model.source, plan.model.sha256)
    for stage in plan.stages:
        stages.ask(stage, "fetch", plan, otherwise=None)


def run(plan: Plan, folder: Path, sweep: SweepContext = ALONE) -> results.Result:
    """Runs a plan to its end and leaves its result in ``folder``, and beside its journal.

    Args:
        sweep: the one that it is part of.

    Returns:
        The result, as written to ``result.json``; its status is ``failed`` where a stage says so
        (an exact policy changed tokens, a soak did not hold).

    Raises:
        UserError: something the user can put right.
        LeaseError: another process has taken the plan over.
        Interrupted: SIGTERM or SIGINT; what is finished is kept.
    """
    resume, lease_s = plan.checkpoint.resume, plan.checkpoint.lease_s
    with (
        trap(),
        Journal.open(place(plan), plan.id, plan.settings(), resume, launch=sweep.launch, lease_s=lease_s) as journal,
        _tracked(plan, journal, sweep.run_id) as tracker,
    ):
        engine = cache(lambda: factory.make(plan))
        measured: Measurements = {}
        for stage in plan.stages:
            found: Measurements = stages.load(stage).run(engine, plan, journal)
            measured |= {f"{stage}/{name}": value for name, value in found.items()}

        result = _result(plan, journal, measured)
        tables.write(folder, [result])
        for stage in plan.stages:
            stages.ask(stage, "write", folder, plan, journal, otherwise=None)
        results.write_result(folder, result)

        ended = max((record.at for stage in plan.stages for record in journal.records(stage)), default=0)
        tracker.log(measured, 0, ended)
        tracker.set_tags(
            {"selfspec.lossless": result["lossless"] or "not checked", "selfspec.error": result["error"] or ""}
        )
        head = [fitting.head_path(plan)] if plan.draft.fitted and fitting.head_path(plan).exists() else []
        tracker.artifacts([folder, *head])
        tracker.finish("FAILED" if result["status"] == "failed" else "FINISHED", ended or None)
        journal.write_result(json.dumps(result, indent=1))  # last: whoever sees it does not start this job again
    return result


@contextmanager
def _tracked(plan: Plan, journal: Journal, parent: str | None) -> Iterator[Tracker]:
    """The plan's run of the tracker, resumed where there is one; units are logged as they finish."""
    tracker = tracking.make(plan.tracking, plan.output_dir)
    known = journal.notes.get("run_id")
    try:
        tags = _tags(plan) | {tracking.JOURNAL_TAG: f"{plan.id} {journal.created}"}
        with shield():  # should we be killed before it is noted, the run is found by its tag
            run_id = tracker.start(plan.label, tags, plan.settings(), known, parent)
            if run_id not in (None, known):
                journal.note("run_id", run_id)
        for stage in plan.stages:
            for step, record in enumerate(journal.records(stage)):  # again: what is stored already stays as it is
                _log_unit(tracker, record, step)
        journal.on_append.append(lambda record: _log_unit(tracker, record, len(journal.records(record.stage)) - 1))
        yield tracker
    except LeaseError:  # the run is its successor's
        raise
    except Interrupted:
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise


def place(plan: Plan) -> str:
    """Where the plan's journal is kept."""
    return checkpoint.plan_place(plan.checkpoint.dir, plan.id)


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
    result = cast(
        results.Result,
        {**results.empty_result(plan, provenance.collect()), **facts, "measurements": measured, "notes": notes},
    )
    if failures:
        result["status"], result["error"] = "failed", "; ".join(failures)
    return result
