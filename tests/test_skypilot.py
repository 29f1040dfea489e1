"""The SkyPilot launcher against a SkyPilot of our own (``skypilot/fake``), whose managed jobs are processes here."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from launched import journalled

from hydra_plugins.skypilot_launcher import _bridge
from selfspec import checkpoint
from selfspec.checkpoint import bucket
from selfspec.errors import ConfigError, LaunchError
from selfspec.run import CONF
from selfspec.sweep import compose
from selfspec.vllm_plugin import versions

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent / "skypilot"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Python that imports our SkyPilot."""
    python = tmp_path / "python"
    path, ours = shlex.quote(str(HERE / "fake")), shlex.quote(sys.executable)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {ours} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("FAKE_SKY", str(tmp_path / "sky"))
    known = [key for key in os.environ if key.startswith("MLFLOW_")]
    for key in known:
        monkeypatch.delenv(key)
    yield python
    if _bridge.connect.cache_info().currsize:
        _bridge.connect(str(python)).close()
    _bridge.connect.cache_clear()


@pytest.fixture
def sweep(run: Run, fake: list[str], sky: Path, tmp_path: Path) -> Run:
    """A sweep by the launcher, of jobs that are slow when told to be."""
    cache = f"SELFSPEC_CACHE={os.environ['SELFSPEC_CACHE']}"
    command = shlex.join(["env", cache, sys.executable, str(HERE / "slow.py")])
    launcher = {"python": sky, "infra": "slurm/local", "workdir": HERE.parents[1], "command": command}
    settings = [f"hydra.launcher.{key}={compose.quoted(value)}" for key, value in launcher.items()]
    settings += ["hydra.launcher.setup=null", "hydra.launcher.poll_s=0.1"]

    def call(*argv: str) -> tuple[int, str, str]:
        return run("-m", "hydra/launcher=skypilot", *fake, f"checkpoint.dir={tmp_path / 'store'}", *settings, *argv)

    return call


def unforeseen(err: str) -> str:
    """What was said besides that jobs elsewhere have no copy of this test's model and prompts."""
    copies = ("note: model.source=file:", "note: workload.source=file:")
    return "".join(line for line in err.splitlines(True) if not line.startswith(copies))


def launched(tmp_path: Path) -> list[dict[str, object]]:
    """What SkyPilot was given."""
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "sky").glob("*/job.json"))]


def test_a_job_that_loses_its_machine_carries_on_and_the_sweep_comes_back_whole(
    sweep: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    monkeypatch.setenv("A_SECRET", "hush-hush")
    monkeypatch.setenv("SELFSPEC_SWEEP_RUN", "")
    argv = ("K=2,3", f"hydra.launcher.envs={{HOLD: '{hold}'}}", "hydra.launcher.secrets=[A_SECRET]")

    over = threading.Event()

    def lose() -> None:
        while len({unit.split()[0] for unit in journalled(tmp_path / "store")}) < 2:
            if over.wait(0.05):
                return
        os.killpg(int((tmp_path / "sky" / "1" / "pid").read_text()), signal.SIGKILL)
        hold.unlink()

    loser = threading.Thread(target=lose)
    loser.start()
    code, out, err = sweep(*argv)
    over.set()
    loser.join()
    assert code == 0, err
    assert " | SkyPilot 1 | SUCCEEDED | slurm/local | recovered 1x\n" in err  # they are launched at once, in any order
    assert " | SkyPilot 2 | SUCCEEDED | slurm/local\n" in err
    assert all(f"| layerskip3 K={k} |" in out for k in (2, 3))
    assert set(journalled(tmp_path / "store").values()) == {1} and len(journalled(tmp_path / "store")) == 2 * 3
    store = str(tmp_path / "store")
    for job in launched(tmp_path):
        assert job["secrets"] == ["A_SECRET"]
        result = checkpoint.finished(store, str(job["name"]).split("-")[1])
        assert result is not None and result["status"] == "finished"
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if b"hush-hush" in path.read_bytes()] and "hush-hush" not in out + err

    code, again, err = sweep(*argv)
    assert code == 0 and err.count("done before") == 2 and len(launched(tmp_path)) == 2
    assert again == out, "the same table, from the store"


