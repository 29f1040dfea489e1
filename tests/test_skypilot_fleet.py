"""Which managed jobs are launched, attached to and given up on, by a script of what SkyPilot says."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import StringIO
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from plans import planned
from rich.console import Console

from hydra_plugins.skypilot_launcher import _fleet, _table, _task
from hydra_plugins.skypilot_launcher._fleet import Fleet, Job
from hydra_plugins.skypilot_launcher.config import SkyPilotConf
from selfspec.config import Resume
from selfspec.errors import ConfigError, LaunchError
from selfspec.plan import Plan
from selfspec.report import results
from selfspec.sweep_context import SweepContext

SETTINGS = SkyPilotConf(poll_s=0.0, infra="gcp")


class Script:
    """Jobs that go through ``states``, one at each look; then SUCCEEDED, with a result unless their number is given."""

    def __init__(self, jobs: Sequence[Job], states: Sequence[str] = ("RUNNING",), without: Sequence[int] = ()) -> None:
        self.jobs, self.states, self.without = {job.task["name"]: job for job in jobs}, states, without
        self.launched = list[str]()
        self.known = list[dict[str, Any]]()
        self.looks = dict[int, int]()
        self.most = 0
        self.away: Iterator[bool] = iter(())

    def ask(self, do: str, **request: Any) -> Any:
        if do == "logs":
            return [f"last words of {request['id']}"]
        if do == "launch":
            names = [task["name"] for task in request["tasks"]]
            self.launched += names
            return [{"id": 100 + self.launched.index(name)} for name in names]
        if request.get("prefix"):
            return self.known
        if next(self.away, False):
            raise LaunchError("SkyPilot: no route to host")
        self.most = max(self.most, len(request["ids"]))
        return [self.look(id) for id in request["ids"]]

    def look(self, id: int) -> dict[str, Any]:
        seen = self.looks[id] = self.looks.get(id, -1) + 1
        state = self.states[seen] if seen < len(self.states) else "SUCCEEDED"
        name = self.launched[id - 100] if id >= 100 else next(k["name"] for k in self.known if k["id"] == id)
        if state == "SUCCEEDED" and self.jobs[name].numbers[0] not in self.without:
            finish(self.jobs[name].plan)
        return record(id, name, state)


def record(id: int, name: str, state: str) -> dict[str, Any]:
    over = state in ("SUCCEEDED", "FAILED", "FAILED_NO_RESOURCE", "CANCELLED")
    reason = "no machine anywhere" if state == "FAILED_NO_RESOURCE" else ""
    return {"id": id, "name": name, "state": state, "over": over, "recoveries": 0, "where": "gcp", "reason": reason}


def finish(made: Plan, **changes: Any) -> None:
    """Leaves a result in the store, as a job does."""
    leave(made, json.dumps({**results.empty_result(made, {}), "measurements": {"bench/speedup": 2.0}, **changes}))


def leave(made: Plan, text: str) -> None:
    folder = Path(made.checkpoint.dir) / "plans" / made.id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(text)


@pytest.fixture
def jobs(fake: list[str], tmp_path: Path) -> list[Job]:
    """Twenty."""
    made = planned(*fake, f"checkpoint.dir={tmp_path / 'store'}")
    plans = [replace(made, seed=seed) for seed in range(20)]
    return [Job(p, {"name": _task.name(p)}, [at], [tmp_path / "sweep" / str(at)]) for at, p in enumerate(plans)]


def run(sky: Script, jobs: Sequence[Job], settings: SkyPilotConf = SETTINGS) -> str:
    """To the end; what was shown of it."""
    said = StringIO()
    with _table.live(Console(file=said, width=400)) as show:
        fleet = Fleet(sky, settings, jobs, show)
        fleet.start(["HF_TOKEN"])
        fleet.watch(["HF_TOKEN"])
    return said.getvalue()


def test_what_is_done_is_left_alone_what_runs_is_joined_what_failed_is_launched_again(jobs: list[Job]) -> None:
    done, running, failed, new, lost = jobs[:5]
    finish(done.plan)
    sky = Script(jobs[:5])
    names = [job.task["name"] for job in jobs]
    sky.known = [
        record(9, names[1], "RUNNING"),  # the latest counts, in whatever order they are told
        record(3, names[1], "FAILED"),
        record(4, names[2], "FAILED"),
        record(5, names[4], "SUCCEEDED"),  # though nothing is in the store
        record(6, "selfspec-of-another-sweep", "RUNNING"),
    ]
    said = run(sky, jobs[:5])
    assert sky.launched == [names[2], names[3], names[4]]
    assert (done.state, running.note, running.id, failed.note) == (
        "done before",
        "attached",
        9,
        "launched again: job 4 FAILED",
    )
    assert new.note == "" and lost.note == "launched again: job 5 SUCCEEDED"
    assert all(job.result and not job.failed for job in jobs[:5]) and said.count("SUCCEEDED") >= 4
    assert all((job.folders[0] / results.FILE).exists() for job in jobs[:5])


def test_all_done_asks_nothing(jobs: list[Job]) -> None:
    for job in jobs:
        finish(job.plan)
    sky = Script(jobs)
    sky.ask = pytest.fail  # type: ignore[assignment, method-assign]
    assert run(sky, jobs).count("done before") == len(jobs)


@pytest.mark.parametrize("parallelism", [None, 1, 3])
def test_no_more_at_once_than_asked_for(jobs: list[Job], parallelism: int | None) -> None:
    sky = Script(jobs, ["PENDING", "STARTING", "RUNNING"])
    run(sky, jobs, replace(SETTINGS, parallelism=parallelism))
    assert sky.most == (parallelism or len(jobs)) and len(set(sky.launched)) == len(jobs)


def test_a_plan_that_two_jobs_come_to_runs_once_and_both_have_its_result(jobs: list[Job], tmp_path: Path) -> None:
    jobs[0].numbers.append(7)
    jobs[0].folders.append(tmp_path / "sweep" / "7")
    run(Script(jobs[:1]), jobs[:1])
    assert results.read(tmp_path / "sweep" / "7" / results.FILE) == results.read(
        tmp_path / "sweep" / "0" / results.FILE
    )


def test_failures_hide_nothing(jobs: list[Job]) -> None:
    said = run(sky := Script(jobs[:3], ["RUNNING", "RECOVERING"], without=[1]), jobs[:3])
    assert [job.failed for job in jobs[:3]] == [False, True, False]
    assert jobs[1].log == ["last words of 101"] and "left no result in" in said
    assert results.read(jobs[1].folders[0] / results.FILE)["error"] == (
        f"SkyPilot job 101 SUCCEEDED: left no result in {jobs[1].plan.checkpoint.dir}"
    )
    run(sky := Script(jobs[3:4], ["FAILED_NO_RESOURCE"]), jobs[3:4])
    assert (jobs[3].note, jobs[3].log, sky.looks) == ("no machine anywhere", [], {100: 0}), "there is no log to ask for"


def test_a_result_that_says_failed_stands(jobs: list[Job]) -> None:
    finish(jobs[0].plan, status="failed", error="not lossless")
    run(sky := Script(jobs[:1]), jobs[:1])
    assert jobs[0].failed and sky.launched == [] and jobs[0].note == "not lossless"


def test_one_whose_result_cannot_be_read_hides_no_other(jobs: list[Job]) -> None:
    sky = Script(jobs[:2], ["RUNNING"], without=[0])
    look = sky.look
    sky.look = lambda id: (leave(jobs[0].plan, "[]"), look(id))[1] if id == 100 else look(id)  # type: ignore[method-assign]
    run(sky, jobs[:2])
    assert [job.failed for job in jobs[:2]] == [True, False] and "is no result" in jobs[0].note


def test_skypilot_may_be_away_for_a_while_and_not_for_ever(jobs: list[Job]) -> None:
    sky, nearly = Script(jobs[:1], ["RUNNING", "RUNNING"]), [True] * (_fleet.PATIENCE - 1)
    sky.away = iter([*nearly, False, *nearly, False])
    run(sky, jobs[:1])
    assert not jobs[0].failed
    sky = Script(jobs[1:2])
    sky.away = repeat(True)
    with pytest.raises(LaunchError, match="no route to host; jobs go on, and the same command comes back to them"):
        run(sky, jobs[1:2])


def test_one_that_skypilot_forgets_is_not_waited_for_for_ever(jobs: list[Job]) -> None:
    sky = Script(jobs[:3], ["RUNNING"] * _fleet.PATIENCE, without=[1])
    ask, looks = sky.ask, iter(range(99))

    def forgetful(do: str, **request: Any) -> Any:
        if do != "queue" or "ids" not in request:
            return ask(do, **request)
        forgotten = {100, 101} if next(looks) < _fleet.PATIENCE - 1 else {101}
        return [known for known in ask(do, **request) if known["id"] not in forgotten]

    sky.ask = forgetful  # type: ignore[method-assign]
    run(sky, jobs[:3])
    assert [job.failed for job in jobs[:3]] == [False, True, False]
    assert (jobs[1].state, jobs[1].note) == ("GONE", "SkyPilot knows it no more")


def test_at_a_terminal_there_is_one_table(jobs: list[Job]) -> None:
    said = StringIO()
    with _table.live(Console(file=said, force_terminal=True, width=200)) as show:
        jobs[0].state, jobs[0].recoveries, jobs[1].note = "RECOVERING", 2, "no quota " * 40
        show(jobs[:2])
    assert all(word in said.getvalue() for word in (*_table.COLUMNS[:-1], "RECOVERING", jobs[0].plan.label, "..."))


def test_a_job_is_named_after_its_plan_and_its_checkpoint(fake: list[str]) -> None:
    here, same, there = (planned(*fake, f"checkpoint.dir=gs://b/{name}") for name in ("x", "x/", "y"))
    assert _task.name(here) == _task.name(same) != _task.name(there)
    assert _task.name(there).startswith(f"selfspec-{here.id}-"), "the plan is the same"


def test_files_that_jobs_elsewhere_do_not_have_are_said(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    settings = replace(SETTINGS, workdir=".", mounts={"/data": "gs://b/data", "~/data": "gs://b/data"})
    there, elsewhere = ("in/it", "/data/x", "~/data/x"), ("../x", "/there", "~/x", "~nobodyhere/x")
    for source in (*there, *elsewhere):
        asked = ("workload.source=file:/other/p", f"model.source='file:{source}'", "checkpoint.dir=gs://b/x")
        said = [words.split(": jobs elsewhere")[0] for words in _task.not_copied(settings, planned(*fake, *asked))]
        missing = [f"model.source=file:{source}"] if source in elsewhere else []
        assert said == [*missing, "workload.source=file:/other/p"]


@pytest.mark.parametrize(
    ("overrides", "environment", "expected"),
    [
        ("tracking=none", {"MLFLOW_TRACKING_URI": "http://x"}, (None, [], "")),
        ("tracking.uri=sqlite:///x", {}, ("sqlite", [], "tracking.name=none")),
        ("", {"MLFLOW_TRACKING_URI": "http://x"}, (None, ["MLFLOW_TRACKING_URI"], "")),
        ("tracking.uri=null", {}, ("null", [], "tracking.name=none")),
        ("tracking.uri=null", {"MLFLOW_TRACKING_URI": "sqlite:///x"}, ("null", [], "tracking.name=none")),
        (
            "tracking.uri=null",
            {"MLFLOW_TRACKING_URI": "http://u:p@x", "MLFLOW_TRACKING_TOKEN": "hush"},
            (None, ["MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN"], ""),
        ),
        ("tracking.uri=http://x", {"MLFLOW_TRACKING_TOKEN": "hush"}, (None, ["MLFLOW_TRACKING_TOKEN"], "")),
    ],
)
def test_where_jobs_elsewhere_are_tracked(
    fake: list[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: str,
    environment: dict[str, str],
    expected: tuple[str | None, list[str], str],
) -> None:
    for name in _task._MLFLOW:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = ["tracking=mlflow" if part == "tracking=none" else part for part in fake]
    made = planned(*asked, *overrides.split(), "checkpoint.dir=gs://b/x")
    why, secrets, override = expected
    said = _task.untracked(made)
    assert (said is None) == (why is None) and (why or "") in (said or "")
    assert _task.secrets(SETTINGS, made) == secrets
    task = _task.make(SETTINGS, made, ["K=2"], SweepContext("launch", "run-id"))
    assert task["run"].endswith(" output_dir=outputs")
    assert override in task["run"] and ("envs" in task) == (why is None and "none" not in overrides)
    assert not any(secret in json.dumps(task) for secret in environment.values() if secret != "http://x")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"secrets": ["NOT_SET"]}, "hydra.launcher.secrets=NOT_SET: is not set in the environment"),
        ({"secrets": ["hf-123"]}, "hydra.launcher.secrets: must be names of environment variables, not their values"),
        ({"max_restarts": -1}, "hydra.launcher.max_restarts=-1: must be >= 0"),
        ({"parallelism": 0}, "hydra.launcher.parallelism=0: must be >= 1"),
        ({"parallelism": 1, "wait": False}, "hydra.launcher.parallelism=1: needs somebody who waits"),
        (
            {"regions": ["x"], "infra": "gcp/y"},
            "hydra.launcher.regions=['x']: are of a cloud",
        ),
        ({}, "checkpoint.resume=never: must be auto"),
    ],
)
def test_settings_that_cannot_work(jobs: list[Job], settings: dict[str, Any], says: str) -> None:
    made = jobs[0].plan
    _task.check(SETTINGS, made)
    resume = Resume.auto if settings else Resume.never
    with pytest.raises(ConfigError, match=f"^{re.escape(says)}"):
        _task.check(replace(SETTINGS, **settings), replace(made, checkpoint=replace(made.checkpoint, resume=resume)))


def test_a_pools_machines_are_set_up_by_the_pool(jobs: list[Job]) -> None:
    settings = replace(SETTINGS, setup="pip install x", mounts={"/data": "gs://b"})
    assert {"setup", "file_mounts"} <= _task.make(settings, jobs[0].plan, []).keys()
    pooled = replace(settings, pool="spot-gpus")
    assert not {"setup", "file_mounts"} & _task.make(pooled, jobs[0].plan, []).keys()
    assert _task.left_to_the_pool(settings) is None and "left out: setup, mounts" in (
        _task.left_to_the_pool(pooled) or ""
    )
