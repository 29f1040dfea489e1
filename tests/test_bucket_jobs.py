"""Whole jobs on a bucket: killed and resumed elsewhere, one head for all machines, and what a user is told."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gcs import NO_RIGHT, Fault, Proxy
from plans import planned

from selfspec import fitting, job
from selfspec.checkpoint import Journal, at, finished
from selfspec.checkpoint import lease as lease_module
from selfspec.checkpoint import store as store_module
from selfspec.checkpoint.bucket import Bucket
from selfspec.config import Resume
from selfspec.engine import factory
from selfspec.engine.fake.engine import FakeEngine
from selfspec.errors import ConfigError, HeadError, JournalError
from selfspec.plan import Plan
from selfspec.report import results

pytestmark = pytest.mark.slow

DIR = "gs://bucket/ckpt"
ON_GCS = ("checkpoint=gcs", f"checkpoint.dir={DIR}")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: list[str]) -> None:
    """Of this test alone: what a bucket lends lies there."""
    monkeypatch.setenv("SELFSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store_module, "_fetched", set())


def meets(fault: Fault, process: "subprocess.Popen[str]") -> None:
    """Waits until a request of the process has met it."""
    while not fault.met.wait(0.05):
        assert process.poll() is None, process.communicate()


def units(todo: Plan) -> list[tuple[str, str, str]]:
    """In the order they were finished; opening it fails where one stands twice."""
    with Journal.open(job.place(todo), todo.id, {}, Resume.require) as journal:
        return [(r.stage, r.unit, json.dumps(r.data.get("configured"))) for r in journal.records("bench")]


def timeless(result: Any) -> dict[str, Any]:
    left = {key: value for key, value in result["measurements"].items() if key != "bench/cpu_utilisation"}
    return {**result, "measurements": left, "settings": None, "provenance": None}


def test_a_job_on_a_bucket(
    gcs: Proxy, fake: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its identity is that of the same job on a folder, and so are its results; done again, it runs nothing."""
    local, there = planned(*fake), planned(*fake, *ON_GCS)
    assert local.id == there.id and local.head_id == there.head_id
    code, _, err = run(*fake, *ON_GCS)
    assert (code, err) == (0, "")
    assert run(*fake)[0] == 0
    one, other = finished(DIR, there.id), finished(local.checkpoint.dir, local.id)
    assert timeless(one) == timeless(other) and one is not None and one["status"] == "finished"
    for found in (one, other):
        assert found in [json.loads(path.read_text()) for path in tmp_path.rglob(f"runs/*/{results.FILE}")]

    def refuse(todo: Plan) -> None:
        raise AssertionError("an engine is made")

    monkeypatch.setattr(factory, "make", refuse)
    code, _, err = run(*fake, *ON_GCS, "checkpoint.resume=require")
    assert (code, err) == (0, "") and timeless(finished(DIR, there.id)) == timeless(one)
    assert Bucket(DIR).names("plans") == []  # there are only folders
    assert not (tmp_path / "outputs" / "checkpoint" / "plans" / there.id / "lease").exists()


