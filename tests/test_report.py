import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfspec.errors import printable
from selfspec.report import plots
from selfspec.report import tables as report
from selfspec.report.__main__ import main as command_line
from selfspec.report.results import FILE, Result, distinct, find, labels

BENCH = {
    "bench/tok_s": 120.0,
    "bench/tok_s_low": 110.0,
    "bench/tok_s_high": 131.0,
    "bench/plain_tok_s": 98.0,
    "bench/speedup": 1.22,
    "bench/speedup_low": 1.15,
    "bench/speedup_high": 1.31,
    "bench/speedup_total": 1.19,
    "bench/speedup_without_loops": 1.084,
    "bench/looping": 3,
    "bench/prompts": 12,
    "bench/acceptance": 0.417,
    "bench/proposed_share": 0.61,
    "bench/acceptance_length": 2.05,
    "bench/ttft_ms": 31.5,
    "bench/plain_ttft_ms": 30.9,
}


def result(plan_id: str = "p1", label: str = "lsq12 varH=4 K=4", **changes: Any) -> Result:
    """A finished, exact job; ``draft``, ``gate``, ``policy`` and ``seed`` change its settings."""
    settings = {
        "seed": 0,
        "stages": ["fit", "bench"],
        "model": {"name": "smollm2_135m"},
        "draft": {"name": "lsq", "exit_layer": 12},
        "gate": {"name": "varH", "threshold": 4.0},
        "policy": {"name": "longest_prefix", "verify": True},
        "hardware": {"name": "auto", "device": "auto", "dtype": "auto"},
        "workload": {"name": "sharegpt", "new_tokens": 96},
        "scale": {"prompts": 12, "repeats": 2},
    }
    settings |= {key: changes.pop(key) for key in list(changes) if key in settings}
    made: Result = {
        "version": 1,
        "plan_id": plan_id,
        "label": label,
        "name": "main",
        "settings": settings,
        "measurements": dict(BENCH),
        "lossless": "yes",
        "notes": [],
        "provenance": {
            "hardware": {"cpu": "Test CPU", "physical_cores": 2},
            "extra": {"device": "cpu", "dtype": "bf16"},
        },
        "acceptance_by_position": [0.5, 0.25],
        "status": "finished",
        "error": None,
    }
    return made | changes  # type: ignore[return-value]


PLAIN = result(
    "p0", "none", draft={"name": "none"}, gate={"name": "none", "threshold": None}, lossless="reference",
    measurements={"bench/tok_s": 98.0, "bench/plain_tok_s": 98.0, "bench/ttft_ms": 30.9}, acceptance_by_position=[],
)  # fmt: skip
SKIPPED = result(
    "p2", "lsq12 unverified", policy={"name": "longest_prefix", "verify": False}, lossless="lossy",
    measurements={"bench/tok_s": 200.0, "bench/plain_tok_s": 99.0, "bench/speedup": 2.02}, acceptance_by_position=[],
)  # fmt: skip
FAILED = result(
    "p3", "lsq28 K=4", status="failed", error="StageError: out of\nmemory [cuda]", measurements={}, lossless=None,
    acceptance_by_position=[],
)  # fmt: skip
MANY = [PLAIN, result(), SKIPPED, FAILED]


def save(folder: Path, *results: Result) -> None:
    for number, one in enumerate(results):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / FILE).write_text(json.dumps(one))


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_a_row_has_rates_baseline_intervals_and_verdict() -> None:
    header, _, *rows = cells(report.text(MANY))
    assert header[0] == "configuration"
    assert rows == [
        ["none", "98.0", "98.0", "-", "-", "-", "-", "30.9 (-)", "reference"],
        [
            "lsq12 varH=4 K=4",
            "120.0 [110.0, 131.0]",
            "98.0",
            "1.22x [1.15, 1.31]",
            "1.19x; 1.08x (3/12 loop)",
            "0.417",
            "2.05",
            "31.5 (30.9)",
            "yes",
        ],
        ["lsq12 unverified", "200.0", "99.0", "2.02x", "-", "-", "-", "-", "LOSSY"],
        ["lsq28 K=4", "-", "-", "-", "-", "-", "-", "-", "FAILED"],
    ]


