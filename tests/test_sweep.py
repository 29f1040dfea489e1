"""A sweep: checked whole, tracked as a parent and its children, each plan run once, one table at the end."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn
from launched import Sweep, journalled, rows, tracked

from selfspec import sweep_context
from selfspec.checkpoint import FILE
from selfspec.engine.fake.engine import FakeEngine
from selfspec.report import results
from selfspec.sweep import callback as sweep
from selfspec.tracking import MLflowTracker
from selfspec.tracking import mlflow as mlflow_tracker
from selfspec.types import Completion, Request

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str, str]]
write_result = results.write_result


@pytest.fixture
def fake(fake: list[str]) -> list[str]:
    """Of a model with layers enough for every experiment."""
    return [*fake, "model.layers=30"]


@pytest.fixture
def run(run: Run, fake: list[str]) -> Run:
    """The command line with those overrides before its own."""
    return partial(run, *fake)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The K of every call of the engine."""
    calls = list[int]()
    generate = FakeEngine.generate

    def spy(self: FakeEngine, requests: list[Request], *, plain: bool = False) -> list[Completion]:
        calls.append(self.plan.controller.K)
        return generate(self, requests, plain=plain)

    monkeypatch.setattr(FakeEngine, "generate", spy)
    return calls


def folders(tmp_path: Path) -> list[Path]:
    """Of the sweeps, in the order they began."""
    return sorted(file.parent for file in tmp_path.rglob(sweep_context.FILE))


def test_one_parent_three_children_and_the_same_ones_again(
    run: Run, uri: str, tmp_path: Path, generated: list[int]
) -> None:
    tracking = ("tracking=mlflow", f"tracking.uri={uri}", "tracking.experiment=three")
    code, out, err = run("-m", *tracking, "K=1,2,3")
    assert (code, err) == (0, "")
    assert set(Counter(generated).values()) == {8} and set(generated) == {1, 2, 3}
    (folder,) = folders(tmp_path)
    assert [row["label"] for row in rows(folder)] == [f"layerskip3 K={k}" for k in (1, 2, 3)]
    assert all(out.count(f"| layerskip3 K={k} |") == 2 for k in (1, 2, 3)), "as it finishes, and in the last table"
    files = {"summary.csv", "accept.tsv", "report.txt", "tok_s.png", "acceptance.png"}
    assert files <= {path.name for path in folder.iterdir()}

    parent, children = tracked(uri, "three")
    assert [child.data.params["controller.K"] for child in children] == ["1", "2", "3"]
    assert {found.info.status for found in (parent, *children)} == {"FINISHED"}
    assert json.loads((folder / sweep_context.FILE).read_text())["run_id"] == parent.info.run_id
    assert files <= {path.name for path in (Path(parent.info.artifact_uri.removeprefix("file://"))).iterdir()}
    before = {child.info.run_id: child.data for child in children}

    generated.clear()
    code, out, err = run("-m", *tracking, "K=3,2,1")
    assert (code, err, generated) == (0, "", [])
    again, children = tracked(uri, "three")
    assert again.info.run_id == parent.info.run_id and {child.info.run_id for child in children} == set(before)
    assert all(child.data.metrics == before[child.info.run_id].metrics for child in children)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    for child in children:
        steps = {key: [m.step for m in client.get_metric_history(child.info.run_id, key)] for key in child.data.metrics}
        assert all(len(set(found)) == len(found) for found in steps.values())
    assert len(rows(folders(tmp_path)[1])) == 3


@pytest.mark.parametrize("more", ["checkpoint.resume=auto", "checkpoint.resume=never"])
def test_jobs_that_come_to_one_plan_run_once(run: Run, tmp_path: Path, generated: list[int], more: str) -> None:
    code, _, err = run("-m", "gate=none", "tau=.3,.4,.5", more)
    assert (code, err) == (0, "warning: tau has no effect in this combination\n")
    assert len(generated) == 8 and set(journalled(tmp_path).values()) == {1} and len(journalled(tmp_path)) == 3
    assert len(rows(folders(tmp_path)[0])) == 1


def test_a_launcher_keeps_no_config_of_jobs_that_have_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, ended = list[JobReturn](), sweep.Sweep.on_job_end

    def noted(self: sweep.Sweep, job_return: JobReturn, **options: Any) -> None:
        assert job_return.cfg is not None and job_return.hydra_cfg is not None
        kept.append(job_return)
        ended(self, job_return=job_return, **options)

    monkeypatch.setattr(sweep.Sweep, "on_job_end", noted)
    assert run("-m", "K=1,2")[0] == 0
    assert [(job.cfg, job.hydra_cfg) for job in kept] == [(None, None)] * 2 and all(job.return_value for job in kept)


