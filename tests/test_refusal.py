"""What Hydra, OmegaConf and YAML refuse is one whole line: file, key, value, reason, and Hydra's own hint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfspec import refusal
from selfspec.config import load
from selfspec.run import CONF, ordered

pytestmark = pytest.mark.slow
Run = Callable[..., tuple[int, str, str]]

ARGV = [
    ("--experiment=fastest", "--experiment=fastest: no such flag; a setting is given as experiment=fastest"),
    ("--K", "--K: no such flag; a setting is given as K=..."),
    ("--config-name=nope", "--config-name=nope: there is no such config"),
    ("-m --cfg=job", "Only one of --run, --multirun, --cfg, --info and --shell_completion can be specified"),
    ("K=1,2", "3. To sweep over it, add --multirun to your command line"),
    ("gate=[varH,maxp]", "gate=[varH,maxp]: must be one option; to sweep over them, -m gate=varH,maxp"),
    ("workload=[sharegpt,fixed_8_16]", "workload=[sharegpt,fixed_8_16]: must be one option"),
    ("-m K=glob(a*)", "K=glob(a*): is a sweep over nothing"),
    ("output_dir='~nobodyhere/x'", "output_dir=~nobodyhere/x: there is no such home folder"),
    ("output_dir=", "output_dir: has no value; the current folder is output_dir=."),
    ("name=../x", "name=../x: must name a folder below output_dir"),
    ("soak.seconds=nan", "soak.seconds=nan: must be from 0 to"),
    ("draft.head='~nobodyhere/x'", "draft.head=~nobodyhere/x: there is no such home folder"),
    ("name=", "name=: must name a folder below output_dir"),
    ("workload.source='file:~nobodyhere/x'", "file:~nobodyhere/x: there is no such home folder"),
    ("tracking=mlflow tracking.uri='sqlite:///~nobodyhere/x'", "tracking.uri=~nobodyhere/x: there is no such home"),
    ("name=../../x", "name=../../x: must name a folder below output_dir"),
    ("name=/x", "name=/x: must name a folder below output_dir"),
    ("name=a/../../x", "name=a/../../x: must name a folder below output_dir"),
    ("-m name=..,x", "name=..: must name a folder below output_dir"),
    ("-m hydra.sweep.subdir=../x${hydra.job.num} seed=1,2", "hydra.sweep.subdir: gives a job the folder "),
    ("model.name='\x1b[31mred'", "model.name: has control characters"),
    ("workload.name='\u202eab'", "workload.name: has control characters"),
    ("tracking=mlflow tracking.uri='https://h/?token=s3'", "tracking.uri=https://h/?...: must hold no credentials"),
    ("checkpoint.dir='gs://b/p?token=s3'", "checkpoint.dir=gs://b/p?...: must be without credentials"),
    ("checkpoint.dir='s3://key:sec/ret@b/p'", "checkpoint.dir=s3://b/p: must be without credentials"),
    ("+hydra.job.env_set.HF_TOKEN=s3", "hydra.job.env_set.HF_TOKEN: would be kept with the results"),
    ("serve.backends=[{name:a,url:'https://h/v1?key=s3'}]", "serve.backends[0].url=https://h/v1?...: must be http(s)"),
    ("serve.backends=[{name:a,url:'https://h/v1#s3'}]", "serve.backends[0].url=https://h/v1?...: must be http(s)"),
    ("engine=openai draft=none engine.url='http://h?api_key=s3'", "engine.url=http://h?...: must be http(s)://HOST"),
    ("-m experiment=k_sweep,exit_sweep", "experiment=k_sweep: is a sweep over K=1,2,3,4,6,8, which would be dropped"),
]
YAMLS = [
    (b"name: a\n\tsource: x\n", "{file}, line 2, column 1: is no YAML: found character '\\t' that cannot start any"),
    (b"name: a\nname: b\n", "{file}, line 2, column 1: is no YAML: found duplicate key name"),
    (b"name: caf\xe9\n", "{file}: cannot be read: 'utf-8' codec can't decode byte 0xe9"),
    (b"3\n", "{file}: cannot be read: Invalid loaded object type: int"),
    (b"a: &a [*a]\n", "{file}: cannot be read: maximum recursion depth exceeded"),
    (b"- a\n", "workload/mine.yaml: Merge error: list is not a subclass of Workload"),
    (b'name: "\x01"\n', "{file}: cannot be read: unacceptable character #x0001"),
    (b"max_prompt_tokens: 1e3\n", "workload/mine.yaml: workload.max_prompt_tokens: Value '1000.0' of type 'float'"),
    (b"name: x\nchatt: true\n", "workload/mine.yaml: workload.chatt: no such key; did you mean workload.chat?"),
    (b"defaults: 3\n", "Invalid defaults list in 'workload/mine', defaults must be a list (got int)"),
]


def refused(run: Run, *argv: str) -> str:
    code, out, err = run(*argv)
    lines = [line for line in err.splitlines() if "UserWarning" not in line and not line.startswith("  ")]
    assert (code, out, len(lines)) == (2, "", 1), err
    return lines[0]


@pytest.mark.parametrize(("argv", "says"), ARGV)
def test_a_command_line(fake: list[str], run: Run, tmp_path: Path, argv: str, says: str) -> None:
    assert says in refused(run, *fake, *argv.split())
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(("content", "says"), YAMLS)
def test_a_yaml(fake: list[str], run: Run, tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "conf" / "workload" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    said = refused(run, "workload=mine", *fake, f"--config-dir={tmp_path / 'conf'}")
    assert f"error: {says.replace('{file}', str(file))}" in said


def test_flags_and_settings_in_any_order() -> None:
    words = ordered(["K=2", "--config-dir", "c", "seed=1", "-m"])
    assert words == ["K=2", "seed=1", "--config-dir", "c", "-m"]


@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_hydras_own_values_and_the_home_folder(
    fake: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: list[str]
) -> None:
    """``${hydra:...}`` means in a callback what it means in a job; ``~`` what it means in a shell."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for place, folder in (("${hydra:runtime.cwd}/here", "here"), ("~/there", "home/there")):
        code, _, err = run(*mode, *fake, f"output_dir='{place}'")
        assert (code, err) == (0, "")
        assert list((tmp_path / folder / "checkpoint" / "plans").iterdir())
    assert not (tmp_path / "~").exists()


def test_a_sweep_given_to_the_sweeper(fake: list[str], run: Run) -> None:
    code, out, err = run("-m", *fake, "+hydra.sweeper.params.K='1,2'")
    assert (code, err) == (0, "") and "K=1 |" in out and "K=2 |" in out


_KEYS = ["name", "source", "new_tokens", "chat", "defaults", "other"]


def _yaml(node: object) -> bytes:
    return yaml.safe_dump(node).encode(errors="surrogatepass")


_NODES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("${nope}"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3),
    max_leaves=6,
)
_TEXTS = st.text(st.sampled_from("abn:-[]{}&*!|>'\"%@`#?, \n\t\\$\x00\x85\ud800"), max_size=20)


@settings(max_examples=25, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=st.binary(max_size=12) | _TEXTS.map(lambda text: text.encode(errors="surrogatepass")) | _NODES.map(_yaml)
)
def test_any_yaml_composes_or_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("conf")
    (folder / "workload").mkdir()
    (folder / "workload" / "mine.yaml").write_bytes(content)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            load(compose("config", [f"hydra.searchpath=[file://{folder}]", "workload=mine", "draft=ngram"]))
        except Exception as error:
            assert refusal.foreseen(error), repr(error)
            assert len(refusal.sentence(error).splitlines()) == 1
