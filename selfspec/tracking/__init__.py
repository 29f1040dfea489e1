"""Where runs are logged: the :class:`Tracker` protocol, MLflow, and none.

A tracker is a mirror of the journal, never a part of the experiment. So three things hold:

- it never fails a job: at its first failure it says so once on stderr and goes quiet (:class:`BestEffortTracker`);
- logging is idempotent: after a resume a job logs everything it has again, and nothing is stored twice;
- MLflow is imported when a run starts, not before, and its client is used directly: no active run, no
  global tracking URI.
"""

import os
from pathlib import Path

from selfspec import config as schema
from selfspec import credentials
from selfspec.errors import ConfigError
from selfspec.tracking.base import (
    JOURNAL_TAG,
    PARENT_TAG,
    PLAN_TAG,
    SWEEP_TAG,
    BestEffortTracker,
    NoTracker,
    Status,
    Tracker,
)
from selfspec.tracking.mlflow import ENVIRONMENT, MLflowTracker, local_uri

__all__ = [
    "JOURNAL_TAG",
    "PARENT_TAG",
    "PLAN_TAG",
    "SWEEP_TAG",
    "BestEffortTracker",
    "MLflowTracker",
    "NoTracker",
    "Status",
    "Tracker",
    "make",
]


def make(tracking: schema.Tracking, output_dir: Path) -> Tracker:
    """The tracker that a config asks for; nothing is opened yet.

    Without a ``uri`` it is ``$MLFLOW_TRACKING_URI``, or ``mlflow.db`` in ``output_dir``.

    Args:
        tracking: which tracker, where.
        output_dir: has the store where none is named; a new experiment in a local store keeps its artifacts in
            ``mlartifacts`` below it.

    Raises:
        ConfigError: a URI that MLflow cannot log to.
    """
    if tracking.name is schema.TrackerName.none:
        return NoTracker()
    given, key = (tracking.uri, "tracking.uri") if tracking.uri else (os.environ.get(ENVIRONMENT), ENVIRONMENT)
    uri = given or local_uri(output_dir / "mlflow.db")
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise ConfigError(
            f"{key}={credentials.without(uri)}: must be sqlite:///<file>, http(s)://<server> or another database URI"
        )
    if tracking.uri and credentials.in_url(tracking.uri):  # configs are kept and shown
        raise ConfigError(
            f"tracking.uri={credentials.without(uri)}: must hold no credentials; "
            "use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or give it as MLFLOW_TRACKING_URI"
        )
    return BestEffortTracker(MLflowTracker(uri, tracking.experiment, output_dir / "mlartifacts"), uri)
