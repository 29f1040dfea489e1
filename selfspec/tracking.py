"""Where runs are logged: the :class:`Tracker` protocol, MLflow, and none.

A tracker is a mirror of the journal, never a part of the experiment. So three things hold:

- it never fails a job: at its first failure it says so once on stderr and goes quiet (:class:`Forgiving`);
- logging is idempotent: after a resume a job logs everything it has again, and nothing is stored twice;
- MLflow is imported when a run starts, not before, and its client is used directly: no active run, no
  global tracking URI.
"""

import logging
import math
import os
import re
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from filelock import FileLock

from selfspec import config as schema
from selfspec.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

T = TypeVar("T")
Status = Literal["FINISHED", "FAILED", "KILLED"]

SWEEP_TAG = "selfspec.sweep_id"
PARENT_TAG = "mlflow.parentRunId"
PLAN_TAG = "selfspec.plan"
JOURNAL_TAG = "selfspec.journal"
"""Names the journal that a run is of: one whose id was not noted there before its process was killed is found by it."""
DEFAULT_URI = "sqlite:///mlflow.db"
"""What ``mlflow ui`` opens when it is started in the same folder."""

_BATCH = 1000  # MLflow takes no more metrics in one call
_PARAM_BATCH = 100  # ... and no more params or tags
_NAME = 250  # what a run's name may have in a database that heeds its columns' widths, as PostgreSQL does
_FLUSH_S = 30.0  # how far a live view may lag behind
_LOCK_S = 60.0
_ENVIRONMENT = {
    # One retry of 4 s each: a server that is down costs a job at most about 10 s, not 4 minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_SQLITE = re.compile(r"(?P<scheme>sqlite(?:\+\w+)?:///)(?P<path>[^?:][^?]*)(?P<query>\?.*)?")


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

    def sweep_parent(self, sweep_id: str, name: str) -> str | None:
        """The run that stands for the sweep ``sweep_id``, created if there is none yet.

        Its status follows its children's, as they start and finish.
        """

    def log(self, metrics: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        """Buffers metrics. NaN and infinities are left out.

        The same (key, value, timestamp, step) is stored once however often it is logged, so timestamps
        must come from the journal, not from the clock.
        """

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""

    def artifacts(self, paths: Iterable[Path]) -> None:
        """Copies files, and all that is below folders, to the run's artifacts."""

    def finish(self, status: Status, timestamp_ms: int | None = None) -> None:
        """Sends what is buffered and ends the run, as of ``timestamp_ms``; ``None``: now."""

    def bury(self, parent: str, plan_ids: Collection[str]) -> None:
        """Ends, as FAILED, runs of those plans of a sweep that seem to run still: their jobs died without a word."""


class NoTracker:
    """Tracks nothing."""

    def start(
        self, name: str, tags: Mapping[str, str], params: Mapping[str, object], run_id: str | None, parent: str | None
    ) -> str | None:
        """See :class:`Tracker`."""
        return None

    def sweep_parent(self, sweep_id: str, name: str) -> str | None:
        """See :class:`Tracker`."""
        return None

    def log(self, metrics: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        """See :class:`Tracker`."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See :class:`Tracker`."""

    def artifacts(self, paths: Iterable[Path]) -> None:
        """See :class:`Tracker`."""

    def finish(self, status: Status, timestamp_ms: int | None = None) -> None:
        """See :class:`Tracker`."""

    def bury(self, parent: str, plan_ids: Collection[str]) -> None:
        """See :class:`Tracker`."""


class MLflowTracker:
    """Logs to an MLflow store: a local SQLite file or a server. Raises what MLflow raises."""

    def __init__(self, uri: str, experiment: str, artifact_root: Path) -> None:
        """Opens nothing yet.

        Args:
            uri: ``sqlite:///...`` (made absolute, its folder created) or any other MLflow tracking URI.
            experiment: name; created if there is none.
            artifact_root: where a new experiment of a local SQLite store keeps its artifacts.
        """
        self._uri, self._database = _absolute(uri)
        self._experiment = experiment
        self._artifact_root = artifact_root.absolute()
        self._run_id = ""
        self._parent: str | None = None
        self._buffer: list[Metric] = []
        self._flushed = time.monotonic()

    def start(
        self, name: str, tags: Mapping[str, str], params: Mapping[str, object], run_id: str | None, parent: str | None
    ) -> str | None:
        """See :class:`Tracker`."""
        from mlflow.entities import Param

        run = self._find(run_id) if run_id else self._find_by(JOURNAL_TAG, tags)
        if run is None:
            run = self._client.create_run(self._experiment_id, run_name=name, tags=dict(tags))
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._run_id, self._parent, self._buffer = run.info.run_id, parent, []
        self.set_tags({**tags, PARENT_TAG: parent} if parent else tags)
        new = [Param(key, str(value)) for key, value in flatten(params).items() if key not in run.data.params]
        for i in range(0, len(new), _PARAM_BATCH):
            self._client.log_batch(self._run_id, params=new[i : i + _PARAM_BATCH])
        if parent:
            self._client.update_run(parent, status="RUNNING")
        return self._run_id

    def sweep_parent(self, sweep_id: str, name: str) -> str | None:
        """See :class:`Tracker`.

        Two jobs that ask at once get the same run: a SQLite store is locked; on a server, where nothing
        can be locked, each looks again after creating one and the oldest stands, which two machines with
        clocks apart may still see differently.
        """
        if len(name) > _NAME:
            name = f"{name[: _NAME - 3]}..."
        with self._lock():
            runs = self._search(SWEEP_TAG, sweep_id)
            if runs:
                return _oldest(runs)
            created = self._client.create_run(self._experiment_id, tags={SWEEP_TAG: sweep_id}, run_name=name)
            oldest = _oldest([created, *self._search(SWEEP_TAG, sweep_id)])
            if oldest != created.info.run_id:
                self._client.delete_run(created.info.run_id)
            return oldest

    def log(self, metrics: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        """See :class:`Tracker`."""
        from mlflow.entities import Metric

        for key, value in metrics.items():
            if math.isfinite(value):
                self._buffer.append(Metric(key, float(value), timestamp_ms, step))
        if len(self._buffer) >= _BATCH or time.monotonic() - self._flushed > _FLUSH_S:
            self._flush()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See :class:`Tracker`."""
        from mlflow.entities import RunTag

        new = [RunTag(key, value) for key, value in tags.items()]
        for i in range(0, len(new), _PARAM_BATCH):
            self._client.log_batch(self._run_id, tags=new[i : i + _PARAM_BATCH])

    def artifacts(self, paths: Iterable[Path]) -> None:
        """See :class:`Tracker`."""
        for path in paths:
            if path.is_dir():
                self._client.log_artifacts(self._run_id, str(path))
            else:
                self._client.log_artifact(self._run_id, str(path))

    def finish(self, status: Status, timestamp_ms: int | None = None) -> None:
        """See :class:`Tracker`."""
        self._flush()
        if timestamp_ms is not None and timestamp_ms < self._client.get_run(self._run_id).info.start_time:
            timestamp_ms = None  # a new run for an old journal
        self._client.set_terminated(self._run_id, status, timestamp_ms)
        if self._parent:
            self._settle(self._parent)

    def bury(self, parent: str, plan_ids: Collection[str]) -> None:
        """See :class:`Tracker`."""
        running = f"tags.`{PARENT_TAG}` = '{parent}' and attributes.status = 'RUNNING'"
        for run in self._client.search_runs([self._experiment_id], running):
            if run.data.tags.get(PLAN_TAG) in plan_ids:
                self._client.set_terminated(run.info.run_id, "FAILED")

    @cached_property
    def _client(self) -> "MlflowClient":
        client = _import_client()
        with self._lock():  # two processes that create the tables at once would trip over each other
            return client(tracking_uri=self._uri)

    @cached_property
    def _experiment_id(self) -> str:
        with self._lock():
            found = self._client.get_experiment_by_name(self._experiment)
            if found is not None:
                return str(found.experiment_id)
            location = self._artifact_root.as_uri() if self._database else None
            try:
                return str(self._client.create_experiment(self._experiment, artifact_location=location))
            except Exception:
                found = self._client.get_experiment_by_name(self._experiment)  # on a server another job may be first
                if found is None:
                    raise
                return str(found.experiment_id)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        if self._database is None:
            yield
        else:
            with self._file_lock:
                yield

    @cached_property
    def _file_lock(self) -> FileLock:
        assert self._database is not None, "only a local store is locked"
        self._database.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self._database}.lock", timeout=_LOCK_S)

    def _find(self, run_id: str) -> "Run | None":
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            # An id that is no id (another tracker's, a damaged journal) names no run either.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _find_by(self, tag: str, tags: Mapping[str, str]) -> "Run | None":
        found = self._search(tag, tags[tag]) if tag in tags else []
        return self._find(_oldest(found)) if found else None

    def _search(self, tag: str, value: str) -> "list[Run]":
        quote = '"' if "'" in value else "'"
        return list(self._client.search_runs([self._experiment_id], f"tags.`{tag}` = {quote}{value}{quote}"))

    def _flush(self) -> None:
        for i in range(0, len(self._buffer), _BATCH):
            self._client.log_batch(self._run_id, metrics=self._buffer[i : i + _BATCH])
        self._buffer = []
        self._flushed = time.monotonic()

    def _settle(self, parent: str) -> None:
        # Whoever finishes last sees all the others finished: each child ends itself before it looks.
        if not any(self._has_child(parent, status) for status in ("RUNNING", "SCHEDULED")):
            worst = next((s for s in ("FAILED", "KILLED") if self._has_child(parent, s)), "FINISHED")
            self._client.set_terminated(parent, worst)

    def _has_child(self, parent: str, status: str) -> bool:
        """Asks for one at most: a page of them is a thousand, with all that was logged of each."""
        wanted = f"tags.`{PARENT_TAG}` = '{parent}' and attributes.status = '{status}'"
        return bool(self._client.search_runs([self._experiment_id], wanted, max_results=1))


class Forgiving:
    """A tracker that may fail without failing the job: after its first failure it tracks nothing."""

    def __init__(self, tracker: Tracker, uri: str) -> None:
        """Shields ``tracker``; ``uri`` is named in the warning, without credentials."""
        self._tracker = tracker
        self._uri = uri

    def start(
        self, name: str, tags: Mapping[str, str], params: Mapping[str, object], run_id: str | None, parent: str | None
    ) -> str | None:
        """See :class:`Tracker`."""
        return self._try(lambda tracker: tracker.start(name, tags, params, run_id, parent))

    def sweep_parent(self, sweep_id: str, name: str) -> str | None:
        """See :class:`Tracker`."""
        return self._try(lambda tracker: tracker.sweep_parent(sweep_id, name))

    def log(self, metrics: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        """See :class:`Tracker`."""
        self._try(lambda tracker: tracker.log(metrics, step, timestamp_ms))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See :class:`Tracker`."""
        self._try(lambda tracker: tracker.set_tags(tags))

    def artifacts(self, paths: Iterable[Path]) -> None:
        """See :class:`Tracker`."""
        self._try(lambda tracker: tracker.artifacts(paths))

    def finish(self, status: Status, timestamp_ms: int | None = None) -> None:
        """See :class:`Tracker`."""
        self._try(lambda tracker: tracker.finish(status, timestamp_ms))

    def bury(self, parent: str, plan_ids: Collection[str]) -> None:
        """See :class:`Tracker`."""
        self._try(lambda tracker: tracker.bury(parent, plan_ids))

    def _try(self, call: Callable[[Tracker], T]) -> T:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # MLflow's, about its own dependencies
                return call(self._tracker)
        except Exception as error:
            self._tracker = NoTracker()
            reason = _without_credentials(_reason(error))
            print(f"warning: not tracking to {_without_credentials(self._uri)}: {reason}", file=sys.stderr)
            return call(self._tracker)


def make(tracking: schema.Tracking, output_dir: Path) -> Tracker:
    """The tracker that a config asks for; nothing is opened yet.

    Without a ``uri`` it is MLflow's own: ``$MLFLOW_TRACKING_URI``, or ``mlflow.db`` in the working folder.

    Args:
        tracking: which tracker, where.
        output_dir: a new experiment in a local store keeps its artifacts in ``mlartifacts`` below it.

    Raises:
        ConfigError: a URI that MLflow cannot log to.
    """
    if tracking.name is schema.TrackerName.none:
        return NoTracker()
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        shown = _without_credentials(uri)
        raise ConfigError(f"tracking.uri={shown}: must be sqlite:///<file>, http(s)://<server> or another database URI")
    if tracking.uri and _without_credentials(tracking.uri) != tracking.uri:  # configs are kept and shown
        raise ConfigError(
            f"tracking.uri={_without_credentials(uri)}: must hold no credentials; "
            "use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or give it as MLFLOW_TRACKING_URI"
        )
    return Forgiving(MLflowTracker(uri, tracking.experiment, output_dir / "mlartifacts"), uri)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one flat one, keys joined with dots: ``{"gate": {"K": 4}}`` gives ``{"gate.K": 4}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _import_client() -> "type[MlflowClient]":
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())  # it may be imported already
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of every retry
    return MlflowClient


def _absolute(uri: str) -> tuple[str, Path | None]:
    match = _SQLITE.fullmatch(uri)
    if match is None:
        return uri, None
    path = Path(match["path"]).absolute()
    return f"{match['scheme']}{path}{match['query'] or ''}", path


def _oldest(runs: "list[Run]") -> str:
    return str(min(runs, key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id)


def _reason(error: BaseException) -> str:
    # The operating system or the database says best what is wrong; what is wrapped around it is long.
    said, cause = error, error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError | sqlite3.Error):
            said = cause
        cause = cause.__cause__ or cause.__context__
    lines = str(said).strip().splitlines()
    return f"{type(said).__name__}: {lines[0][:200]}" if lines else type(said).__name__


def _without_credentials(text: str) -> str:
    return re.sub(r"//[^/\s]*@", "//", text)
