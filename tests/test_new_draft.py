"""A new draft is one file and one YAML: such a pair, dropped into a copy of the package, runs from fit to report."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selfspec.report import results

REPO = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

REPEAT = '''"""Drafts the last token again and again."""

from collections.abc import Sequence

from selfspec.config import Draft as DraftConfig
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.tree import Tree
from selfspec.speculation.draft.base import Draft, Proposal
from selfspec.speculation.sequence import Seq
from selfspec.speculation.gate import Gate
from selfspec.speculation.head import Head


class Repeat(Draft):
    """A chain of the last token."""

    def propose(self, rows: Sequence[Seq], ks: Sequence[int], gate: Gate, cache: KVCache) -> Proposal:
        """As many as are asked for."""
        return Proposal([Tree.chain(row.tokens[-1:] * (k + 1)) for row, k in zip(rows, ks, strict=True)])


def make(draft: DraftConfig, model: Model, head: Head | None) -> Draft:
    """The draft a config asks for."""
    return Repeat(model)
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its configuration in a folder of their own, with the pair in them."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("selfspec", "conf", "launchers"):
        shutil.copytree(REPO / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "selfspec/speculation/draft/repeat.py").write_text(REPEAT)
    (root / "conf/draft/repeat.yaml").write_text("# The last token again.\nname: repeat\n")
    return root


def run(copy: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(copy), str(copy / "launchers")])
    command = [sys.executable, "-P", "-m", "selfspec.run", *argv]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def test_it_runs_from_fit_to_report(copy: Path, overrides: list[str], tmp_path: Path) -> None:
    done = run(copy, *overrides, "draft=repeat", "K=3", "stages=[fit,bench]", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    result = results.read(tmp_path / "run" / results.FILE)
    assert (result["label"], result["lossless"], result["status"]) == ("repeat K=3", "yes", "finished")
    assert 0 < result["measurements"]["bench/acceptance"] < 1
    assert "| repeat K=3 " in done.stdout and "| repeat K=3 " in (tmp_path / "run" / "report.txt").read_text()


def test_the_help_lists_it(copy: Path) -> None:
    assert ", repeat, " in run(copy, "--help").stdout


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "speculation/draft/half.py is missing"),
        ("class Half: ...", "speculation/draft/half.py has no make(draft, model, head)"),
        ("def make(", "speculation/draft/half.py, line 1: '(' was never closed"),
    ],
)
def test_an_unfinished_pair_costs_one_line(
    copy: Path, overrides: list[str], tmp_path: Path, source: str | None, says: str
) -> None:
    file = copy / "selfspec/speculation/draft/half.py"
    file.unlink(missing_ok=True)
    if source is not None:
        file.write_text(source)
    (copy / "conf/draft/half.yaml").write_text("name: half\n")
    done = run(copy, *overrides, "draft=half", f"hydra.run.dir={tmp_path / 'run'}")
    assert (done.returncode, done.stderr) == (2, f"error: draft=half: selfspec/{says}\n")
    assert not (tmp_path / "run").exists()


def test_a_file_without_a_yaml_is_no_option(copy: Path, overrides: list[str]) -> None:
    (copy / "selfspec/speculation/draft/lonely.py").write_text(REPEAT)
    done = run(copy, *overrides, "draft=lonely")
    assert done.returncode == 2 and done.stderr.startswith("error: draft=lonely: no such option; allowed are adapter, ")
