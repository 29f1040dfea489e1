"""The command line: what the user gets wrong costs one line, exit code 2 and nothing written, and no wait for torch."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from selfspec import config, job
from selfspec.data.assets import identity
from selfspec.run import main

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str, str]]
HEAVY = ("torch", "mlflow", "transformers", "matplotlib", "pyarrow", "safetensors")
BLOCKED = f"""
import sys
class Block:
    def find_spec(self, name, *rest):
        assert name.split(".")[0] not in {HEAVY}, f"{{name}} is imported"
sys.meta_path.insert(0, Block())
from selfspec.run import main
main()
"""


def tree(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def head_file(path: Path, facts: object, offsets: Sequence[int] = (0, 0)) -> Path:
    """A safetensors file of one empty tensor that carries such facts."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": offsets}
    header = json.dumps({"__metadata__": {"selfspec": json.dumps(facts)}, "weight": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


BAD = [
    ("gate=nope", "gate=nope: no such option; allowed are bandit, entropy, maxp, none, varH"),
    ("experiment=nope", "experiment=nope: no such option; allowed are baseline, "),
    ("tau_w=1", "tau_w: no such key; did you mean tau_v?"),
    ("gate.treshold=1", "gate.treshold: means nothing to gate=none; it has no settings; gate=entropy, maxp, varH have"),
    ("nonsense=1", "nonsense: no such key; known are name, "),
    ("+foo=1", "foo: no such key"),
    ("+draft.foo=1", "draft.foo: means nothing to draft=layerskip; its settings are exit_layer, "),
    ("exit_layer=0", "exit_layer=0: must be >= 1"),
    ("exit_layer=6", "exit_layer=6: tiny has 6 layers; must be from 1 to 5"),
    ("K=1.5", "K=1.5: "),
    ("K=", "K=: "),
    ("tau=abc", "tau=abc: "),
    ("tau=[1", "tau=[1: "),
    ("tau=${nope}", "nope"),
    ("hardware.device=tpu", "hardware.device=tpu: "),
    ("tracking=mlflow tracking.uri=file:/x", "tracking.uri=file:/x: must be "),
    ("workload.source=file:/no/such", "file:/no/such: there is no /no/such"),
    ("workload.source=ftp:x", "source=ftp:x: must be pypi:"),
    ("workload.sha256=123", "sha256=123: "),
    ("engine=torch model.source=file:/no/such", "file:/no/such: there is no /no/such"),
    ("engine=torch model.source=smollm2", "source=smollm2: must be pypi:"),
    ("checkpoint.resume=require", "checkpoint.resume=require: there is no journal"),
    ("output_dir={file}/x", "{file}/x/checkpoint"),
    ("checkpoint.dir={file}", "{file}/plans/"),
    ("engine=torch draft=lsq stages=[bench]", "stages=['bench']: draft=lsq needs a head and none is fitted yet"),
    ("engine=torch draft=lsq draft.head=/no/such", "/no/such: no head can be read there"),
    ("engine=torch draft=lsq draft.head={file}", "{file}: corrupt head"),
    ("engine=torch draft=lsq draft.head={other_model}", "{other_model}: fitted for model=another, but model="),
    ("engine=torch draft=lsq draft.head={other_exit}", "{other_exit}: fitted for exit_layer=2, but exit_layer=3 is"),
    ("engine=torch draft=lsq draft.head={no_facts}", "{no_facts}: corrupt head"),
    ("engine=torch draft=lsq draft.head={no_offsets}", "{no_offsets}: corrupt head"),
    ("output_dir={file}/x checkpoint.resume=never", "{file}/x"),
    ("hydra.job.chdir=true", "hydra.job.chdir=true: paths are meant from where the command is given; must be false"),
    ("serve.api_key=hush", "serve.api_key: would be kept with the results; give it as SELFSPEC_API_KEY, in the"),
]


@pytest.mark.parametrize(("overrides", "says"), BAD)
def test_bad_input_costs_one_line_and_writes_nothing(
    fake: list[str], run: Run, tmp_path: Path, prompts_file: Path, overrides: str, says: str
) -> None:
    model = identity(f"file:{prompts_file}")
    paths = {
        "file": tmp_path / "file",
        "other_model": head_file(tmp_path / "a", {"model": "another", "exit_layer": 3, "previous": False}),
        "other_exit": head_file(tmp_path / "b", {"model": model, "exit_layer": 2, "previous": False}),
        "no_facts": head_file(tmp_path / "c", []),
        "no_offsets": head_file(tmp_path / "d", {}, ()),
    }
    paths["file"].write_text("a regular file")
    for path, value in paths.items():
        overrides, says = (text.replace(f"{{{path}}}", str(value)) for text in (overrides, says))
    before = tree(tmp_path)
    code, out, err = run(*fake, *overrides.split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and says in err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        ("exit_layer=3,0", "exit_layer=0: must be >= 1"),
        ("K=1,2,99", "K=99: must be from 1 to 64"),
        ("gate=none,nope", "gate=nope: no such option"),
        ("draft=none,lsq", "draft=lsq: engine=fake cannot run it"),
        ("engine=torch draft=ngram,layerskip draft.max_match=5", "draft.max_match: means nothing to draft=layerskip; "),
        ("engine=torch draft=ngram,suffix draft.max_match=99", "draft.max_match=99: must be from 1 to 64"),
        ("K=interval(1,3)", "INTERVAL"),
        ("workload.source=file:/no/such seed=0,1", "file:/no/such: there is no /no/such"),
        ("engine=fake,torch model.source=smollm2", "source=smollm2: must be pypi:"),
        ("checkpoint.resume=auto,require", "checkpoint.resume=require: there is no journal"),
        ("engine=torch draft=layerskip,lsq stages=[bench]", "draft=lsq needs a head and none is fitted yet"),
        ("output_dir=/dev/null/x seed=0,1", "/dev/null/x"),
        ("hydra.job.chdir=true seed=0,1", "hydra.job.chdir=true: paths are meant"),
        ("hydra.sweep.subdir=${gate.name} seed=0,1", "hydra.sweep.subdir: gives jobs a folder in common"),
        ("hydra/launcher=local hydra.launcher.poll_s=-1 seed=0,1", "hydra.launcher.poll_s=-1.0: must be >= 0"),
    ],
)
def test_one_bad_job_stops_a_sweep_before_it_starts(
    fake: list[str], run: Run, tmp_path: Path, sweep: str, says: str
) -> None:
    code, out, err = run("-m", *fake, *sweep.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err
    assert tree(tmp_path) == {}


def test_offline_without_a_cache(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFSPEC_OFFLINE", "1")
    monkeypatch.setenv("SELFSPEC_CACHE", str(tmp_path / "cache"))
    for mode in ([], ["-m", "K=1,2"]):
        code, out, err = run(*mode, f"output_dir={tmp_path / 'outputs'}")
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: pypi:") and "SELFSPEC_OFFLINE" in err
        assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [('"journal":1', '"journal":2', "journal format 2; this selfspec reads 1"), ("}\n{", "}\nx{", "line 2: is not")],
)
def test_a_journal_that_cannot_be_read(
    fake: list[str], run: Run, tmp_path: Path, old: str, new: str, says: str
) -> None:
    assert run(*fake)[0] == 0
    (journal,) = tmp_path.rglob("journal.jsonl")
    journal.write_text(journal.read_text().replace(old, new, 1))
    before = tree(tmp_path)
    code, out, err = run(*fake)
    assert (code, out, err.count("\n")) == (2, "", 1) and f"error: {journal}" in err and says in err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("argv", "code"), [("--help", 0), ("--cfg job", 0), ("--cfg job gate=varH --resolve", 0), ("-m K=1,0", 2)]
)
def test_answers_without_torch(tmp_path: Path, argv: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED, *argv.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr == ("error: K=0: must be from 1 to 64, or auto\n" if code else "")
    assert ("exit_layer" in done.stdout) == (code == 0) and tree(tmp_path) == {}


def test_as_a_module_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "selfspec.run", "tau=1.5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: tau=1.5: must be from 0 to 1\n")
    assert tree(tmp_path) == {}


def test_a_run_shows_its_table(fake: list[str], run: Run) -> None:
    code, out, err = run(*fake)
    assert (code, err) == (0, "") and "| layerskip3 K=4 |" in out


def test_a_key_of_the_environment_is_kept_nowhere(
    fake: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "hush-hush")
    code, out, err = run(*fake, "serve.api_key=${oc.env:MY_KEY}")
    assert (code, err) == (0, "") and "hush" not in out
    kept = [content for content in tree(tmp_path).values() if content is not None]
    assert b"serve.api_key=${oc.env:MY_KEY}" in b"".join(kept) and not any(b"hush" in content for content in kept)


def test_full_errors_where_asked_for(fake: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("--help")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["selfspec.run", *fake, "gate=nope"])
    GlobalHydra.instance().clear()
    with pytest.raises(MissingConfigException):
        main()


def test_what_only_the_job_finds_out_costs_one_line_too(fake: list[str], run: Run) -> None:
    code, out, err = run(*fake, "scale.prompts=500", "scale.warmup=0")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: scale.prompts=500: must be at most ")


@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_a_disk_that_is_full_when_hydra_writes(
    fake: list[str], run: Run, monkeypatch: pytest.MonkeyPatch, mode: list[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OmegaConf, "save", full)
    monkeypatch.setattr("hydra.core.utils._save_config", full)
    assert run(*mode, *fake) == (2, "", "error: a file: cannot be written: no space left on device\n")


def test_interrupted_before_the_job_began(fake: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "fetch", lambda plan: os.kill(os.getpid(), signal.SIGINT))
    try:
        code, _, err = run(*fake)
    except KeyboardInterrupt:
        pytest.fail("a traceback")
    assert code == 130 and err.count("\n") == 1


@pytest.mark.parametrize("old", config.RENAMED)
def test_who_uses_an_old_name_is_told_the_new_one(old: str, run: Run, tmp_path: Path) -> None:
    *_, item = old.split("[].")
    asked = old if "=" in old else f"serve.backends=[{{name: a, {item}: 1}}]" if "[]" in old else f"{old}=1"
    for override in (asked, f"+{asked}"):
        if override[0] == "+" and ("=" in old or "[]" in old):
            continue
        code, out, err = run(override, f"output_dir={tmp_path / 'out'}")
        assert (code, out, err) == (2, "", f"error: {old}: is now {config.RENAMED[old]}\n")
    assert not (tmp_path / "out").exists()
