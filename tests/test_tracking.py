"""Against a real SQLite store, shared by the module because making one costs seconds, and against broken ones."""

import logging
import shutil
import signal
import socket
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from selfspec import config, tracking
from selfspec.config import flatten
from selfspec.errors import ConfigError, Interrupted
from selfspec.tracking import BestEffortTracker, MLflowTracker, NoTracker, Tracker
from selfspec.tracking import mlflow as mlflow_tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out put #1")


@pytest.fixture(scope="module")
def uri(root: Path) -> str:
    return f"sqlite:///{root}/db/mlflow.db"


@pytest.fixture(scope="module")
def client(root: Path, uri: str) -> "MlflowClient":
    MLflowTracker(uri, "tests", root / "mlartifacts").sweep_parent("warm-up", "warm-up")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.fixture
def tracker(root: Path, uri: str, client: "MlflowClient") -> MLflowTracker:
    """Unshielded, so that a test sees what fails."""
    return MLflowTracker(uri, "tests", root / "mlartifacts")


def make(uri: str, root: Path) -> Tracker:
    return tracking.make(config.Tracking(name=config.TrackerName.mlflow, uri=uri, experiment="tests"), root)


def start(tracker: Tracker, run_id: str | None = None, parent: str | None = None, **params: object) -> str:
    started = tracker.start("job", {"plan_id": "p1"}, params, run_id, parent)
    assert started is not None
    return started


def test_a_long_command_line_makes_no_name_that_a_database_refuses(
    tracker: MLflowTracker, client: "MlflowClient"
) -> None:
    parent = tracker.sweep_parent("long", "main: seed=" + ",".join(map(str, range(400))))
    assert parent is not None
    name = client.get_run(parent).info.run_name
    assert name.startswith("main: seed=0,1,2") and name.endswith("...") and len(name) <= 250


def exercise(tracker: Tracker, folder: Path) -> None:
    """Everything a job and a sweep do."""
    parent = tracker.sweep_parent("sweep", "sweep")
    assert tracker.start("job", {"a": "b"}, {"tau_v": 4}, "0" * 32, parent) is None
    tracker.log({"bench/tok_s": 1.0}, step=0, timestamp_ms=1)
    tracker.set_tags({"verdict": "yes"})
    tracker.artifacts([folder])
    tracker.finish("FINISHED")
    tracker.mark_orphans_failed("0" * 32, {"plan"})


def test_a_run_holds_what_was_logged(
    tracker: MLflowTracker, client: "MlflowClient", root: Path, tmp_path: Path
) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.txt").write_text("x")
    run_id = start(tracker, gate={"name": "varH", "threshold": 4.0}, seed=0)
    tracker.log({"bench/tok_s": 101.5, "bench/ties": 2}, step=3, timestamp_ms=1_700_000_000_000)
    tracker.log({key: float(key) for key in ("nan", "inf", "-inf")}, step=3, timestamp_ms=1_700_000_000_000)
    tracker.set_tags({"verdict": "yes"})
    tracker.artifacts([tmp_path])
    tracker.finish("FINISHED")

    run = client.get_run(run_id)
    assert run.info.run_name == "job"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"gate.name": "varH", "gate.threshold": "4.0", "seed": "0"}
    assert run.data.tags.items() >= {"plan_id": "p1", "verdict": "yes"}.items()
    assert run.data.metrics == {"bench/tok_s": 101.5, "bench/ties": 2.0}
    (point,) = client.get_metric_history(run_id, "bench/tok_s")
    assert (point.step, point.timestamp) == (3, 1_700_000_000_000)
    assert (root / "mlartifacts" / run_id / "artifacts" / "plots" / "a.txt").read_text() == "x"


def test_logging_everything_again_after_a_resume_adds_nothing(tracker: MLflowTracker, client: "MlflowClient") -> None:
    def log(steps: int) -> None:
        for step in range(steps):
            tracker.log({"a": step / 2, "b": 1.0}, step, 1_700_000_000_000 + step)

    run_id = start(tracker)
    log(700)  # more than one batch
    tracker.finish("KILLED")
    assert client.get_run(run_id).info.status == "KILLED"

    assert start(tracker, run_id) == run_id
    assert client.get_run(run_id).info.status == "RUNNING"
    log(800)  # a batch of old points, one of old and new ones
    tracker.finish("FINISHED")
    assert client.get_run(run_id).info.status == "FINISHED"
    for key in ("a", "b"):
        assert [point.step for point in client.get_metric_history(run_id, key)] == list(range(800))