def test_a_handle_that_some_jobs_heed_is_not_warned_about(run: Run) -> None:
    assert run("-m", "draft=none,layerskip", "K=2")[::2] == (0, "")


def failing(monkeypatch: pytest.MonkeyPatch, k: int, changes_tokens: bool) -> None:
    """One job's engine fails, or gives other tokens than plain decoding."""
    generate = FakeEngine.generate

    def wrong(self: FakeEngine, requests: list[Request], *, plain: bool = False) -> list[Completion]:
        made = generate(self, requests, plain=plain)
        if k != self.plan.controller.K or plain:
            return made
        if not changes_tokens:
            raise RuntimeError("out of memory")
        return [replace(completion, tokens=completion.tokens[:-1]) for completion in made]

    monkeypatch.setattr(FakeEngine, "generate", wrong)


def test_a_sweep_over_experiments_has_one_folder_and_one_table(run: Run, tmp_path: Path) -> None:
    code, _, err = run("-m", "experiment=baseline,baseline_sanity", "draft=none")
    assert code == 0, err
    (folder,) = folders(tmp_path)
    assert len(list(folder.glob(f"*/{results.FILE}"))) == 2 and len(rows(folder)) == 2


@pytest.mark.parametrize("changes_tokens", [False, True])
def test_a_failing_job_hides_no_other_and_is_not_hidden(
    run: Run, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes_tokens: bool
) -> None:
    experiment = f"failing-{changes_tokens}"
    argv = ("-m", "tracking=mlflow", f"tracking.uri={uri}", f"tracking.experiment={experiment}", "K=2,3")
    with monkeypatch.context() as patch:
        failing(patch, 2, changes_tokens)
        code, out, err = run(*argv)
    assert code == 1 and err.count("Traceback") == (not changes_tokens)
    assert ("out of memory" in err) == (not changes_tokens) and "FAILED" in out
    table = rows(folders(tmp_path)[0])
    assert [(row["label"], row["status"]) for row in table] == [
        ("layerskip3 K=2", "failed"),
        ("layerskip3 K=3", "finished"),
    ]
    assert ("differ" if changes_tokens else "out of memory") in table[0]["error"]
    assert bool(table[0]["bench/speedup"]) == changes_tokens, "what it measured is kept"
    parent, children = tracked(uri, experiment)
    assert [found.info.status for found in (parent, *children)] == ["FAILED", "FAILED", "FINISHED"]

    code, _, _ = run(*argv)  # mended: the rest is carried on with; a verdict in the journal stands
    again, children = tracked(uri, experiment)
    statuses = ["FAILED" if changes_tokens else "FINISHED", "FINISHED"]
    assert code == int(changes_tokens) and [child.info.status for child in children] == statuses
    assert again.info.run_id == parent.info.run_id
    assert again.info.status == ("FAILED" if changes_tokens else "FINISHED")


def test_a_job_alone_that_changes_tokens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 4, changes_tokens=True)
    code, out, err = run("K=4")
    assert code == 1 and "| FAILED " in out
    assert err.endswith("error: layerskip3 K=4: not lossless: 3 prompts differ from plain decoding\n")


@pytest.mark.filterwarnings("ignore:Callback Sweep.on_multirun_end raised")
def test_a_report_that_fails_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError("no pixels")

    monkeypatch.setattr(results, "read", broken)
    code, _, err = run("-m", "K=1,2")
    assert code == 1 and "no pixels" in err


def test_an_experiment_sweeps_without_being_asked_to_unless_something_else_is_asked_for(
    run: Run, tmp_path: Path
) -> None:
    code, _, err = run("experiment=k_sweep", "draft=layerskip", "gate=none")
    assert (code, err) == (0, "")
    assert run("experiment=k_sweep", "draft=layerskip", "K=5,7")[0] == 0
    first, second = folders(tmp_path)
    assert first.parts[-3:-1] == ("k_sweep", "sweeps")
    assert [row["controller.K"] for row in rows(first)] == ["1", "2", "3", "4", "6", "8"]
    assert [row["controller.K"] for row in rows(second)] == ["5", "7"]


