"""The :class:`Tracker` protocol, a tracker that tracks nothing, and one that never fails a job."""

import sqlite3
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast

from selfspec import credentials
from selfspec.errors import one_line

P = ParamSpec("P")
T = TypeVar("T")
Status = Literal["FINISHED", "FAILED", "KILLED"]

SWEEP_TAG = "selfspec.sweep_id"
PARENT_TAG = "mlflow.parentRunId"
PLAN_TAG = "selfspec.plan"
JOURNAL_TAG = "selfspec.journal"
"""Names the journal that a run is of: one whose id was not noted there before its process was killed is found by it."""


class Tracker(Protocol):
    """Logs one run at a time."""

    def start(
        self, name: str, tags: Mapping[str, str], params: Mapping[str, object], run_id: str | None, parent: str | None
    ) -> str | None:
        """Resumes the run ``run_id`` if the store still has it, else creates one.

        Args:
            name: of the run, in run lists.
            tags: set anew every time.
            params: nested mappings are joined with dots; only those the run lacks are logged.
            run_id: the run to resume; ``None`` for a new one.
            parent: id of the sweep's run.

        Returns:
            The run's id, to be kept for the next time; ``None`` if nothing is tracked.
        """
        return None

    def sweep_parent(self, sweep_id: str, name: str) -> str | None:
        """The run that stands for the sweep ``sweep_id``, created if there is none yet.

        Its status follows its children's, as they start and finish.
        """
        return None

    def log(self, metrics: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        """Buffers metrics. NaN and infinities are left out.

        The same (key, value, timestamp, step) is stored once however often it is logged, so timestamps
        must come from the journal, not from the clock.
        """
        return None

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        return None

    def artifacts(self, paths: Iterable[Path]) -> None:
        """Copies files, and all that is below folders, to the run's artifacts."""
        return None

    def finish(self, status: Status, timestamp_ms: int | None = None) -> None:
        """Sends what is buffered and ends the run, as of ``timestamp_ms``; ``None``: now."""
        return None

    def mark_orphans_failed(self, parent: str, plan_ids: Collection[str]) -> None:
        """Ends, as FAILED, runs of those plans of a sweep that seem to run still: their jobs died without a word."""
        return None


class NoTracker(Tracker):
    """Tracks nothing: does what the protocol does."""


def _shielded(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate["BestEffortTracker", P], T]:
    """The same method of what is shielded; once it has failed, of a :class:`NoTracker`."""

    def call(self: "BestEffortTracker", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._try(lambda tracker: cast("T", getattr(tracker, method.__name__)(*args, **kwargs)))

    return call


class BestEffortTracker:
    """A tracker that may fail without failing the job: after its first failure it tracks nothing."""

    def __init__(self, tracker: Tracker, uri: str) -> None:
        """Shields ``tracker``; ``uri`` is named in the warning, without credentials."""
        self._tracker = tracker
        self._uri = uri

    start = _shielded(Tracker.start)
    sweep_parent = _shielded(Tracker.sweep_parent)
    log = _shielded(Tracker.log)
    set_tags = _shielded(Tracker.set_tags)
    artifacts = _shielded(Tracker.artifacts)
    finish = _shielded(Tracker.finish)
    mark_orphans_failed = _shielded(Tracker.mark_orphans_failed)

    def _try(self, call: Callable[[Tracker], T]) -> T:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # MLflow's, about its own dependencies
                return call(self._tracker)
        except Exception as error:
            self._tracker = NoTracker()
            uri, reason = credentials.without(self._uri), credentials.without(_reason(error))
            print(f"warning: not tracking to {uri}: {one_line(reason)}", file=sys.stderr)
            return call(self._tracker)


def _reason(error: BaseException) -> str:
    # The operating system or the database says best what is wrong; what is wrapped around it is long.
    said, cause = error, error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError | sqlite3.Error):
            said = cause
        cause = cause.__cause__ or cause.__context__
    lines = str(said).strip().splitlines()
    return f"{type(said).__name__}: {lines[0][:200]}" if lines else type(said).__name__
