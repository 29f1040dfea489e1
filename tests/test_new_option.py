"""A new option is one file and one YAML: such pairs, dropped into a copy of the package, run from fit to report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selfspec.axes import AXES
from selfspec.report import results

REPO = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

FILES = {
    "draft/repeat": '''"""Drafts the last token again and again."""

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import MISSING

from selfspec.axes import DraftOptions
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.tree import Tree
from selfspec.options import bounded
from selfspec.speculation.draft.base import Draft, Proposal
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head
from selfspec.speculation.sequence import Seq


@dataclass
class Options(DraftOptions):
    """How often."""

    name: str = "repeat"
    most: int = bounded(MISSING, 1, 8)
    """The longest chain."""

    def make(self, model: Model, head: Head | None) -> Draft:
        """The draft."""
        return Repeat(model, self.most)


class Repeat(Draft):
    """A chain of the last token."""

    def __init__(self, model: Model, most: int) -> None:
        super().__init__(model)
        self.most = most

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        """As many as are asked for, and no more than the most."""
        lengths = [min(k, self.most) for k in ks]
        return Proposal([Tree.chain(row.tokens[-1:] * (k + 1)) for row, k in zip(rows, lengths, strict=True)])
''',
    "gate/second": '''"""Stops at every second token."""

from dataclasses import dataclass

from selfspec.axes import GateOptions
from selfspec.speculation.gate.base import Gate


@dataclass
class Options(GateOptions):
    """Nothing to set."""

    name: str = "second"

    def make(self, seed: int = 0) -> Gate:
        """The gate."""
        return Second()


class Second(Gate):
    """Counts."""

    reads = True
    seen = 0

    def signal(self, logits):
        """Zero for each."""
        return logits.new_zeros(len(logits))

    def stops(self, signal: float) -> bool:
        """Every second time it is asked."""
        self.seen += 1
        return self.seen % 2 == 0
''',
    "controller/swing": '''"""K, and one less, in turn."""

from dataclasses import dataclass

from selfspec.axes import ControllerOptions
from selfspec.speculation.controller.base import Controller


@dataclass
class Options(ControllerOptions):
    """K."""

    name: str = "swing"

    def make(self, seed: int = 0) -> Controller:
        """The controller."""
        return Swing(self.k)


class Swing(Controller):
    """By the request's cycles."""

    def num_draft_tokens(self, history, batch: int) -> int:
        """Less in every second one."""
        return self.k - len(history) % 2
''',
    "policy/strict": '''"""The longest prefix, by another name."""

from dataclasses import dataclass

from selfspec.axes import PolicyOptions
from selfspec.speculation.policy.longest_prefix import LongestPrefix


@dataclass
class Options(PolicyOptions):
    """Nothing of its own."""

    name: str = "strict"

    def make(self) -> LongestPrefix:
        """The policy."""
        return LongestPrefix()
''',
    "engine/mirror": '''"""The torch engine, by another name."""

from dataclasses import dataclass

from selfspec.axes import EngineOptions


@dataclass
class Options(EngineOptions):
    """Nothing of its own."""

    name: str = "mirror"

    @property
    def label(self) -> str:
        """Who decodes."""
        return "by mirror"

    def make(self, plan):
        """The engine."""
        from selfspec.engine.torch.engine import TorchEngine

        return TorchEngine(plan)
