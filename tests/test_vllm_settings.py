"""Early exit inside vLLM without vLLM: what it may be told, which versions it knows, what comes of drafts."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfspec.errors import ConfigError
from selfspec.vllm_plugin import mend, versions
from selfspec.vllm_plugin.record import Drafted, Record
from selfspec.vllm_plugin.settings import parse

ADAPTIVE = {"name": "adaptive", "low": 1, "high": 8, "step": 1, "window": 8, "target": 0.6}


def test_settings_are_typed() -> None:
    settings = parse({"exit_layer": 12, "gate": {"name": "maxp", "threshold": 0.4}, "controller": ADAPTIVE}, 8)
    assert (settings.exit_layer, settings.head, settings.gate.name) == (12, None, "maxp")
    assert (settings.controller.name, settings.controller.K) == ("adaptive", 8)
    assert parse({"exit_layer": 12}, 5).controller.K == 5


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ([], r"selfspec=\[\]: must be a JSON object"),
        ({}, "selfspec.exit_layer: has no value"),
        ({"exit_layer": 0}, "selfspec.exit_layer=0: must be >= 1"),
        ({"exit_layer": "late"}, "selfspec.exit_layer: Value 'late' .* could not be converted to Integer"),
        ({"exit_layer": 3, "depth": 1}, "selfspec.depth: Key 'depth' not in 'Settings'"),
        ({"exit_layer": 3, "gate": {"name": "mood"}}, "selfspec.gate.name=mood: allowed are bandit, entropy"),
        ({"exit_layer": 3, "gate": {"name": "maxp"}}, "selfspec.gate.threshold: has no value; give one"),
        ({"exit_layer": 3, "gate": {"name": "bandit"}}, "selfspec.gate.arms: has no value; give one"),
        (
            {"exit_layer": 3, "controller": {"K": 9}},
            "selfspec.controller: asks for up to 9; must be from 1 to",
        ),
        (
            {"exit_layer": 3, "controller": {"name": "autotune", "K": 4, "exits": [3]}},
            "autotune: inside vLLM one exit serves all; allowed",
        ),
        ({"exit_layer": 3, "controller": {"name": "cost"}}, "selfspec.controller.window: has no value; give one"),
        (
            {"exit_layer": 3, "controller": ADAPTIVE | {"K": 0, "low": 9}},
            "selfspec.controller.K=8: must be from 9 to 8",
        ),
    ],
)
def test_what_is_wrong_is_named(asked: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        parse(asked, 8)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("most", [None, 0, "4"])
def test_how_much_is_drafted_has_to_be_said(most: Any) -> None:
    with pytest.raises(ConfigError, match=f"num_speculative_tokens={most!r}: must be a number >= 1"):
        parse({"exit_layer": 3}, most)


def test_what_learns_from_times_runs_on_one_rank() -> None:
    asked = {"exit_layer": 3, "gate": {"name": "bandit", "arms": [0.3]}}
    parse(asked, 4, ranks=1)
    with pytest.raises(ConfigError, match="gate=bandit, controller=fixed: learns from times"):
        parse(asked, 4, ranks=2)


@pytest.mark.parametrize("known", ["0.32.0", "0.32.1", "0.32.0+cpu"])
def test_known_versions(known: str) -> None:
    versions.check(known)


@pytest.mark.parametrize("unknown", ["0.31.2", "0.33.0", "0.320", "1.0", "0"])
def test_unknown_versions_are_refused(unknown: str) -> None:
    with pytest.raises(ConfigError, match=rf"vllm={unknown}: early exit inside vLLM knows the versions 0\.32\.\*"):
        versions.check(unknown)


def test_no_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_PACKAGES", ("no-such-package",))
    with pytest.raises(ConfigError, match="vllm=None: early exit"):
        versions.check()


def test_a_torchvision_of_another_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    versions.check_torchvision()
    monkeypatch.undo()
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision.py").write_text(broken)
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    says = r"torchvision 0\.28\.0 was built for another torch \(.*nms does not exist\); pip uninstall -y torchvision"
    with pytest.raises(ConfigError, match=says):
        versions.check_torchvision()


@pytest.mark.parametrize("name", ["lib", "some where", "it's some where"])
def test_a_folder_with_a_space_is_quoted_for_the_linker(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import cpp_extension

    (tmp_path / name).mkdir()
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(tmp_path / name))
    for _ in range(2):
        mend.quote_library_path()
        assert shlex.split(f"-L{cpp_extension.TORCH_LIB_PATH}")[0].endswith(f"/{name}")


@pytest.mark.slow
def test_settings_need_no_torch() -> None:
    code = "import sys, selfspec.vllm_plugin.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_draft_is_judged_when_it_was_verified_as_made() -> None:
    record = Record()
    record.drafted({"a": Drafted(4, [7, 8]), "b": Drafted(4, [7, 8]), "c": Drafted(0), "d": Drafted(4, [7])}, 1.0, 2.0)
    cycles = record.judge(["a", "b", "c", "d", "new"], [[7, 9], [5], [6], [], [3]], [[7, 8], [0, 0], [], [7], []], 4.0)
    judged = [(c.k_asked, c.proposed, c.accepted, c.new_tokens, c.batch) for c in cycles]
    assert judged == [(4, 2, 1, 2, 2), (0, 0, 0, 1, 2)]
    assert [(c.draft_ms, c.verify_ms) for c in cycles] == [(1000, 2000)] * 2
    assert not record.pending and record.totals["accepted"] == 1


def test_requests_that_are_no_more_are_forgotten() -> None:
    record = Record()
    record.drafted({"a": Drafted(2, [7]), "b": Drafted(2, [7])}, 0.0, 1.0)
    record.judge(["a"], [[7, 1]], [[7]], 2.0)
    assert len(record.history("a")) == 1 and record.history("new") == []
    record.forget({"c": None})
    assert not record.cycles and not record.pending


def test_requests_settings_are_their_tokens() -> None:
    import torch

    from selfspec.vllm_plugin.mend import expand

    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    assert expand(torch.tensor([0.5, 9.0, 0.0]), ends, 5, 0, 1).tolist() == [0.5, 0.5, 1, 1, 1]
    assert expand(torch.tensor([5, 6, 7], dtype=torch.int32), ends, 5).tolist() == [5, 5, 7, 7, 7]
    assert expand(torch.tensor([5, 6, 7]), torch.zeros_like(ends), 0).tolist() == []