def test_the_caption_says_what_was_measured_and_what_it_means() -> None:
    text = report.text([*MANY, result("p5", "tied", lossless="ties", notes=["the machine was shared"])])
    said = " ".join(text.split())
    assert "smollm2_135m on Test CPU (2 cores), device=cpu, dtype=bf16, 12 prompts x 96 tokens x 2 repeats" in said
    assert "against plain greedy decoding by the same engine, interleaved with it in the same process" in said
    assert "the median of per-prompt ratios, with a bootstrap 95% interval" in said
    assert "By total time: all tokens over all seconds" in said
    assert "By total time" not in report.text([PLAIN, SKIPPED]), "of results that do not know"
    assert "lsq28 K=4: FAILED: StageError: out of memory [cuda]" in said
    assert "tied: the machine was shared" in said
    assert "LOSSY, NO:" in said
    assert "ties:" in said
    assert "LOSSY, NO:" not in report.text([result()])


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"lossless": "no"}, "NO"),
        ({"lossless": "ties", "measurements": BENCH | {"bench/ties": 3}}, "ties (3)"),
        ({"lossless": "ties"}, "ties"),
        ({"lossless": None}, "not checked"),
        ({"lossless": None, "policy": {"verify": False}}, "LOSSY"),
        ({"lossless": "yes", "policy": {"verify": False}}, "LOSSY"),
    ],
)
def test_verdicts(changes: dict[str, Any], verdict: str) -> None:
    assert cells(report.text([result(**changes)]))[-1][-1] == verdict


def test_rows_measured_on_different_hardware_are_told_apart() -> None:
    other = result("p9", "elsewhere", provenance={"hardware": {"cpu": "Other CPU"}, "extra": {"device": "cuda"}})
    said = report.text([result(), other])
    assert "Rows differ in what they were measured on" in said
    assert "elsewhere: smollm2_135m on Other CPU, device=cuda" in said
    assert "Rows differ" not in report.text([result(), SKIPPED])


def test_a_plan_has_one_row_its_latest_finished_result() -> None:
    failed, old, new = result(status="failed", error="x"), result(notes=["old"]), result(notes=["new"])
    assert distinct([failed, PLAIN, old, new, failed]) == [new, PLAIN]
    assert distinct([old, failed]) == [old]


def test_a_missing_or_odd_measurement_is_a_dash() -> None:
    odd = result(measurements={"bench/tok_s": math.nan, "bench/speedup": math.inf, "fit/agreement": 0.27})
    assert cells(report.text([odd]))[-1][1:8] == ["-"] * 7


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bench/looping": 0}, "1.19x; 1.08x (0/12 loop)"),
        ({"bench/looping": 12, "bench/speedup_without_loops": math.nan}, "1.19x; - (12/12 loop)"),
        ({"bench/speedup_total": math.nan}, "-"),
        ({"bench/looping": math.nan}, "-"),
    ],
)
def test_loops_are_told_beside_the_speed_up(changes: dict[str, float], said: str) -> None:
    row = result(measurements=BENCH | changes)
    assert cells(report.text([row]))[-1][4] == said


def test_labels_and_errors_are_not_markup() -> None:
    assert "[bold]x[/bold]" in report.text([result(label="[bold]x[/bold]")])


@pytest.mark.slow
def test_writing_a_report_again_changes_no_file(tmp_path: Path) -> None:
    save(tmp_path, *MANY)
    written = report.write(tmp_path, MANY)
    assert [path.name for path in written] == ["summary.csv", "accept.tsv", "report.txt", "tok_s.png", "acceptance.png"]
    assert (tmp_path / "report.txt").read_text() == report.text(MANY)
    for plot in written[3:]:
        data = plot.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(path.name for path in written)

    first = {path: path.read_bytes() for path in written}
    report.write(tmp_path, MANY)
    assert {path: path.read_bytes() for path in written} == first


def test_the_summary_holds_what_varies_and_another_file_acceptance_by_position(
    tmp_path: Path,
) -> None:
    report.write(tmp_path, MANY)
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["plan_id"] for row in rows] == ["p0", "p1", "p2", "p3"]
    assert rows[1] | {"gate.threshold": "4.0", "draft.name": "lsq", "bench/tok_s": "120.0"} == rows[1]
    assert rows[0]["bench/acceptance"] == ""
    assert rows[2]["lossless"] == "lossy"
    assert rows[3]["error"] == "StageError: out of memory [cuda]"
    assert not {"seed", "model.name", "stages"} & set(rows[0])
    assert set(BENCH) <= set(rows[0])
    assert (tmp_path / "accept.tsv").read_text().splitlines() == [
        "label\tposition\tacceptance",
        "lsq12 varH=4 K=4\t1\t0.5",
        "lsq12 varH=4 K=4\t2\t0.25",
    ]


def test_what_was_not_measured_is_not_plotted(tmp_path: Path) -> None:
    assert [path.suffix for path in report.write(tmp_path, [FAILED])] == [".csv", ".tsv", ".txt"]


def test_results_are_found_in_the_order_of_jobs(tmp_path: Path) -> None:
    save(tmp_path, *[result(f"p{number}") for number in range(11)])
    assert [one["plan_id"] for one in find(tmp_path)] == [f"p{number}" for number in range(11)]


