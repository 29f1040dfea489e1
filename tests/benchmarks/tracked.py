"""How many jobs may log to one SQLite store at once: what each waits at most, and how many are left untracked.

    python tests/benchmarks/tracked.py [--jobs 64] [--units 20]

Every job is a process that opens the store, starts a run with a plan's parameters, logs its units one by one, tags,
copies an artifact and ends, all at the same moment as every other. Prints one line; exits 1 where a job gave up.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from plans import planned

from selfspec import tracking
from selfspec.tracking.base import JOURNAL_TAG, PLAN_TAG, BestEffortTracker, NoTracker


def job(number: int, folder: Path, parent: str, units: int, start: Any, told: Any) -> None:
    """One job's calls, as ``job.py`` makes them; tells what starting and the longest of the others took, and whether it
    was tracked to its end."""
    made = planned("engine=fake", "draft=layerskip", "tracking=mlflow", f"output_dir={folder}", f"seed={number}")
    tracker = tracking.make(made.tracking, made.output_dir)
    waits = list[float]()

    def timed(call: Any, *arguments: Any) -> None:
        began = time.monotonic()
        call(*arguments)
        waits.append(time.monotonic() - began)

    (own := folder / str(number)).mkdir()
    (own / "result.json").write_text("{}")
    start.wait()
    timed(tracker.start, f"job {number}", {PLAN_TAG: made.id, JOURNAL_TAG: made.id}, made.settings(), None, parent)
    start.wait()  # starting is one after the other; what comes then is all at once
    for unit in range(units):
        timed(
            tracker.log, {f"unit/{name}": float(unit) for name in ("tok_s", "speedup", "ttft_ms")}, unit, 1_000 + unit
        )
        if isinstance(tracker, BestEffortTracker) and hasattr(tracker._tracker, "_flush"):
            timed(tracker._tracker._flush)  # as if each unit took half a minute
    timed(tracker.set_tags, {"selfspec.lossless": "yes"})
    timed(tracker.artifacts, [own])
    timed(tracker.finish, "FINISHED")
    assert isinstance(tracker, BestEffortTracker)
    told.put((waits[0], max(waits[1:]), not isinstance(tracker._tracker, NoTracker)))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--units", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = planned("engine=fake", "draft=layerskip", "tracking=mlflow", f"output_dir={folder}")
        # Forked with MLflow loaded, so that 64 of them fit into memory; the store is opened in each of them.
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

        context = multiprocessing.get_context("fork")
        start, told = context.Barrier(given.jobs), context.Queue()
        opening = context.Process(
            target=lambda: told.put(tracking.make(made.tracking, folder).sweep_parent("sweep", "sweep"))
        )
        opening.start()
        parent = told.get()  # a sweep's own run comes before its jobs
        opening.join()
        jobs = [
            context.Process(target=job, args=(n, folder, parent, given.units, start, told)) for n in range(given.jobs)
        ]
        began = time.monotonic()
        for each in jobs:
            each.start()
        found = [told.get() for _ in jobs]
        for each in jobs:
            each.join()
    starts, waits, tracked = zip(*found, strict=True)
    print(
        f"{given.jobs} jobs of {given.units} units at once: {sum(tracked)} tracked to their end, in "
        f"{time.monotonic() - began:.1f} s; the longest waits: {max(starts):.1f} s to start, {max(waits):.1f} s else"
    )
    sys.exit(sum(tracked) < given.jobs)


if __name__ == "__main__":
    main()
