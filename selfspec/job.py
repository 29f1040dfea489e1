"""One job: for each stage of the plan, restore what is journalled, run what is not, track; then report."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, cast

from selfspec import checkpoint, fitting, provenance, sense, stages, tracking
from selfspec.checkpoint import Journal
from selfspec.data import assets
from selfspec.engine import factory
from selfspec.engine.base import LazyEngine
from selfspec.errors import Interrupted, LeaseError
from selfspec.interrupt import shield, trap
from selfspec.plan import Plan
from selfspec.report import results, tables
from selfspec.stages.base import Stage
from selfspec.stages.fit import chosen
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
        for stage in stages.of(plan):
            stage.check()
        if here:
            factory.check(plan)
            for stage in stages.of(plan):
                stage.installed()
    kept = [plan for plan in plans if ask_buckets or checkpoint.on_disk(plan.checkpoint.dir) is not None]
    checkpoint.map_concurrent(_check_kept, kept)


def _check_kept(plan: Plan) -> None:
    """What the checkpoint holds of a plan."""
    new = not checkpoint.inspect(place(plan), plan.id, plan.checkpoint.resume)
    if plan.open:  # which head it will have is not known yet
        return
    if plan.draft.fitted and (fitting.fitted(plan) or (new and not fitting.may_fit(plan))):
        fitting.check_head(plan)


def fetch(plan: Plan) -> None:
    """Has the plan's sources on this disk before anything is written; one with a journal on it has had them.

    Raises:
        AssetError: one cannot be had.
    """
    if checkpoint.begun_here(place(plan)):
        return
    assets.fetch_all((asked.source, asked.sha256) for asked in (plan.workload, *plan.workload.parts.values()))
    if plan.engine.reads_model:
        assets.fetch(plan.model.source, plan.model.sha256)
    for stage in stages.of(plan):
        stage.fetch()


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
        engine, ours = cache(lambda: factory.make(plan)), stages.of(plan)
        measured: Measurements = {}
        for stage in ours:
            stage.plan = chosen(plan, journal)
            _finish(stage, engine, journal, tracker)
            with journal.reading():
                measured |= {f"{stage.name}/{name}": value for name, value in stage.measurements(journal).items()}

        with journal.reading():
            result = _result(plan, ours, journal, measured)
            tables.write(folder, [result])
            for stage in ours:
                stage.write(folder, journal)
            results.write_result(folder, result)

        ended = max((record.at for stage in ours for record in journal.records(stage.name)), default=0)
        tracker.log(measured, 0, ended)
        tracker.set_tags(
            {"selfspec.lossless": result["lossless"] or "not checked", "selfspec.error": result["error"] or ""}
        )
        ran = chosen(plan, journal)
        head = [fitting.head_path(ran)] if ran.draft.fitted and fitting.head_path(ran).exists() else []
        tracker.artifacts([folder, *head])
        tracker.finish("FAILED" if result["status"] == "failed" else "FINISHED", ended or None)
        journal.write_result(json.dumps(result, indent=1))  # last: whoever sees it does not start this job again
    return result


@contextmanager
def _tracked(plan: Plan, journal: Journal, parent: str | None) -> Iterator[Tracker]:
    """The plan's run of the tracker, resumed where there is one."""
    tracker = tracking.make(plan.tracking, plan.output_dir)
    known = journal.notes.get("run_id")
    try:
        tags = _tags(plan) | {tracking.JOURNAL_TAG: f"{plan.id} {journal.created}"}
        with shield():  # should we be killed before it is noted, the run is found by its tag
            run_id = tracker.start(plan.label, tags, plan.settings(), known, parent)
            if run_id not in (None, known):
                journal.note("run_id", run_id)
        yield tracker
    except LeaseError:  # the run is its successor's
        raise
    except Interrupted:
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise


def _finish(stage: Stage, engine: LazyEngine, journal: Journal, tracker: Tracker) -> None:
    """Runs what is missing of a stage: a unit is journalled, then logged, and only then is the next one begun."""
    with closing(stage.units(engine, journal)) as units:  # at once where we fail: a soak has a server to stop
        new = (journal.append(stage.name, *unit) for unit in units)
        # Earlier runs' too: a tracker may have missed the last one, and what it has stored stays as it is.
        for step, record in enumerate(chain(journal.records(stage.name), new)):
            with journal.reading():
                shown = stage.per_unit(record.data)
            if shown:
                tracker.log(shown, step, record.at)


def place(plan: Plan) -> str:
    """Where the plan's journal is kept."""
    return checkpoint.plan_place(plan.checkpoint.dir, plan.id)


def _tags(plan: Plan) -> dict[str, str]:
    ours = {"plan": plan.id, "experiment": plan.name, "hardware": str(provenance.hardware()["cpu"])}
    return {f"selfspec.{k}": v for k, v in ours.items()} | {f"git.{k}": v for k, v in provenance.git().items()}


def _result(plan: Plan, ours: list[Stage], journal: Journal, measured: Measurements) -> results.Result:
    facts: dict[str, Any] = {"label": chosen(plan, journal).label}
    for stage in ours:
        facts = stage.facts(journal) | facts  # the first to say something stands
    notes = [note for stage in ours for note in stage.notes(journal)]
    failures = [reason for stage in ours for reason in stage.failures(journal)]
    if senseless := sense.not_finite(measured):
        failures.append(f"what was measured makes no sense: {', '.join(senseless)}")
        facts["lossless"] = None
    result = cast(
        results.Result,
        {**results.empty_result(plan, provenance.collect()), **facts, "measurements": measured, "notes": notes},
    )
    if failures:
        result["status"], result["error"] = "failed", "; ".join(failures)
    return result
