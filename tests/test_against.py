"""report.against: which differences are regressions, and what is not compared."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plans import planned, run_job
from test_report import result
from tiny import fake_job, prompts

from selfspec.files import csv_text
from selfspec.metrics import UNIT_COLUMNS
from selfspec.report.__main__ import main
from selfspec.report.against import UNITS, compare
from selfspec.report.results import FILE

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A job's folder: speed-ups by prompt, the same tok/s and two tokens a cycle, and what its result says else."""

    def make(name: str, speedups: Sequence[float], tokens: int = 20, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / FILE).write_text(json.dumps(result(**changes)))
        lines = [[f"p{n}", 9, 21, 100 * one, 100.0, one, 10, tokens, 40, 10, 0] for n, one in enumerate(speedups)]
        (folder / UNITS).write_text(csv_text([UNIT_COLUMNS, *lines]))
        return folder

    return make


def around(middle: float, prompts: int = 24, seed: int = 0) -> list[float]:
    """Prompts whose speed-ups differ by a factor of several, as they do, times the same for all."""
    return list(middle * np.exp(np.random.default_rng(seed).normal(0, 0.5, prompts)))


@pytest.mark.parametrize(
    ("factor", "code", "word"),
    [(1.0, 0, "no regression"), (1.3, 0, "no regression"), (0.97, 0, "no regression"), (0.9, 1, "a regression")],
)
def test_what_is_slower_by_more_than_the_margin_is_a_regression(
    factor: float, code: int, word: str, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though prompts differ by far more than that: each is compared with itself."""
    noise = np.random.default_rng(1).normal(1, 0.01, 24)
    b = make("b", [factor * one * luck for one, luck in zip(around(1.5), noise, strict=True)])
    assert main([str(make("a", around(1.5))), "--against", str(b)]) == code
    assert f"B is {word}" in capsys.readouterr().out


def test_what_is_not_certain_is_undecided(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make("a", around(1.5)), make("b", around(1.5, seed=2))
    assert main([str(a), "--against", str(b)]) == 3
    assert main([str(a), "--against", str(b), "--measure", "acceptance_length"]) == 0
    assert main([str(a), "--against", str(b), "--margin", "0.6"]) == 0
    assert "speedup: " in capsys.readouterr().out
    few = make("few", [1.0] * 5), make("fewer", [1.0] * 5)
    assert main([str(few[0]), "--against", str(few[1])]) == 3, "five prompts have no 95% interval of a median"


def test_shorter_drafts_and_lost_losslessness_are_regressions_whatever_the_speed(make: Make) -> None:
    a = make("a", [1.0] * 8)
    assert main([str(a), "--against", str(make("b", [1.0] * 8, tokens=18))]) == 1
    lossy = make("c", [2.0] * 8, lossless="lossy")
    assert main([str(a), "--against", str(lossy)]) == 1
    assert main([str(lossy), "--against", str(make("d", [2.0] * 8, lossless="lossy"))]) == 0


def test_prompts_of_one_alone_are_left_out_and_told(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make("a", [1.0] * 10), make("b", [1.0] * 8, gate={"name": "varH", "threshold": 6.0})
    found = compare(a, b)
    assert [one.prompts for one in found.compared] == [8] * 3
    assert main([str(a), "--against", str(b)]) == 0
    said = capsys.readouterr().out
    assert "8 units are in both, of A's 10 and B's 8" in said and "gate.threshold: 4.0 -> 6.0" in said


def on(cpu: str = "Test CPU", **extra: str) -> dict[str, Any]:
    """A provenance."""
    return {"provenance": {"hardware": {"cpu": cpu, "physical_cores": 2}, "extra": {"device": "cpu", **extra}}}


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (
            on(),
            on("Other CPU"),
            "hardware.cpu is Other CPU in {b}, and Test CPU in {a}: timings of different hardware ",
        ),
        (on(dtype="bf16"), on(dtype="fp32"), "extra.dtype is fp32 in {b}, and bf16 in {a}: timings"),
        (
            {"workload": {"name": "x", "new_tokens": 96}},
            {"workload": {"name": "x", "new_tokens": 64}},
            "workload.new_tokens is 64 in {b}, and 96 in {a}: not the same prompts",
        ),
        ({}, {"status": "failed", "error": "StageError: no"}, "{b}: failed: StageError: no"),
    ],
)
def test_other_hardware_and_other_work_are_refused(
    before: dict[str, Any], after: dict[str, Any], reason: str, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make("a", [1.0] * 8, **before), make("b", [1.0] * 8, **after)
    assert main([str(a), "--against", str(b)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {reason.format(a=a, b=b)}")


def test_a_newer_torch_may_be_a_regression(make: Make) -> None:
    a, b = (make(name, [1.0] * 8, **on(torch=version)) for name, version in (("a", "2.13"), ("b", "2.14")))
    assert main([str(a), "--against", str(b)]) == 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / UNITS).unlink(), "{b}/units.csv: cannot be read: No such file or directory"),
        (
            lambda folder: (folder / UNITS).write_text("a,b\n1,2\n"),
            "{b}/units.csv: is not what a bench leaves: 'prompts'",
        ),
        (lambda folder: (folder / FILE).unlink(), "{b}: holds no result.json; compare the folders of two jobs"),
    ],
)
def test_what_cannot_be_read_is_told(
    spoil: Callable[[Path], object], reason: str, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make("a", [1.0] * 8), make("b", [1.0] * 8)
    spoil(b)
    assert main([str(a), "--against", str(b)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {reason.format(b=b)}")


def test_jobs_of_a_world_that_is_what_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two benches of the fake engine, and one that drafts at twice the length: by its units, slower."""
    asked = [*fake_job(prompts(tmp_path / "p.json")), "scale.prompts=12", "workload.new_tokens=48", "K=2"]
    folders = []
    for name, more in (("a", ()), ("again", ()), ("longer", ("K=8",))):
        run_job(planned(*asked, f"checkpoint.dir={tmp_path / name / 'kept'}", *more), tmp_path / name)
        folders.append(str(tmp_path / name))
    with (tmp_path / "a" / UNITS).open() as file:
        assert [row["prompts"] for row in csv.DictReader(file)] != [], "one line a unit"
    assert main([folders[0], "--against", folders[1]]) == 0
    assert main([folders[0], "--against", folders[2], "--measure", "speedup"]) == 1
    assert "B has other settings: controller.K: 2 -> 8" in capsys.readouterr().out
