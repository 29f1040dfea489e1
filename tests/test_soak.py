"""The soak stage with a real Locust and the real gateway: it holds, it is resumed, and every fault fails it."""

import csv
import json
import os
import re
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from plans import planned, run_job
from test_soak_judge import interval

from selfspec import job
from selfspec.checkpoint import Journal
from selfspec.config import Resume
from selfspec.errors import ConfigError, Interrupted, StageError
from selfspec.plan import Plan
from selfspec.soak import load, server
from selfspec.stages import soak

Make = Callable[..., Plan]
SHORT = (
    *("soak.users=3", "soak.interval=0.7", "soak.seconds=2.1", "soak.warmup=2.5", "soak.prompts=6"),
    *("soak.new_tokens=24", "soak.sentinels=2", "soak.max_drift=0.2", "soak.start_s=1e6"),
    "soak.max_memory_slope=100000",  # what a server gains in its first seconds says nothing
    "serve.api_key=hush",
)
PLANTED = str(Path(__file__).with_name("planted.py"))
STARTED = {"selfspec.soak.guard", "selfspec.serve", PLANTED, "locust"}
"""One of these is an argument of every process that a soak starts."""
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unhurried")]


@pytest.fixture
def make(fake: list[str]) -> Make:
    return partial(planned, *fake, "stages=[soak]", *SHORT)


def plant(monkeypatch: pytest.MonkeyPatch, then: Path, *faults: str) -> None:
    """The gateway is started with these; those that wait for it come after the first interval, until the last."""
    gateway, take, takes = server._gateway, load.Load.take, list[float]()

    def planted(made: Plan, port: int) -> list[str]:
        python, _, _, *rest = gateway(made, port)
        return [python, PLANTED, ",".join(faults), *rest]

    def taking(self: load.Load, until: float) -> dict[str, object]:
        takes.append(until)
        if len(takes) == 2:  # the first is the warm-up's
            then.touch()
        elif len(takes) == 4:
            then.unlink()
        return take(self, until)

    monkeypatch.setenv("PLANTED", str(then))
    monkeypatch.setattr(server, "_gateway", planted)
    monkeypatch.setattr(load.Load, "take", taking)


def kept(made: Plan) -> list[str]:
    with Journal.open(job.place(made), made.id, {}, Resume.require) as journal:
        return [record.unit for record in journal.records("soak")]