def test_a_tracker_that_is_down_fails_no_sweep(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ConnectionError("the server is down")

    for method in ("start", "sweep_parent"):
        monkeypatch.setattr(MLflowTracker, method, broken)
    code, _, err = run("-m", "tracking=mlflow", "tracking.uri=http://127.0.0.1:9", "K=1,2")
    assert code == 0 and set(err.splitlines()) == {
        "warning: not tracking to http://127.0.0.1:9: ConnectionError: the server is down"
    }
    assert len(rows(folders(tmp_path)[0])) == 2


def test_what_an_override_refers_to_is_the_jobs_to_look_up(
    run: Run, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "hush-hush")
    monkeypatch.setattr(mlflow_tracker, "_NAME", 8000)
    to = ("tracking=mlflow", f"tracking.uri={uri}", "tracking.experiment=secret")
    code, out, err = run("-m", *to, "serve.api_key=${oc.env:MY_KEY}", "exit_layer=${K}", "K=1,2")
    assert (code, err) == (0, "") and all(f"layerskip{k} K={k}" in out for k in (1, 2))
    (folder,) = folders(tmp_path)
    noted = json.loads((folder / sweep_context.FILE).read_text())
    assert set(noted["plans"]) == {found["plan_id"] for found in results.find(folder)}
    parent, _ = tracked(uri, "secret")
    assert "serve.api_key=${oc.env:MY_KEY}" in parent.info.run_name and "hush" not in out
    files = [path for path in (*tmp_path.rglob("*"), *Path(uri.removeprefix("sqlite:///")).parent.rglob("*"))]
    assert not [path for path in files if path.is_file() and b"hush-hush" in path.read_bytes()]


def test_interrupted_at_its_report_it_is_killed_in_mlflow(run: Run, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("-m", "tracking=mlflow", f"tracking.uri={uri}", "tracking.experiment=interrupted", "K=1,2")
    with monkeypatch.context() as patch:
        patch.setattr(MLflowTracker, "mark_orphans_failed", lambda *args: os.kill(os.getpid(), signal.SIGINT))
        code, _, err = run(*argv)
    assert (code, err) == (130, "SIGINT: finished work is kept; the same command carries on\n")
    parent, children = tracked(uri, "interrupted")
    assert [found.info.status for found in (parent, *children)] == ["KILLED", "FINISHED", "FINISHED"]
    assert run(*argv)[0] == 0 and tracked(uri, "interrupted")[0].info.status == "FINISHED"


@pytest.mark.filterwarnings("ignore:Callback Sweep.on_multirun_end raised")
def test_a_job_without_a_result_is_missed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        results, "write_result", lambda folder, result: "K=2" in result["label"] or write_result(folder, result)
    )
    code, out, err = run("-m", "K=1,2")
    assert code == 1 and "| layerskip3 K=1 |" in out
    assert err == f"error: {folders(tmp_path)[0]}: 1 of 2 jobs have left no result\n"


def test_what_is_swept_over_need_not_work_without_it(fake: list[str], uri: str, tmp_path: Path) -> None:
    """The config of the sweep itself, with the draft that is none of its jobs', is no job's."""
    ours = [each for each in fake if not each.startswith(("draft=", "tracking="))]
    tracking = ("tracking=mlflow", f"tracking.uri={uri}", "tracking.experiment=swept")
    argv = [sys.executable, "-m", "selfspec.run", "-m", *ours, *tracking, "draft=layerskip,none"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    parent, children = tracked(uri, "swept")
    assert [found.info.status for found in (parent, *children)] == ["FINISHED"] * 3
    assert "summary.csv" in {path.name for path in Path(parent.info.artifact_uri.removeprefix("file://")).iterdir()}


@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_a_folder_that_an_earlier_sweep_has_used(run: Run, tmp_path: Path, generated: list[int], launcher: str) -> None:
    """Its jobs are in no table but its own, and ``never`` begins anew."""
    mine = (f"hydra.sweep.dir={tmp_path / 'mine'}", "hydra.sweep.subdir='${hydra.job.num} of K=${K}'")
    argv = ("-m", *mine, f"hydra/launcher={launcher}", "checkpoint.resume=never")
    code, _, err = run(*argv, "K=1,2,3")
    assert code == 0, err
    before = {path: path.read_text() for path in tmp_path.rglob(FILE)}
    code, out, err = run(*argv, "K=2,1")
    assert code == 0, err
    assert [row["label"] for row in rows(tmp_path / "mine")] == ["layerskip3 K=2", "layerskip3 K=1"]
    assert [path.parent.name for path in sorted((tmp_path / "mine").rglob(results.FILE))] == [
        *("0 of K=1", "0 of K=2", "1 of K=1", "1 of K=2", "2 of K=3"),
    ]
    assert "K=3" not in out and len(list(tmp_path.rglob("journal.1.jsonl"))) == 2
    assert [path.read_text() == text for path, text in before.items()].count(True) == 1


def test_a_job_that_dies_is_not_hidden_by_what_was_in_its_folder(fake: list[str], tmp_path: Path) -> None:
    argv = ["hydra/launcher=local", *fake, f"hydra.sweep.dir={tmp_path / 'mine'}", "K=1,2"]
    assert Sweep(tmp_path, *argv).run()[0] == 0
    code, said = Sweep(tmp_path, *argv, "tau=0.1", "scale.prompts=5", dies="K=2").run()
    assert code == 1 and "job 1 K=2: killed by SIGKILL" in said
    assert [row["status"] for row in rows(tmp_path / "mine")] == ["finished", "failed"]
