"""``hydra/launcher=local``: jobs as processes that share fit and tracker, die without hiding others, and are ended."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launched import Sweep, tracked, until
from plans import planned

from hydra_plugins.selfspec_launcher import local
from hydra_plugins.selfspec_launcher._jobs import Job
from hydra_plugins.selfspec_launcher.local import LocalLauncher
from selfspec.checkpoint import FILE
from selfspec.errors import StorageError
from selfspec.provenance import hardware
from selfspec.report import results
from selfspec.run import CONF

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str, str]]


def test_jobs_share_one_fit_and_one_tracker(
    run: Run, overrides: list[str], uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    tracking = ("tracking=mlflow", f"tracking.uri={uri}", "tracking.experiment=local")
    ours = [each for each in overrides if each != "tracking=none"]
    argv = ("-m", *ours, *tracking, "engine.kernels=torch", "gate=varH", "tau_v=1,2", "hydra/launcher=local")
    code, _, err = run(*argv)
    assert code == 0, err + "".join(log.read_text() for log in tmp_path.rglob("log.txt"))
    assert all(f"job {n} tau_v={n + 1}: finished" in err for n in (0, 1)), err

    found = results.find(tmp_path / "outputs" / "main" / "sweeps")
    assert [result["lossless"] for result in found] == ["yes", "yes"]
    assert len({result["measurements"]["fit/solve_s"] for result in found}) == 1, "both report the one fit"
    assert len({result["plan_id"] for result in found}) == 2
    (answers,) = (tmp_path / "outputs" / "checkpoint" / "fit").glob(f"*/{FILE}")
    units = [json.loads(line).get("unit") for line in answers.read_text().splitlines()[1:]]
    assert units == ["batch-0000"]
    assert len(list((tmp_path / "outputs" / "checkpoint").rglob("*.safetensors"))) == 1
    cores = hardware()["physical_cores"]
    assert isinstance(cores, int)
    assert [result["provenance"]["extra"]["threads"] for result in found] == [max(1, cores // 2)] * 2

    parent, children = tracked(uri, "local")
    assert [each.info.status for each in (parent, *children)] == ["FINISHED"] * 3
    assert "lock" not in "".join(log.read_text() for log in tmp_path.rglob("log.txt"))


def test_a_sweep_that_is_ended_ends_its_jobs_and_carries_on_past_one_that_dies(fake: list[str], tmp_path: Path) -> None:
    argv = ["hydra/launcher=local", *fake, "scale.prompts=50", "K=1,2,3"]
    sweep = Sweep(tmp_path, *argv)
    sweep.hold.touch()
    with sweep.started() as process:
        until(lambda: sweep.held(2), process, sweep.log)
        until(lambda: all(f"job {n} K={n + 1}: running" in sweep.log.read_text() for n in (0, 1)), process, sweep.log)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143 and len(children) == 2
        assert not any(child.is_running() for child in children)
        assert sweep.log.read_text().endswith("SIGTERM: finished work is kept; the same command carries on\n")
        assert sweep.held(2)

    sweep.hold.unlink()
    code, said = Sweep(tmp_path, *argv, dies="K=3").run()
    assert code == 1 and "job 2 K=3: killed by SIGKILL" in said and "job 2: about to die" in said
    rows = sweep.rows()
    assert [(row["label"], row["status"]) for row in rows] == [
        ("layerskip3 K=1", "finished"),
        ("layerskip3 K=2", "finished"),
        ("layerskip3 K=3", "failed"),
    ]
    assert rows[2]["error"].startswith("killed by SIGKILL") and rows[2]["error"].endswith(
        "log.txt ends in: about to die"
    )
    assert len(sweep.units()) == 2 and sweep.once(50)


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells no child of its parent's death")
def test_jobs_of_a_launcher_that_is_killed_end_too(fake: list[str], tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "hydra/launcher=local", *fake, "scale.prompts=50", "K=1")
    sweep.hold.touch()
    with sweep.started() as process:
        until(lambda: sweep.held(1), process, sweep.log)
        (job,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        job.wait()
        (log,) = tmp_path.rglob("log.txt")
        assert log.read_text().endswith("SIGTERM: finished work is kept; the same command carries on\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells no child of its parent's death")
def test_a_job_whose_launcher_was_killed_before_it_began_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "print('begun')"]
    ours = local._die_with_parent()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)  # so the parent that it looks for is not the one it has
        anothers = local._die_with_parent()
    done = [subprocess.run(command, preexec_fn=die, capture_output=True, text=True) for die in (ours, anothers)]
    assert [(each.returncode, each.stdout) for each in done] == [(0, "begun\n"), (143, "")]


def test_jobs_have_the_configs_that_were_given(run: Run, fake: list[str], tmp_path: Path) -> None:
    conf = tmp_path / "my conf"
    shutil.copytree(CONF, conf)
    (conf / "gate" / "maxp.yaml").write_text("defaults: [maxp_schema, _self_]\nthreshold: 0.25\n")
    (tmp_path / "more" / "gate").mkdir(parents=True)
    (tmp_path / "more" / "gate" / "mine.yaml").write_text("defaults: [maxp_schema, _self_]\nthreshold: 0.125\n")
    given = (f"--config-path={conf}", f"--config-dir={tmp_path / 'more'}")
    code, out, err = run("-m", *given, "hydra/launcher=local", *fake, "gate=maxp,mine")
    assert code == 0 and all(f"| layerskip3 maxp={threshold} K=4 " in out for threshold in (0.25, 0.125)), err


def test_a_log_that_cannot_be_written_is_refused(fake: list[str]) -> None:
    launcher = LocalLauncher(n_jobs=1, gpus=[], poll_s=0.1)
    with pytest.raises(StorageError, match=r"^/dev/null/0/log\.txt: cannot be written: not a directory"):
        launcher.start([Job(0, "job 0", planned(*fake), [], Path("/dev/null/0"))])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["hydra/launcher=local"], "hydra/launcher=local: launches the jobs of a sweep; add -m, for a single job too"),
        (["-m", "hydra/launcher=local", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0: must be >= 1"),
        (["-m", "hydra/launcher=local", "hydra.launcher.n_job=1"], "hydra.launcher.n_job: no such key; did you mean"),
        (["-m", "+far=here,there", "K=1"], "+far=there: asks for hydra/launcher=local, which a swept option cannot"),
        (["-m", "+far=here,more", "K=1", "hydra/launcher=local"], "+far=more: asks for hydra.launcher.n_jobs=3, which"),
    ],
)
def test_a_launcher_that_would_be_dropped_is_refused(
    run: Run, fake: list[str], tmp_path: Path, argv: list[str], says: str
) -> None:
    far = tmp_path / "conf" / "far"
    far.mkdir(parents=True)
    (far / "here.yaml").write_text("# @package _global_\n")
    (far / "there.yaml").write_text("# @package _global_\ndefaults:\n  - override /hydra/launcher: local\n")
    (far / "more.yaml").write_text("# @package _global_\nhydra:\n  launcher:\n    n_jobs: 3\n")
    code, _, err = run(f"--config-dir={tmp_path / 'conf'}", *fake, *argv)
    assert code == 2 and err.startswith(f"error: {says}") and err.count("\n") == 1, err
    assert not (tmp_path / "outputs").exists()