def test_of_many_rows_the_fastest_are_plotted(monkeypatch: pytest.MonkeyPatch) -> None:
    ups = [1.1, 1.5, 1.2, 1.4, 1.3]
    rows = [result(f"p{at}", f"at {up}", measurements=BENCH | {"bench/speedup": up}) for at, up in enumerate(ups)]
    drawn, titles = list[list[str]](), list[str]()
    label, figure = plots._labels_on, plots._figure

    def figured(bars: list[plots.Bar], of: int) -> Any:
        made = figure(bars, of)
        titles.append(made[1].get_title(loc="left"))
        return made

    def labelled(axes: Any, bars: list[plots.Bar]) -> None:
        drawn.append([at for _, at in bars])
        label(axes, bars)

    monkeypatch.setattr(plots, "_figure", figured)
    monkeypatch.setattr(plots, "_labels_on", labelled)
    for most, shown in ((5, [f"at {up}" for up in ups]), (3, ["at 1.5", "at 1.4", "at 1.3"])):
        monkeypatch.setattr(plots, "_MOST", most)
        assert plots.speed(rows) and plots.acceptance([*rows, PLAIN])
        assert drawn[-2:] == [shown, shown], "in the order of the table"
    assert "3 of 5 rows with the highest speed-up" in titles[2].replace("\n", " ") and "highest" not in titles[0]


def test_rows_that_share_a_label_are_told_apart_by_what_differs_among_them() -> None:
    rows = [result(f"p{seed}", "one", seed=seed) for seed in range(3)]
    rows += [result(f"q{new}", "other", workload={"name": "sharegpt", "new_tokens": new}) for new in (8, 16)]
    assert labels([*rows, PLAIN]) == [
        *(f"one (seed={seed})" for seed in range(3)),
        *(f"other (workload.new_tokens={new})" for new in (8, 16)),
        "none",
    ]
    assert [row[0] for row in cells(report.text(rows))[2:]] == labels(rows), "in the table, too"


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    save(tmp_path, *MANY)
    command = [sys.executable, "-W", "error", "-m", "selfspec.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == report.text(MANY)
    assert {"summary.csv", "tok_s.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "holds no result.json"),
        ("{torn", "is not JSON"),
        ("[]", "is not a result: version is missing"),
        (json.dumps(result() | {"measurements": 3}), "is not a result: measurements is missing or of the wrong type"),
        (json.dumps(result(version=2)), "has version 2, made by a newer selfspec; this one reads up to 1"),
        (b"\xff\xfe", "is not JSON"),
        ("[" * 100_000, "is not JSON: nested too deep"),
        (json.dumps(result() | {"notes": [[[[[[[[[[[[[[]]]]]]]]]]]]]]}), "is not JSON: nested too deep"),
        (json.dumps(result() | {"notes": [3]}), "notes is missing or of the wrong type"),
        (json.dumps(result() | {"lossless": []}), "lossless is missing or of the wrong type"),
        (json.dumps(result() | {"error": {}}), "error is missing or of the wrong type"),
        (json.dumps(result() | {"acceptance_by_position": ["a"]}), "acceptance_by_position is missing"),
        (json.dumps(result(policy=[])), "settings.policy is missing or of the wrong type"),
        (json.dumps(result(policy={"name": []})), "settings.policy.name is missing or of the wrong type"),
        (json.dumps(result(scale={"repeats": "2"})), "settings.scale.repeats is missing or of the wrong type"),
        (json.dumps(result() | {"provenance": {"hardware": 3}}), "provenance.hardware is missing"),
        (json.dumps(result() | {"version": None}), "is not a result: version is missing"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(
    content: str | bytes | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert command_line([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {tmp_path}") and err.count("\n") == 1
    assert says in err


def test_what_a_result_says_is_no_command_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2028"
    odd: dict[str, Any] = {**result(label=f"a{evil}"), "notes": [evil], "error": evil, "status": "failed"}
    odd |= {"lossless": evil, "measurements": BENCH | {f"bench/against/{evil}/ratio": 1.0, "bench/tok_s": 10**400}}
    odd["settings"]["model"]["name"] = odd["provenance"]["hardware"]["cpu"] = evil
    (tmp_path / FILE).write_text(json.dumps(odd))
    assert command_line([str(tmp_path)]) == 0
    said = capsys.readouterr().out + "".join(path.read_text() for path in tmp_path.glob("*.[ct]*"))
    assert "a?" in said
    assert said == printable(said)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr() == ("", f"error: {tmp_path}/nowhere: no such folder\n")