''',
}
SETTINGS = {"draft/repeat": "most: 2\n", "controller/swing": "K: ${K}\n"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its configuration in a folder of their own, with the pairs in them."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("selfspec", "conf", "launchers"):
        shutil.copytree(REPO / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for pair, source in FILES.items():
        axis, name = pair.split("/")
        code(root, axis, name).write_text(source)
        settings = SETTINGS.get(pair, "")
        (root / "conf" / f"{pair}.yaml").write_text(f"# Of a test.\ndefaults: [{name}_schema, _self_]\n{settings}")
    return root


def code(root: Path, axis: str, name: str) -> Path:
    return root / AXES[axis].package.replace(".", "/") / f"{name}.py"


def run(copy: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(copy), str(copy / "launchers")])
    command = [sys.executable, "-P", "-m", "selfspec.run", *argv]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        (["draft=repeat"], "repeat K=3"),
        (
            ["draft=lsq", "gate=second", "controller=swing", "policy=strict", "engine=mirror"],
            "lsq3 second swing strict by mirror",
        ),
        (["draft=layerskip", "gate=second", "controller=swing", "engine=fake"], "layerskip3 second swing"),
    ],
)
def test_they_run_from_fit_to_report(
    copy: Path, overrides: list[str], tmp_path: Path, asked: list[str], label: str
) -> None:
    done = run(copy, *overrides, *asked, "K=3", "stages=[fit,bench]", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    result = results.read(tmp_path / "run" / results.FILE)
    assert (result["label"], result["lossless"], result["status"]) == (label, "yes", "finished")
    assert 0 < result["measurements"]["bench/acceptance"] <= 1
    assert f"| {label} " in done.stdout and f"| {label} " in (tmp_path / "run" / "report.txt").read_text()


def test_a_setting_of_its_own_is_checked_shown_and_journalled(copy: Path, overrides: list[str], tmp_path: Path) -> None:
    asked = [*overrides, "draft=repeat", f"hydra.run.dir={tmp_path / 'run'}"]
    assert "  name: repeat\n  most: 2\n" in run(copy, *asked, "--cfg", "job").stdout
    assert run(copy, *asked, "draft.most=9").stderr == "error: draft.most=9: must be from 1 to 8\n"
    said = run(copy, *asked, "draft.mst=1").stderr
    assert said.endswith("draft=repeat; its settings are most; did you mean draft.most?\n")
    assert run(copy, *asked, "draft.most=1").returncode == 0
    (journal,) = tmp_path.rglob("journal.jsonl")
    header = json.loads(journal.read_text().splitlines()[0])
    assert header["settings"]["draft"] == {"name": "repeat", "most": 1}


def test_the_help_lists_them_and_no_schema(copy: Path) -> None:
    said = run(copy, "--help").stdout
    assert all(f" {pair.split('/')[1]}" in said for pair in FILES) and "_schema" not in said


EMPTY = (
    "from dataclasses import dataclass\nfrom selfspec.axes import *\n@dataclass\nclass Options({base}):\n    {body}\n"
)
BEGIN = "defaults: [half_schema, _self_]\n"


@pytest.mark.parametrize(
    ("axis", "source", "yaml", "says"),
    [
        *((axis, None, BEGIN, "{file} is missing") for axis in AXES),
        *((axis, EMPTY, BEGIN, "{file}: Options has no {asked}") for axis in AXES),
        ("draft", "class Half: ...", BEGIN, "{file} has no Options"),
        ("draft", "class Options: ...", BEGIN, "{file}: Options must be a dataclass, and inherit DraftOptions"),
        ("gate", EMPTY.replace("half", "other"), BEGIN, "{file}: Options.name must be 'half'"),
        ("draft", "class Options(", BEGIN, "{file}, line 1: '(' was never closed"),
        ("policy", "import nowhere\nclass Options: ...", BEGIN, "{file} cannot be imported: No module named 'nowhere'"),
    ],
)
def test_an_unfinished_pair_costs_one_line(
    copy: Path, overrides: list[str], tmp_path: Path, axis: str, source: str | None, yaml: str, says: str
) -> None:
    file = code(copy, axis, "half")
    if source is not None:
        wrong = "'other'" if "Options.name" in says else "'half'"
        file.write_text(source.replace("{base}", AXES[axis].base.__name__).replace("{body}", f"name: str = {wrong}"))
    (copy / "conf" / axis / "half.yaml").write_text(yaml)
    done = run(copy, *overrides, f"{axis}=half", f"hydra.run.dir={tmp_path / 'run'}")
    file.unlink(missing_ok=True)
    says = says.format(file=file.relative_to(copy), asked=AXES[axis].base.asked)
    assert (done.returncode, done.stderr) == (2, f"error: {axis}=half: {says}\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("yaml", ["name: half\n", "name: half\nmost: 1\n"])
def test_a_yaml_without_its_schema_costs_one_line(copy: Path, overrides: list[str], yaml: str) -> None:
    (copy / "conf/draft/bare.yaml").write_text(yaml)
    done = run(copy, *overrides, "draft=bare")
    says = "draft: its file must begin with 'defaults: [NAME_schema, _self_]', NAME one of adapter, draft_model, "
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert says in done.stderr and done.stderr.count("\n") == 1


def test_a_file_without_a_yaml_is_no_option(copy: Path, overrides: list[str]) -> None:
    code(copy, "draft", "lonely").write_text(FILES["draft/repeat"].replace('"repeat"', '"lonely"'))
    done = run(copy, *overrides, "draft=lonely")
    assert done.returncode == 2 and done.stderr.startswith("error: draft=lonely: no such option; allowed are adapter, ")


def test_listing_all_options_waits_for_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "vllm", "transformers", "mlflow")
    listing = "import sys; from selfspec.axes import AXES; [axis.options for axis in AXES.values()]"
    command = [sys.executable, "-c", f"{listing}; print(*({{*sys.modules}} & {{*{heavy}}}))"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")