def test_a_full_buffer_is_sent_before_the_end(tracker: MLflowTracker, client: "MlflowClient") -> None:
    run_id = start(tracker)
    for step in range(1000):
        tracker.log({"a": 1.0}, step, step)
    assert client.get_run(run_id).data.metrics == {"a": 1.0}
    tracker.finish("FINISHED")


def test_params_of_a_resumed_run_stand_and_new_ones_join_them(tracker: MLflowTracker, client: "MlflowClient") -> None:
    run_id = start(tracker, tau_v=4, long="x" * 7000, many={str(i): i for i in range(150)})
    tracker.finish("FINISHED")
    start(tracker, run_id, tau_v=5, K=8)
    tracker.finish("FINISHED")
    params = client.get_run(run_id).data.params
    assert (params["tau_v"], params["K"], params["many.149"]) == ("4", "8", "149")


@pytest.mark.parametrize("run_id", ["0" * 32, "not a run id", "../x", "deleted"])
def test_a_run_the_store_does_not_have_is_made_anew(
    tracker: MLflowTracker, client: "MlflowClient", run_id: str
) -> None:
    if run_id == "deleted":
        run_id = start(tracker)
        tracker.finish("FINISHED")
        client.delete_run(run_id)
    assert start(tracker, run_id) != run_id
    tracker.finish("FINISHED")


def test_a_sweep_has_one_parent_whose_status_follows_its_children(
    tracker: MLflowTracker, client: "MlflowClient", uri: str, root: Path
) -> None:
    def status() -> str:
        return str(client.get_run(parent).info.status)

    other = MLflowTracker(uri, "tests", root / "mlartifacts")
    parent = tracker.sweep_parent("it's one", "my sweep") or ""
    assert other.sweep_parent("it's one", "my sweep") == parent
    assert other.sweep_parent("another", "my sweep") != parent

    first, second = start(tracker, parent=parent), start(other, parent=parent)
    assert client.get_run(first).data.tags[tracking.PARENT_TAG] == parent
    tracker.finish("FINISHED")
    assert status() == "RUNNING"
    other.finish("FAILED")
    assert status() == "FAILED"
    assert start(other, second, parent) == second
    assert status() == "RUNNING"
    other.finish("FINISHED")
    assert status() == "FINISHED"


def test_runs_of_jobs_that_died_are_ended(tracker: MLflowTracker, client: "MlflowClient") -> None:
    parent = tracker.sweep_parent("with a dead job", "sweep") or ""
    runs = [tracker.start(plan, {tracking.PLAN_TAG: plan}, {}, None, parent) or "" for plan in ("dead", "well")]
    tracker.finish("FINISHED")
    tracker.mark_orphans_failed(parent, {"dead", "well"})
    assert [client.get_run(run).info.status for run in runs] == ["FAILED", "FINISHED"]


def test_jobs_that_ask_at_once_get_one_parent(
    client: "MlflowClient", uri: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_tracker, "_LOCK_S", 1e6)

    def ask(_: int) -> str | None:
        return MLflowTracker(uri, "tests", root / "mlartifacts").sweep_parent("at once", "sweep")

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    assert len(client.search_runs(["1"], f"tags.`{tracking.SWEEP_TAG}` = 'at once'")) == 1