def test_a_failed_job_says_its_last_words_and_hides_no_other(sweep: Run, tmp_path: Path) -> None:
    code, out, err = sweep("K=2,3", "hydra.launcher.command='test $RANDOM -lt 0 || echo no kernel for you; false'")
    assert code == 1 and "Traceback" not in err
    for number, k in ((1, 2), (2, 3)):
        assert f"SkyPilot {number} | FAILED | slurm/local | exit code 1" in err
        assert f"| layerskip3 K={k} |" in out and f"SkyPilot job {number} FAILED: exit code 1" in out
    assert err.count("no kernel for you") == 2
    (folder,) = {path.parent for path in tmp_path.rglob("sweep.json")}
    told = json.loads((folder / "0" / "result.json").read_text())
    assert (told["status"], told["provenance"]) == ("failed", {}), "nothing was measured, here or there"


def test_a_job_that_is_refused_there_says_why(sweep: Run) -> None:
    code, _, err = sweep("K=2", "scale.prompts=500", "scale.warmup=0")
    assert code == 1 and "SkyPilot 1 | FAILED" in err and "scale.prompts=500: must be at most" in err


def test_one_that_skypilot_does_not_take_hides_no_other(sweep: Run, tmp_path: Path) -> None:
    _, out, _ = sweep("K=2", "hydra.launcher.dryrun=true")
    (tmp_path / "sky.refuses").write_text(yaml.safe_load(out.split("---")[0])["name"])
    code, out, _ = sweep("K=2,3", "hydra.launcher.command=echo", "hydra.launcher.log_lines=0")
    assert code == 1 and "quota exceeded" in out and "left no result" in out
    assert len(launched(tmp_path)) == 1


def test_launched_and_not_waited_for(sweep: Run, tmp_path: Path) -> None:
    argv = ("K=2", "hydra.launcher.command='sleep 600;'", "hydra.launcher.wait=false")
    code, out, _ = sweep(*argv)
    assert code == 0 and "the same command comes back" in out
    code, out, err = sweep(*argv)
    assert code == 0 and "SkyPilot 1 | RUNNING | slurm/local | attached" in err and len(launched(tmp_path)) == 1
    os.killpg(int((tmp_path / "sky" / "1" / "pid").read_text()), signal.SIGKILL)


def test_a_dry_run_shows_tasks_and_costs_and_launches_nothing(sweep: Run, tmp_path: Path) -> None:
    argv = ("K=2,3", "hydra.launcher.dryrun=true", "hydra.launcher.infra=gcp", "hydra.launcher.accelerators=H100:1")
    code, out, err = sweep(*argv, "hydra.launcher.use_spot=true", "hydra.launcher.regions=[us-east4,us-central1]")
    assert (code, unforeseen(err)) == (0, "")
    tasks = [task for task in yaml.safe_load_all(out) if task]
    assert [task["resources"]["any_of"] for task in tasks] == [
        [{"infra": "gcp/us-east4"}, {"infra": "gcp/us-central1"}]
    ] * 2
    assert all(task["resources"]["use_spot"] and " K=" in task["run"] for task in tasks)
    assert out.endswith("# 2 managed jobs, none of them launched; cost from $3.00 an hour each\n")
    assert not (tmp_path / "sky").exists() and not list(tmp_path.rglob("sweep.json"))


def test_what_an_infra_refuses_is_left_out_with_a_word(sweep: Run) -> None:
    code, out, err = sweep("K=2", "hydra.launcher.dryrun=true", "hydra.launcher.use_spot=true")
    assert code == 0 and "use_spot" not in out
    assert unforeseen(err) == "note: use_spot=true: Slurm has no spot machines; left out\n"