def test_killed_and_resumed_elsewhere(
    gcs: Proxy, fake: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 while a unit is written; another process waits for the lease to run out and does the rest."""
    argv = [*fake, *ON_GCS, "checkpoint.lease_s=1", "scale.warmup=0", "scale.prompts=6"]
    todo = planned(*argv)
    wanted = todo.scale.prompts * todo.scale.repeats
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "selfspec.run", *argv]
    stuck = gcs.plant("POST.*journal/00000006", "hang", times=99)
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        meets(stuck, process)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL and finished(DIR, todo.id) is None
    stuck.times = 0
    stuck.released.set()
    bucket = Bucket(job.place(todo))
    before = {name: bucket.read(f"journal/{name}") for name in bucket.names("journal")}
    assert list(before) == [f"{n:08d}.jsonl" for n in range(6)]

    shutil.rmtree(tmp_path / "outputs")  # of another machine
    capsys.readouterr()
    job.run(todo, tmp_path)
    assert capsys.readouterr().err == f"waiting for another process that holds {job.place(todo)}/lease\n"
    assert {name: bucket.read(f"journal/{name}") for name in before} == before
    undisturbed = planned(*fake, "scale.warmup=0", "scale.prompts=6")
    result = job.run(undisturbed, tmp_path)
    assert timeless(finished(DIR, todo.id)) == timeless(result)
    assert sorted(units(todo)) == sorted(units(undisturbed)) and len(units(todo)) == wanted


def test_sigterm_keeps_the_unit_and_releases_the_lease(gcs: Proxy, fake: list[str]) -> None:
    """The unit in hand is kept, and the lease given back: nobody waits."""
    argv = [*fake, *ON_GCS, "scale.warmup=0"]
    todo = planned(*argv)
    late = gcs.plant("POST.*journal/00000004", "late")
    command = [sys.executable, "-m", "selfspec.run", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        meets(late, process)
        process.terminate()
        late.released.set()
        _, err = process.communicate()
    assert (process.returncode, err) == (143, "SIGTERM: finished work is kept; the same command carries on\n")
    assert json.loads(Bucket(job.place(todo)).read("lease/00000001") or b"")["until"] == 0
    assert len(units(todo)) == 3


def test_a_zombie_job_leaves_nothing(gcs: Proxy, fake: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*fake, *ON_GCS, "checkpoint.lease_s=86400"]  # nor does it renew its lease meanwhile
    todo = planned(*argv)
    generate, taken = FakeEngine.generate, list[int]()

    def taken_over(*args: Any, **options: Any) -> Any:
        if not taken:  # meanwhile, elsewhere
            Bucket(job.place(todo)).write("lease/00000001", b'{"until": 1, "term_s": 60, "holder": "x"}')
            with Journal.open(job.place(todo), todo.id, {}, Resume.require):
                taken.append(1)
        return generate(*args, **options)

    monkeypatch.setattr(FakeEngine, "generate", taken_over)
    code, out, err = run(*argv)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "was written by another process, which has taken this journal over since this one gave no sign of" in err
    assert finished(DIR, todo.id) is None and units(todo) == []


def test_a_sweeps_checks_wait_for_a_bucket_together(gcs: Proxy, fake: list[str]) -> None:
    """One whose answer is late keeps no other waiting; none costs more than alone; the first error counts."""
    plans = [planned(*fake, *ON_GCS, f"seed={seed}") for seed in range(8)]
    gcs.seen.clear()
    job.check(plans[0])
    assert len(gcs.seen) == 2
    late = gcs.plant(f"GET.*{plans[0].id}", "late")
    checks = threading.Thread(target=lambda: job.check(*plans))
    checks.start()
    assert late.met.wait(60)
    while not all(any(each.id in request for request in gcs.seen) for each in plans):
        assert checks.is_alive()
        time.sleep(0.01)
    late.released.set()
    checks.join()
    assert len(gcs.seen) == 2 + 2 * len(plans)

    for damaged in (5, 2):
        Bucket(job.place(plans[damaged])).create("journal/00000000.jsonl", b"nonsense")
    with pytest.raises(JournalError, match=f"{plans[2].id}.*: is no segment"):
        job.check(*plans)


def test_a_sweep_that_begins_anew(gcs: Proxy, fake: list[str], run: Run) -> None:
    """With ``never``, what an earlier sweep left is set aside; a plan that two of its jobs ask for runs once."""
    argv = ["-m", *fake, *ON_GCS, "checkpoint.resume=never", "tau=0.1,0.2"]  # no gate looks at tau
    todo = planned(*fake, *ON_GCS)
    bucket = Bucket(job.place(todo))
    for begun_anew in (0, 1):
        code, out, _ = run(*argv)
        assert (code, out.count("NO")) == (0, 0)
        heads = [(bucket.read(f"journal/{name}") or b"").splitlines()[0] for name in bucket.names("journal")]
        assert sum("fresh" in json.loads(head) for head in heads) == begun_anew
        assert len(units(todo)) == todo.scale.prompts * todo.scale.repeats and finished(DIR, todo.id) is not None


# --- what the user can put right


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("checkpoint=gcs", "checkpoint.dir: has no value; give one as checkpoint.dir=gs://BUCKET/PREFIX, or in the"),
        ("checkpoint.dir=gs://typo/x", "error: gs://typo/x/plans/{id}: there is no bucket gs://typo; make it"),
        ("-m checkpoint.dir=gs://typo/x seed=0,1", "there is no bucket gs://typo; make it"),
        ("checkpoint.dir=foo://x", "checkpoint.dir=foo://x/plans/{id}: Protocol not known: foo; must be a folder or"),
        ("checkpoint.dir='s3://me:secret@host/x'", "checkpoint.dir=s3://host/x: must be without credentials"),
        ("checkpoint.dir=gs:///x", "checkpoint.dir=gs:///x: names no bucket; must be a folder, or a URL such as gs://"),
        ("checkpoint.dir=gs://", "checkpoint.dir=gs://: names no bucket"),
        ("checkpoint.dir=gs:/bucket/x", "checkpoint.dir=gs:/bucket/x: names no bucket"),
        (
            "checkpoint.dir=gs://bucket/x checkpoint.resume=require",
            "there is no journal gs://bucket/x/plans/{id}/journ",
        ),
        ("checkpoint.lease_s=0", "checkpoint.lease_s=0.0: must be from 0.1 to 86400"),
    ],
)
def test_bad_input_costs_one_line(
    gcs: Proxy, fake: list[str], run: Run, tmp_path: Path, overrides: str, says: str
) -> None:
    code, out, err = run(*overrides.split(), *fake)
    assert (code, out, err.count("\n")) == (2, "", 1) and says.format(id=planned(*fake).id) in err
    assert "secret" not in err and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("verb", ["GET", "POST"])
def test_a_forbidden_bucket_costs_one_line(gcs: Proxy, fake: list[str], run: Run, tmp_path: Path, verb: str) -> None:
    gcs.plant(verb, 403, times=99, body=NO_RIGHT)
    code, out, err = run(*fake, *ON_GCS)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "forbidden: ci@project.iam.gserviceaccount.com does not have storage.objects.create access" in err


def test_the_bucket_from_the_environment(gcs: Proxy, fake: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFSPEC_CHECKPOINT", "gs://bucket/mine")
    assert planned(*fake, "checkpoint=gcs").checkpoint.dir == "gs://bucket/mine"
    with pytest.raises(JournalError, match="gs://bucket/mine"):
        job.check(planned(*fake, "checkpoint=gcs", "checkpoint.resume=require"))


# --- heads


def test_one_builds_while_the_others_wait(
    gcs: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease_module, "POLL_S", 0.01)
    built = list[int]()

    def build(path: Path) -> None:
        built.append(1)
        said = ""
        while said.count("waiting for another process that holds") < 5:
            said += capsys.readouterr().err
            time.sleep(0.01)
        path.write_bytes(b"head" * 1000)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda store: store.make("heads/x.safetensors", build), [at(DIR) for _ in range(6)]))
    assert built == [1]
    path = at(DIR).fetch("heads/x.safetensors")
    assert path.read_bytes() == b"head" * 1000 and path.is_relative_to(tmp_path / "cache")


def test_the_head_that_was_built_first_stands(gcs: Proxy) -> None:
    """A zombie that comes late with a head of its own takes its successor's."""

    def build(path: Path) -> None:
        Bucket(DIR).create("heads/x", b"successor's")
        path.write_bytes(b"zombie's")

    at(DIR).make("heads/x", build)
    assert at(DIR).fetch("heads/x").read_bytes() == b"successor's"


def test_a_head_is_fitted_once_for_all_machines(
    gcs: Proxy, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfspec.engine.torch.engine import TorchEngine

    argv = [
        *overrides,
        *ON_GCS,
        "engine.kernels=torch",
        "draft=lsq",
        "scale.prompts=1",
        "scale.repeats=1",
        "scale.warmup=0",
    ]
    first = planned(*argv)
    with pytest.raises(ConfigError, match="needs a head and none is fitted yet"):
        job.check(planned(*argv, "stages=[bench]"))
    measured = job.run(first, tmp_path)["measurements"]
    assert measured["fit/agreement"] > 0 and fitting.fitted(first)

    shutil.rmtree(tmp_path / "cache" / "checkpoint")  # another machine
    monkeypatch.setattr(store_module, "_fetched", set())
    monkeypatch.delattr(TorchEngine, "fit")
    second = planned(*argv, "K=5")
    assert second.id != first.id and not fitting.head_path(second).exists()
    job.check(second)
    assert not fitting.head_path(second).exists()  # a check downloads nothing but the head's facts
    other = job.run(second, tmp_path)["measurements"]
    assert other["fit/solve_s"] == measured["fit/solve_s"] and fitting.head_path(second).exists()

    name = f"heads/{first.head_id}.safetensors"
    for damaged in (b"", b"damaged", fitting.head_path(second).read_bytes()[:-1]):
        Bucket(DIR).write(name, damaged)
        with pytest.raises(HeadError, match=f"^{DIR}/{name}: corrupt head"):
            job.check(second)