def nothing_runs() -> bool:
    """Of what a soak starts; other children of this process may be its Python's, whose path may hold any word."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if STARTED & set(child.cmdline()):
                return False
    return True


def test_a_soak_that_is_interrupted_and_killed_carries_on_and_holds(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # whoever uses it gets nowhere
    monkeypatch.setenv("LOCUST_RUN_TIME", "1")
    for name in (".locust.conf", "locust.conf"):  # of the user's home, and of the folder they are in
        (tmp_path / name).write_text("run-time = 1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made, folder = make(), tmp_path / "job"
    job.check(made)
    take, takes = load.Load.take, list[float]()

    def interrupted(self: load.Load, until: float) -> dict[str, object]:
        takes.append(until)
        if len(takes) == 3:  # the warm-up's, an interval's, and in the second
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, until)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(load.Load, "take", interrupted)
        run_job(made, folder)
    assert kept(made) == ["begin", "interval-0000"] and nothing_runs()

    with monkeypatch.context() as patch, pytest.raises(StageError, match="died under load: exit code 7: planted death"):
        plant(patch, tmp_path / "then", "death")
        run_job(made, folder)
    assert kept(made) == ["begin", "interval-0000", "interval-0001"] and nothing_runs()

    result = run_job(made, folder)
    assert (result["status"], result["error"]) == ("finished", None), result["error"]
    assert kept(made)[3:] == ["interval-0002", "locust-3", "end"] and nothing_runs()
    measured = {key.removeprefix("soak/"): value for key, value in result["measurements"].items()}
    assert measured["errors"] == 0 and measured["requests"] > 10 and measured["intervals"] == 3
    assert measured["sentinels"] == 2 and measured["sentinels_differing"] == 0
    assert 0 < measured["ttft_p50_ms"] <= measured["ttft_p95_ms"] <= measured["ttft_p99_ms"]
    assert measured["ttft_p50_ms"] < measured["total_p50_ms"] and measured["tok_s"] > 24
    assert measured["memory_mb"] > 20 and 0 < measured["acceptance"] < 1
    assert result["notes"][1] == "soak: the server was started 3 times; Locust's own tables are of the last"

    with (folder / "locust_stats.csv").open() as file:
        rows = {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}
    kinds = [kind for kind, name in rows if name == "/v1/completions"]
    assert sorted(kinds) == ["GAP", "POST", "TTFT"]
    assert rows["POST", "/v1/completions"]["Failure Count"] == "0"
    assert (folder / "locust_stats_history.csv").read_text().count("\n") > 2, "a row for each kind, once a second"
    assert (folder / "soak.png").read_bytes().startswith(b"\x89PNG")
    assert len([json.loads(line) for line in (folder / "soak.jsonl").read_text().splitlines()]) == 3

    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10 and not any(b"hush" in content for content in written), "the API key is nobody's business"

    with monkeypatch.context() as patch:
        patch.setattr(server, "guarded", None)
        assert run_job(made, folder)["measurements"] == result["measurements"], "all is in the journal"
        held_to = make("soak.max_total_p99_ms=0.001")
        assert held_to.id == made.id, "another bound judges the same soak"
        strict = run_job(held_to, folder)
        assert strict["status"] == "failed" and "p99 total" in str(strict["error"])


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([[0, 0], [0, 0]], ["soak: every sentinel's answer is token 0 over and over, whatever is asked"]),
        ([[0, 0], [0, 5]], []),
    ],
)
def test_sentinels_that_say_one_token_only_fail_it(make: Make, answers: list[list[int]], says: list[str]) -> None:
    made = make("soak.max_memory_slope=100000")
    with Journal.open(job.place(made), made.id, {}, Resume.auto) as journal:
        journal.append("soak", "begin", {"answers": answers}, "here")
        journal.append("soak", "interval-0000", interval(0), "here")
        journal.append("soak", "end", {"answers": answers, "verdicts": [{"verdict": "equal"}] * 2}, "here")
        assert soak.Soak(made).failures(journal) == says


def test_planted_faults_fail_it_and_mlflow_shows_it(
    make: Make, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    plant(monkeypatch, tmp_path / "then", "leak", "drift", "sentinel", "errors")
    made, folder = make("tracking=mlflow", f"tracking.uri={uri}", "soak.max_memory_slope=300"), tmp_path / "job"
    result = run_job(made, folder)
    errors, leak, drift, sentinel = str(result["error"]).split("; ")
    assert result["status"] == "failed" and nothing_runs()
    assert "requests failed" in errors and "allowed 0.00%" in errors and "HTTP 400" in errors
    grew = re.search(r"memory grew by (\S+) MiB/min \(allowed 300\)", leak)
    assert grew is not None and float(grew[1]) > 300
    assert "acceptance drifted from 0." in drift and ", by -0." in drift and "(allowed 0.2)" in drift
    assert sentinel == "soak: 2 of 2 sentinel prompts were answered otherwise after the load than before it"
    assert result["error"] is not None and result["error"][:30] in (folder / "report.txt").read_text()

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("selfspec").experiment_id])
    assert run.info.status == "FAILED" and run.data.tags["selfspec.error"] == result["error"]
    assert run.data.metrics["soak/memory_slope_mb_min"] == result["measurements"]["soak/memory_slope_mb_min"]
    history = client.get_metric_history(run.info.run_id, "interval/acceptance")
    assert len(history) == 3 and history[0].value > history[-1].value
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"locust_stats.csv", "locust_stats_history.csv", "soak.png", "soak.jsonl", "report.txt"} <= names


def test_what_makes_it_another_soak(make: Make) -> None:
    made = make()
    for same in ("serve.port=9", "serve.host=localhost", "serve.api_key=other", "soak.max_drift=0.5", "soak.name=x"):
        assert make(same).id == made.id, same
    for other in ("soak.users=4", "soak.interval=0.5", "serve.max_batch=2", "serve.scheduler=hrrn", "K=3"):
        assert make(other).id != made.id, other
    assert make("stages=[bench]", "soak.users=4").id == make("stages=[bench]").id


def test_timings_of_different_hardware_are_not_pooled(make: Make, tmp_path: Path) -> None:
    made = make("soak.max_memory_slope=1000")
    with Journal.open(job.place(made), made.id, {}, Resume.auto) as journal:
        journal.append("soak", "begin", {"answers": []}, "here")
        for number, (on, slow) in enumerate((("here", 1), ("there", 50), ("here", 1))):
            data = interval(number, slow=slow, life=1 + number) | {"provenance": {"fingerprint": on}}
            journal.append("soak", f"interval-{number:04d}", data, on)
        journal.append("soak", "end", {"answers": [], "verdicts": []}, "here")
    result = run_job(made, tmp_path / "job")
    assert result["measurements"]["soak/requests"] == 60 and result["measurements"]["soak/total_p99_ms"] < 300
    assert result["provenance"]["fingerprint"] == "here"
    assert result["notes"][1:] == [
        "soak: the server was started 3 times; Locust's own tables are of the last",
        "soak: 1 of 3 intervals ran on other hardware; their timings are left out",
    ]


def test_the_port_kept_for_vllm_is_nobody_elses_and_can_be_listened_at() -> None:
    with server._reserved() as port, socket.socket() as another, socket.socket() as vllms:
        with pytest.raises(OSError, match="in use"):
            another.bind(("127.0.0.1", port))
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            vllms.setsockopt(socket.SOL_SOCKET, option, 1)
        vllms.bind(("127.0.0.1", port))
        vllms.listen()
        socket.create_connection(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["gate=bandit", "controller=cost", "serve.scheduler=chunked_prefill", "hardware.threads=2"],
        ["policy=rejection", "temperature=0.5", "policy.top_p=0.9", "draft.exit_layer=2", "seed=7"],
        ["engine=torch", "draft=suffix", "draft.corpus=true", "scale=full", "model.name='a b, c\\'d\"e: {f}'"],
        [
            "serve.backends=[{name: far, url: 'http://x/v1', key_env: KEY}]",
            "serve.router.policy=length",
            "serve.router.max_total_tokens=99",
        ],
    ],
)
def test_the_gateway_is_given_the_plan_of_the_job(make: Make, more: list[str]) -> None:
    made = make(*more)
    given = planned(*server.overrides(made), "stages=[soak]")
    for group in server.GROUPS:
        assert getattr(given, group) == replace(made, serve=replace(made.serve, api_key=None)).__dict__[group], group
    assert (given.label, given.head_id, given.answers_id) == (made.label, made.head_id, made.answers_id)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["engine=hf", "draft=none"], "engine=hf: stages=soak serves fake, torch, vllm"),
        (["soak.server=vllm"], "soak.server=vllm: use engine=vllm; or engine=torch draft=none, the model alone"),
        (["soak.server=vllm", "draft=none", "engine=torch"], "vLLM is not installed here"),
        (["soak.arguments=[--enforce-eager]"], "of soak.server=vllm; the gateway is given the job's"),
        *(
            (
                ["soak.server=vllm", f"soak.arguments=['{argument}',s3cr3t]"],
                "soak.arguments: --[^ ]* would be kept with the",
            )
            for argument in ("--api-key", "--api_key=s3cr3t", "--hf-token")
        ),
        (["soak.users=65"], "soak.users=65: serve.max_concurrent_requests=64 would refuse it"),
        (["serve.max_connections=2"], "soak.users=3: serve.max_connections=2 would refuse it"),
        (["soak.seconds=1"], "soak.seconds=1: must be at least three times soak.interval=0.7"),
        (["soak.sentinels=7"], "soak.sentinels=7: must be from 0 to 6"),
        (["soak.max_drift=2"], "soak.max_drift=2.0: must be from 0 to 1"),
    ],
)
def test_what_cannot_be_soaked_is_refused_in_a_line(
    make: Make, more: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    with pytest.raises(ConfigError, match=says):
        job.check(make(*more))


@pytest.mark.real
def test_the_real_model_holds(tmp_path: Path) -> None:
    light = ("draft=ngram", "stages=[soak]", "scale=smoke", "soak.users=3", "soak.new_tokens=16", "soak.prompts=8")
    short = ("soak.seconds=6", "soak.interval=2", "soak.warmup=4", "soak.max_memory_slope=100000", "serve.max_batch=4")
    result = run_job(planned(*light, *short, "tracking=none", f"output_dir={tmp_path}"), tmp_path / "job")
    measured = result["measurements"]
    assert result["status"] == "finished" and nothing_runs(), result["error"]
    assert measured["soak/errors"] == 0 < measured["soak/requests"] and measured["soak/sentinels_differing"] == 0
    assert measured["soak/memory_mb"] > 300 and 0 < measured["soak/acceptance"] < 1