def test_a_relative_store_lies_in_the_working_folder(
    client: "MlflowClient", root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    relative = MLflowTracker("sqlite:///db/mlflow.db", "tests", Path("mlartifacts"))
    monkeypatch.chdir(tmp_path)  # where it is opened does not matter
    run_id = start(relative)
    relative.finish("FINISHED")
    assert client.get_run(run_id).info.status == "FINISHED"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://me:secret@127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["closed", "silent", "no database", "no folder", "other schema", "unknown scheme"])
def test_a_broken_tracker_warns_once_and_fails_nothing(
    kind: str,
    client: "MlflowClient",
    closed_port: int,
    silent_server: str,
    root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    (tmp_path / "text.db").write_text("no database " * 100)
    shutil.copy(root / "db" / "mlflow.db", tmp_path / "other.db")
    with closing(sqlite3.connect(tmp_path / "other.db")) as database, database:
        database.execute("update alembic_version set version_num = 'of another MLflow'")
    uri = {
        "closed": f"http://me:secret@127.0.0.1:{closed_port}",
        "silent": silent_server,
        "no database": f"sqlite:///{tmp_path}/text.db",
        "no folder": f"sqlite:///{tmp_path}/text.db/mlflow.db",
        "other schema": f"sqlite:///{tmp_path}/other.db",
        "unknown scheme": "nosuch://me:secret@host",
    }[kind]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # where credentials may stand
    exercise(tracking.make(config.Tracking(name=config.TrackerName.mlflow), tmp_path), tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith(f"warning: not tracking to {uri.replace('me:secret@', '')}: ")
    assert "secret" not in err


def test_a_tracker_that_breaks_halfway_goes_quiet(
    client: "MlflowClient", uri: str, root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = make(uri, root)
    run_id = start(tracker)
    client.delete_run(run_id)
    tracker.set_tags({"verdict": "yes"})
    tracker.log({"a": 1.0}, 0, 0)
    tracker.artifacts([tmp_path])
    tracker.finish("FINISHED")
    assert tracker.sweep_parent("sweep", "sweep") is None
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "must be in the 'active' state" in err


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupting(NoTracker):
        def finish(self, status: tracking.Status, timestamp_ms: int | None = None) -> None:
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        BestEffortTracker(Interrupting(), "uri").finish("FINISHED")


def test_a_healthy_tracker_says_nothing(
    client: "MlflowClient", uri: str, root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = make(uri, root)
    start(tracker, tau_v=4)
    tracker.log({"a": 1.0}, 0, 0)
    tracker.artifacts([tmp_path])
    tracker.finish("FINISHED")
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("mlflow").level >= logging.ERROR


def test_none_tracks_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = tracking.make(config.Tracking(), tmp_path)
    assert isinstance(tracker, NoTracker)
    exercise(tracker, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        *((uri, r"^tracking\.uri=.*: must be sqlite") for uri in ("mlruns", "file:///tmp/mlruns", "./mlflow.db")),
        ("http://me:secret@host", r"^tracking\.uri=http://host: must hold no credentials"),
        *(
            (uri, r"^tracking\.uri=[^3]*: must hold no credentials")
            for uri in (
                *("https://host/?token=s3cr3t", "https://host/x#s3cr3t", "https://host/;key=s3cr3t"),
                *("postgresql://host/db?user=me&password=s3cr3t", "postgresql://me:s3/cr3t@host/db"),
                *("mysql+pymysql://host/db?charset=utf8mb4&pass%77d=s3cr3t", "sqlite:///a.db?mode=ro&key=s3cr3t"),
            )
        ),
    ],
)
def test_a_uri_that_will_not_do_is_refused(uri: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        make(uri, tmp_path)


@pytest.mark.parametrize(
    "uri", ["postgresql://host:5432/db?sslmode=require", "http://host:5000/a@b", "sqlite:////home/a@b/#1;/x.db?mode=ro"]
)
def test_a_uri_without_credentials_will_do(uri: str, tmp_path: Path) -> None:
    assert make(uri, tmp_path) is not None


def test_flatten() -> None:
    assert flatten({"a": 1, "b": {"c": {"d": [2]}, "e": None}}) == {"a": 1, "b.c.d": [2], "b.e": None}


@pytest.mark.parametrize("name", ["q?x", "p%20z", "q?x=1&cache=shared #é"])
def test_a_path_is_no_url(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / name
    tracker = tracking.make(config.Tracking(name=config.TrackerName.mlflow), folder)
    start(tracker)
    tracker.finish("FINISHED")
    assert capfd.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == [name] and (folder / "mlflow.db").stat().st_size > 0


def test_without_a_uri_it_is_mlflows_own_or_a_file_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config.Tracking(name=config.TrackerName.mlflow)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI=\./mlruns: must be sqlite"):
        tracking.make(asked, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/theirs.db")
    start(tracking.make(asked, tmp_path / "ours"))
    assert (tmp_path / "theirs.db").exists() and not (tmp_path / "ours" / "mlflow.db").exists()