@pytest.mark.parametrize("asked", ["-m hardware=h100_spot gate=varH tau_v=4,5,6", "experiment=h100"])
def test_a_dry_run_asks_no_bucket_and_says_so(
    run: Run, sky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """Without a network, each question to one takes minutes. Nothing is fetched, either."""

    def no_network(url: str) -> object:
        raise AssertionError(f"{url} is asked")

    monkeypatch.setattr(bucket, "_open", no_network)
    monkeypatch.setenv("SELFSPEC_CHECKPOINT", "gs://bucket/prefix")
    monkeypatch.setenv("SELFSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    settings = (f"hydra.launcher.python={sky}", f"hydra.launcher.workdir={HERE.parents[1]}")
    code, out, err = run(*asked.split(), *settings, "hydra.launcher.dryrun=true")
    assert code == 0, err
    first, second = err.splitlines()
    assert first == "note: checkpoint.dir=gs://bucket/prefix: a dry run does not ask what is there"
    assert second.startswith("note: tracking.uri=null, without MLFLOW_TRACKING_URI: ")
    tasks = [task for task in yaml.safe_load_all(out) if task]
    assert len(tasks) == 3 and all(task["resources"]["use_spot"] for task in tasks)
    assert all("checkpoint.dir='\"'\"'gs://bucket/prefix'\"'\"'" in task["run"] for task in tasks)
    assert out.endswith("# 3 managed jobs, none of them launched; cost from $3.00 an hour each\n")
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"python", "multirun.yaml"}, "what Hydra itself writes of a sweep"


def test_a_dry_run_does_without_a_skypilot_that_does_not_answer(sweep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = _bridge.Bridge.ask

    def failing(self: _bridge.Bridge, do: str, **request: object) -> object:
        if do == "prepare":
            raise LaunchError("SkyPilot: no network")
        return ask(self, do, **request)

    monkeypatch.setattr(_bridge.Bridge, "ask", failing)
    code, out, err = sweep("K=2", "hydra.launcher.dryrun=true")
    assert code == 0 and "hydra.launcher: not checked by SkyPilot: SkyPilot: " in err, err
    assert out.endswith("# 1 managed jobs, none of them launched; cost unknown: no catalog at hand\n")


REFUSED = [
    ("checkpoint.dir=outputs/x", "checkpoint.dir=outputs/x: jobs elsewhere have no such folder"),
    (
        "model.source=hf:org/never-seen",
        "model.source=hf:org/never-seen: names no commit, and the hub does not say here",
    ),
    ("+hydra.launcher.envs={MY_TOKEN:s3}", "hydra.launcher.envs.MY_TOKEN: would be kept with the results"),
    ("hydra.launcher.accelerators=H1000:1", "accelerators=H1000:1: Slurm has none; known are H100"),
    ("hydra.launcher.infra=gpc", "hydra.launcher: Invalid infra 'gpc'"),
    ("hydra.launcher.acelerators=H100", "hydra.launcher.acelerators"),
    ("hydra.launcher.python=/no/such", "hydra.launcher.python=/no/such: cannot be run: No such file or directory"),
]


@pytest.mark.parametrize(("argv", "says"), REFUSED, ids=[argv for argv, _ in REFUSED])
def test_bad_input_costs_one_line_and_writes_nothing(sweep: Run, tmp_path: Path, argv: str, says: str) -> None:
    before = set(tmp_path.rglob("*"))
    code, out, err = sweep("K=2", *argv.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and says in err
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("-m hardware=h100_spot gate=varH tau_v=4,5,6", "checkpoint.dir: has no value; give one as checkpoint.dir=gs:"),
        (
            "hardware=h100_spot checkpoint.dir=gs://b/x",
            "hydra/launcher=skypilot_h100_spot: launches the jobs of a ",
        ),
    ],
)
def test_the_one_liner_says_what_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argv: str, says: str
) -> None:
    monkeypatch.delenv("SELFSPEC_CHECKPOINT", raising=False)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*argv.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {says}")
    assert list(tmp_path.iterdir()) == []


