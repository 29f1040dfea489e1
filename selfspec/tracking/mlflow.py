"""Runs in MLflow, by its client: no active run, no global tracking URI. MLflow is imported when a run starts."""

import logging
import math
import os
import re
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from filelock import FileLock

from selfspec.config import flatten, home
from selfspec.tracking.base import JOURNAL_TAG, PARENT_TAG, PLAN_TAG, SWEEP_TAG, Status

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_PLAIN = "/ #&=+:;,@~!$'()*[]"
"""What may stand in the path of a SQLite URL as it is."""
_BATCH = 1000  # MLflow takes no more metrics in one call
_PARAM_BATCH = 100  # ... and no more params or tags
_NAME = 250  # what a run's name may have in a database that heeds its columns' widths, as PostgreSQL does
_FLUSH_S = 30.0  # how far a live view may lag behind
_LOCK_S = 600.0  # for which a job waits at most; who dies gives it back
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
ENVIRONMENT = "MLFLOW_TRACKING_URI"
"""MLflow's own word for where runs are logged."""
_TRIES = 4  # at a database that cannot be opened: three seconds; MLflow's own ten take two minutes
_SQLITE = re.compile(r"(?P<scheme>sqlite(?:\+\w+)?:///)(?P<path>[^?:][^?]*)(?P<query>\?.*)?")


class MLflowTracker:
    """Logs to an MLflow store: a local SQLite file or a server. Raises what MLflow raises.

    What writes to a SQLite file does so under a lock: SQLite itself lets a writer that others keep ahead of wait for 20
    seconds, and 64 jobs on one store keep it longer (``tests/benchmarks/tracked.py``).
    """

    def __init__(self, uri: str, experiment: str, artifact_root: Path) -> None:
        """Opens nothing yet.

        Args:
            uri: ``sqlite:///...`` (made absolute, its folder created; ``%3F`` stands for a ``?`` of the path, ``%25``
                for a ``%``) or any other MLflow tracking URI.
            experiment: name; created if there is none.
            artifact_root: where a new experiment of a local SQLite store keeps its artifacts.
        """
        self._uri, self._database, self._query = _parsed(uri)
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
        with self._lock:
            return self._start(name, tags, params, run_id, parent)

    def _start(
        self, name: str, tags: Mapping[str, str], params: Mapping[str, object], run_id: str | None, parent: str | None
    ) -> str | None:
        from mlflow.entities import Param

        run = self._find(run_id) if run_id else self._find_by(JOURNAL_TAG, tags)
        if run is None:
            run = self._client.create_run(self._experiment_id, run_name=name, tags=dict(tags))
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._run_id, self._parent, self._buffer = run.info.run_id, parent, []
        self.set_tags({**tags, PARENT_TAG: parent} if parent else tags)
        new = [Param(key, str(value)) for key, value in flatten(params).items() if key not in run.data.params]
        self._send(_PARAM_BATCH, params=new)
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
        with self._lock:
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

        self._send(_PARAM_BATCH, tags=[RunTag(key, value) for key, value in tags.items()])

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
        with self._lock:
            self._client.set_terminated(self._run_id, status, timestamp_ms)
            if self._parent:
                self._settle(self._parent)

    def mark_orphans_failed(self, parent: str, plan_ids: Collection[str]) -> None:
        """See :class:`Tracker`."""
        running = f"tags.`{PARENT_TAG}` = '{parent}' and attributes.status = 'RUNNING'"
        with self._lock:
            for run in self._client.search_runs([self._experiment_id], running):
                if run.data.tags.get(PLAN_TAG) in plan_ids:
                    self._client.set_terminated(run.info.run_id, "FAILED")

    @cached_property
    def _client(self) -> "MlflowClient":
        client = _import_client(self._uri)
        uri = self._uri if self._database is None else f"{_openable(self._database)}{self._query}"
        with self._lock:  # two processes that create the tables at once would trip over each other
            return client(tracking_uri=uri)

    @cached_property
    def _experiment_id(self) -> str:
        with self._lock:
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

    @cached_property
    def _lock(self) -> AbstractContextManager[object]:
        """Of a local store; a server has none, nor needs one."""
        if self._database is None:
            return nullcontext()
        place = Path(f"{self._database}.lock")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()  # FileLock would wait for a file that cannot be made
        return FileLock(place, timeout=_LOCK_S)

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
        self._send(_BATCH, metrics=self._buffer)
        self._buffer = []
        self._flushed = time.monotonic()

    def _send(self, most: int, **entries: Any) -> None:
        """Entries of one kind, so many in a call."""
        ((kind, new),) = entries.items()
        for i in range(0, len(new), most):
            with self._lock:
                self._client.log_batch(self._run_id, **{kind: new[i : i + most]})

    def _settle(self, parent: str) -> None:
        # Whoever finishes last sees all the others finished: each child ends itself before it looks.
        if not any(self._has_child(parent, status) for status in ("RUNNING", "SCHEDULED")):
            worst = next((s for s in ("FAILED", "KILLED") if self._has_child(parent, s)), "FINISHED")
            self._client.set_terminated(parent, worst)

    def _has_child(self, parent: str, status: str) -> bool:
        """Asks for one at most: a page of them is a thousand, with all that was logged of each."""
        wanted = f"tags.`{PARENT_TAG}` = '{parent}' and attributes.status = '{status}'"
        return bool(self._client.search_runs([self._experiment_id], wanted, max_results=1))


def _import_client(uri: str) -> "type[MlflowClient]":
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())  # it may be imported already
    if "://" in uri and not uri.startswith(("http", "databricks")):  # a database
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = min(utils.MAX_RETRY_COUNT, _TRIES)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of every retry
    return MlflowClient


def local_uri(path: Path) -> str:
    """A store in a file: a path is no URL, so what a URL reads otherwise is quoted."""
    return f"sqlite:///{quote(str(path), safe=_PLAIN)}"


def _parsed(uri: str) -> tuple[str, Path | None, str]:
    """The URI; of a SQLite one, the file in full and the query, too."""
    match = _SQLITE.fullmatch(uri)
    if match is None:
        return uri, None, ""
    return uri, Path(home("tracking.uri", unquote(match["path"]))).absolute(), match["query"] or ""


def _openable(path: Path) -> str:
    """What SQLAlchemy opens as this file: only from 2.1 on does it take quotes out of a path.

    Raises:
        OSError: it cannot be told of such a path.
    """
    from sqlalchemy import make_url

    if not {"?", "%"} & {*str(path)}:
        return f"sqlite:///{path}"
    unquotes = make_url("sqlite:////%3F").database == "/?"
    if not unquotes and "?" in str(path):
        raise OSError(f"{path}: MLflow cannot keep a store in a folder with a question mark in its name")
    # With a driver named, MLflow does not make the folder that the quoted path seems to name.
    return f"sqlite+pysqlite:///{quote(str(path), safe=_PLAIN) if unquotes else path}"


def _oldest(runs: "list[Run]") -> str:
    return str(min(runs, key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id)
