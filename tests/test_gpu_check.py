"""The script that asks a GPU: tried on a CPU, so that a lent card finds it working."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "infra/gpu/check.py"


@pytest.mark.slow
def test_every_section_runs_on_a_tiny_shape(tmp_path: Path) -> None:
    asked = ["--device", "cpu", "--shapes", "tiny", "--new", "8", "--out", str(tmp_path)]
    asked += [
        "--tests",
        "tests/test_tree.py -m fast",
        "--sections",
        "card,lossless,passes,decoding,profile,speculation",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), *asked], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "check.json").read_text())
    assert not [name for name, section in found.items() if "failed" in section], done.stderr
    assert found["card"]["read_gb_s"] > 0 and found["lossless"]["exit"] == 0
    assert len(found["passes"]) == 5 and found["decoding"]["tiny"]["same_tokens"] == 8
    assert found["profile"]["tiny"] and found["speculation"] == {"skipped": "--model names none"}