def test_what_only_jobs_need_need_not_be_on_this_machine(sweep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    argv = ("draft=none", "engine=vllm", "stages=[bench,quality,soak]", "quality.gate_prompts=0")
    code, out, err = sweep("hydra.launcher.dryrun=true", *argv, "model.source=file:/there", "K=2,3")
    assert code == 0 and "error" not in err and "# 1 managed jobs, none of them launched" in out


def test_a_job_is_told_all_that_was_said_here(sweep: Run, tmp_path: Path) -> None:
    mine = tmp_path / "my configs"
    (mine / "gate").mkdir(parents=True)
    (mine / "gate" / "mine.yaml").write_text("defaults: [maxp_schema, _self_]\nthreshold: 0.25\n")
    argv = (f"--config-dir={mine}", "gate=mine", "K=2", "+hydra.job.env_set.MY='a b'")
    code, _, err = sweep(*argv)
    assert code == 2 and f"--config-dir={mine}: jobs elsewhere have no such folder; must lie in" in err
    shutil.copytree(CONF, tmp_path / "conf")
    code, _, err = sweep(f"--config-path={tmp_path / 'conf'}", "K=2")
    assert code == 2 and f"--config-path={tmp_path / 'conf'}: jobs elsewhere have selfspec's own" in err
    code, out, err = sweep(*argv, f"hydra.launcher.workdir={tmp_path}")
    assert code == 0 and "| layerskip3 maxp=0.25 K=2 |" in out, err
    (job,) = launched(tmp_path)
    assert "'--config-dir=my configs' --config-name=config " in str(job["run"]) and "env_set.MY=" in str(job["run"])


@pytest.mark.parametrize("launched_by_then", [True, False])
def test_who_interrupts_is_told_what_goes_on(
    sweep: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched_by_then: bool
) -> None:
    ask = _bridge.Bridge.ask

    def interrupted(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def interrupted_while_launching(bridge: _bridge.Bridge, do: str, **request: object) -> object:
        return interrupted() if do == "launch" else ask(bridge, do, **request)

    with monkeypatch.context() as patch:
        if launched_by_then:
            patch.setattr(time, "sleep", interrupted)  # between two looks at the jobs
        else:
            patch.setattr(_bridge.Bridge, "ask", interrupted_while_launching)
        code, _, err = sweep("K=2,3", "hydra.launcher.command='sleep 600;'")
    told, last = err.splitlines()[-2:]
    assert code == 130 and last.startswith("SIGINT: ")
    if not launched_by_then:
        assert re.fullmatch(
            "jobs go on; to end them: (sky jobs cancel -n selfspec-[0-9a-f]{16}-[0-9a-f]{6}(; |$)){2}", told
        )
        return
    assert told in [f"jobs go on; to end them: sky jobs cancel {ids}" for ids in ("1 2", "2 1")]
    for number in (1, 2):
        os.killpg(int((tmp_path / "sky" / str(number) / "pid").read_text()), signal.SIGKILL)


def test_without_sky_it_says_how_to_get_it(sweep: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = sweep("K=2", "hydra.launcher.python=null")
    assert (code, err.count("\n")) == (2, 1) and "uv tool install" in err
    (tmp_path / "sky").write_text(f"#!{tmp_path / 'python'}\n")  # where pip, uv and pipx put the environment's Python
    (tmp_path / "sky").chmod(0o755)
    assert _bridge._python() == str(tmp_path / "python")
    for quote in "\"'":  # pip's way, and uv's, where the path has a space or is long
        script = f"#!/bin/sh\n'''exec' {quote}/some where/bin/python3{quote} \"$0\" \"$@\"\n' '''\nimport sky\n"
        (tmp_path / "sky").write_text(script)
        assert _bridge._python() == "/some where/bin/python3"


@pytest.mark.parametrize("version", ["0.10.3", None])
def test_an_old_or_missing_skypilot_is_refused(version: str | None, sky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if version is None:
        monkeypatch.setenv("PYTHONPATH", "")
        with pytest.raises(ConfigError, match=r"SkyPilot cannot be imported by .*; make one: uv tool install"):
            _bridge.Bridge([sys.executable, "-I", str(_bridge._SCRIPT)])
        return
    monkeypatch.setenv("FAKE_SKY_VERSION", version)
    with pytest.raises(ConfigError, match=r"SkyPilot 0\.10\.3 is too old; must be 0\.14 or newer"):
        _bridge.connect(str(sky))


def test_a_bridge_that_breaks_says_its_last_words() -> None:
    bridge = _bridge.Bridge(
        [sys.executable, "-c", "import sys; input(); print('{\"is\": 1}', flush=True); sys.exit('gone')"]
    )
    assert os.getsid(bridge._process.pid) != os.getsid(0), "a Ctrl-C at the terminal is not for it"
    with pytest.raises(LaunchError, match="SkyPilot's process ended; the last it said was: gone"):
        bridge.ask("queue")
    bridge.close()
