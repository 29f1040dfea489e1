"""Results -> tables and plots.

    python -m selfspec.report <folder>

takes every ``result.json`` below a folder (of one run, or of a sweep), makes ``summary.csv``,
``accept.tsv``, ``tok_s.png``, ``acceptance.png`` and ``report.txt`` in it, and prints the table.
A speed never stands without its baseline, and a lossy configuration never without being called so.
"""

import argparse
import csv
import io
import json
import math
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfspec.errors import UserError
from selfspec.provenance import write_atomic
from selfspec.tracking import flatten

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERSION = 1
"""Of the form of ``result.json``."""
FILE = "result.json"

SPEEDUP_MEANS = (
    "Speed-up: against plain greedy decoding by the same engine, interleaved with it in the same process; "
    "the median of per-prompt ratios, with a bootstrap 95% interval."
)
_COLUMNS = (
    "configuration",
    "tok/s",
    "plain tok/s",
    "speed-up",
    "accept. rate",
    "tokens per cycle",
    "TTFT ms (plain)",
    "lossless?",
)
_VERDICTS = {"yes": "yes", "ties": "ties", "no": "NO", "lossy": "LOSSY", "reference": "reference", None: "not checked"}
_STYLES = {"FAILED": "bold red", "NO": "bold red", "LOSSY": "bold yellow", "yes": "green"}
_EXACT, _LOSSY, _PLAIN, _SHARE = "#6f9bc8", "#e0a060", "#b02020", "#cfd8e3"
_SHAPE: dict[str, type] = {
    "version": int,
    "plan_id": str,
    "label": str,
    "name": str,
    "settings": dict,
    "measurements": dict,
    "notes": list,
    "provenance": dict,
    "acceptance_by_position": list,
    "status": str,
}


class Result(TypedDict):
    """What a job leaves in its ``result.json``.

    ``settings`` are the plan's, nested; ``measurements`` are flat (``bench/tok_s``, ``fit/agreement``, ...)
    and any may be missing. ``acceptance_by_position`` holds accepted / proposed of the first draft token
    of a cycle, the second, and so on.
    """

    version: int
    plan_id: str
    label: str
    name: str
    settings: dict[str, Any]
    measurements: dict[str, float]
    lossless: Literal["yes", "ties", "no", "lossy", "reference"] | None
    notes: list[str]
    provenance: dict[str, Any]
    acceptance_by_position: list[float]
    status: Literal["finished", "failed"]
    error: str | None


def read(path: Path) -> Result:
    """One result file.

    Raises:
        UserError: it cannot be read, is no result, or is one of a newer selfspec.
    """
    try:
        result = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    version = result.get("version") if isinstance(result, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"{path}: has version {version}, made by a newer selfspec; this one reads up to {VERSION}")
    wrong = [
        key for key, kind in _SHAPE.items() if not isinstance(result, dict) or not isinstance(result.get(key), kind)
    ]
    if wrong:
        raise UserError(f"{path}: is not a result: {wrong[0]} is missing or of the wrong type")
    return cast(Result, {"lossless": None, "error": None, **result})


def find(folder: Path) -> list[Result]:
    """Every result at or below ``folder``, in the order of their paths (job 2 before job 10).

    Raises:
        UserError: no such folder, no result in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(folder.rglob(FILE), key=lambda path: [_natural(part) for part in path.parts])
    if not paths:
        raise UserError(f"{folder}: holds no {FILE}")
    return [read(path) for path in paths]


def distinct(results: Iterable[Result]) -> list[Result]:
    """One result a plan, in the order of first appearance: the latest that finished, else the latest."""
    chosen: dict[str, Result] = {}
    for result in results:
        earlier = chosen.get(result["plan_id"])
        if earlier is None or result["status"] == "finished" or earlier["status"] != "finished":
            chosen[result["plan_id"]] = result
    return list(chosen.values())


def table(results: Iterable[Result], explain: bool = True) -> Table:
    """One row a plan, as given; ``explain``: a caption says what was measured where, and what the columns mean."""
    rows = distinct(results)
    made = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=Text(_caption(rows)) if explain else None,
        caption_justify="left",
    )
    for header in _COLUMNS:
        left = header in (_COLUMNS[0], _COLUMNS[-1])
        made.add_column(header, justify="left" if left else "right", overflow="fold")
    for result, label in zip(rows, _labels(rows), strict=True):
        verdict = _verdict(result)
        made.add_row(
            Text(label),
            _interval(result, "bench/tok_s", ".1f"),
            _number(result, "bench/plain_tok_s", ".1f"),
            _interval(result, "bench/speedup", ".2f", "x"),
            _number(result, "bench/acceptance", ".3f"),
            _number(result, "bench/tokens_per_cycle", ".2f"),
            f"{_number(result, 'bench/ttft_ms', '.1f')} ({_number(result, 'bench/plain_ttft_ms', '.1f')})"
            if _value(result, "bench/ttft_ms") is not None
            else "-",
            Text(verdict, style=_STYLES.get(verdict, "")),
        )
    return made


def text(results: Iterable[Result], explain: bool = True) -> str:
    """The table as plain text (and Markdown), as wide as it needs to be: no cell is cut off or wrapped."""
    made = table(results, explain)
    made.box, made.show_edge, made.pad_edge, made.padding = box.MARKDOWN, True, True, (0, 1)
    buffer = io.StringIO()
    Console(file=buffer, width=10_000, color_system=None, force_terminal=False).print(made)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines()) + "\n"


def show(results: Iterable[Result], explain: bool = True) -> None:
    """Prints the table on stdout: fitted to a terminal, in full anywhere else."""
    console = Console()
    if console.is_terminal:
        made = table(results, explain)
        if console.measure(made, options=console.options.update(width=10_000)).maximum > console.width:
            for column in made.columns[1:]:  # as narrow as their longest word, which is enough for 80 columns
                column.width = max(map(len, [*str(column.header).split(), "[115.4,"]))
        console.print(made, crop=False)
    else:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text(results, explain).encode(encoding, "replace").decode(encoding))


def write(folder: Path, results: Iterable[Result]) -> list[Path]:
    """Makes the report's files in ``folder``; a plot of which nothing was measured is left out.

    Returns:
        The files written.

    Raises:
        StorageError: one cannot be written.
    """
    rows = distinct(results)
    files: dict[str, str | bytes | None] = {
        "summary.csv": _summary(rows),
        "accept.tsv": _accept(rows),
        "report.txt": text(rows),
        "tok_s.png": _speed_plot(rows),
        "acceptance.png": _acceptance_plot(rows),
    }
    written = []
    for name, data in files.items():
        if data is not None:
            write_atomic(folder / name, data)
            written.append(folder / name)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m selfspec.report", description="Make a report of results again.")
    parser.add_argument("folder", type=Path, help="of a run or a sweep")
    folder: Path = parser.parse_args(argv).folder
    try:
        results = find(folder)
        write(folder, results)
        show(results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _value(result: Result, key: str) -> float | None:
    value = result["measurements"].get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _number(result: Result, key: str, form: str) -> str:
    value = _value(result, key)
    return "-" if value is None else format(value, form)


def _interval(result: Result, key: str, form: str, unit: str = "") -> str:
    value, low, high = (_value(result, key + end) for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    if low is None or high is None:
        return f"{value:{form}}{unit}"
    return f"{value:{form}}{unit} [{low:{form}}, {high:{form}}]"


def _lossy(result: Result) -> bool:
    drafts = result["settings"].get("draft", {}).get("name", "none") != "none"
    verified = result["settings"].get("policy", {}).get("verify", True)
    return result["lossless"] in ("lossy", "no") or (drafts and not verified)


def _verdict(result: Result) -> str:
    if result["status"] == "failed":
        return "FAILED"
    if _lossy(result) and result["lossless"] != "no":
        return "LOSSY"
    ties = _value(result, "bench/ties")
    if result["lossless"] == "ties" and ties is not None:
        return f"ties ({ties:g})"
    return _VERDICTS.get(result["lossless"], str(result["lossless"]))


def _labels(rows: Sequence[Result]) -> list[str]:
    """Labels, with what tells apart those that share one."""
    labels = []
    times = Counter(row["label"] for row in rows)
    for row in rows:
        label = row["label"]
        if times[label] > 1:
            own = flatten(row["settings"])
            differing = _varying([other for other in rows if other["label"] == label])
            label += f" ({', '.join(f'{key}={own.get(key)}' for key in differing) or row['plan_id']})"
        labels.append(label)
    return labels


def _varying(rows: Sequence[Result]) -> list[str]:
    """The settings, keys joined with dots, that are not the same in all rows."""
    settings = [flatten(row["settings"]) for row in rows]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    return [key for key in keys if len({json.dumps(one.get(key), default=str) for one in settings}) > 1]


def _caption(rows: Sequence[Result]) -> str:
    lines = []
    measured = [row for row in rows if _value(row, "bench/tok_s") is not None]
    if measured:
        setups = Counter(_setup(row) for row in measured)
        lines += [f"Measured: {setup}." for setup in setups]
        if len(setups) > 1:
            lines += [
                "Rows differ in what they were measured on; compare speed-ups, not tok/s:",
                *(
                    f"  {label}: {_setup(row)}"
                    for row, label in zip(rows, _labels(rows), strict=True)
                    if row in measured
                ),
            ]
        lines += ["tok/s: new tokens after the first / seconds after the first. " + SPEEDUP_MEANS]
    if any(row["lossless"] == "ties" for row in rows):
        lines.append(
            "ties: tokens differ from plain decoding only where two logits are equal within the dtype's rounding."
        )
    if any(_lossy(row) for row in rows):
        lines.append("LOSSY, NO: these tokens are not those of plain decoding; the speed-up is not for the same text.")
    for row, label in zip(rows, _labels(rows), strict=True):
        if row["status"] == "failed":
            lines.append(f"{label}: FAILED: {_line(row['error'] or 'no reason given')}")
        lines += [f"{label}: {_line(note)}" for note in row["notes"]]
    return "\n".join(lines)


def _setup(row: Result) -> str:
    """What a row was measured on, such as ``SmolLM2 on EPYC (2 cores), device=cpu, 16 prompts x 96 tokens``."""
    settings, machine = row["settings"], row["provenance"].get("hardware") or {}
    group: dict[str, dict[str, Any]] = {
        key: settings.get(key) or {} for key in ("model", "workload", "scale", "hardware")
    }
    where = row["provenance"].get("extra") or {
        key: group["hardware"].get(key) for key in ("device", "dtype", "threads")
    }
    parts = [f"{group['model'].get('name', 'model')} on {machine.get('cpu', group['hardware'].get('name', 'unknown'))}"]
    if "physical_cores" in machine:
        parts[0] += f" ({machine['physical_cores']} cores)"
    parts += [f"{key}={value}" for key, value in flatten(where).items() if value is not None]
    work = f"{group['scale'].get('prompts', '?')} prompts x {group['workload'].get('new_tokens', '?')} tokens"
    if group["scale"].get("repeats", 1) > 1:
        work += f" x {group['scale']['repeats']} repeats"
    return ", ".join([*parts, f"{work} ({group['workload'].get('name', 'workload')})"])


def _summary(rows: Sequence[Result]) -> str:
    settings = _varying(rows)
    measurements = sorted({key for row in rows for key in row["measurements"]})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["plan_id", "label", "name", "status", "lossless", *settings, *measurements, "error"])
    for row in rows:
        flat = flatten(row["settings"])
        values = [_value(row, key) for key in measurements]
        lossless = "lossy" if _lossy(row) and row["lossless"] is None else row["lossless"]
        head = [row["plan_id"], row["label"], row["name"], row["status"], lossless]
        writer.writerow([*head, *(_cell(flat.get(key)) for key in settings), *values, _line(row["error"] or "")])
    return buffer.getvalue()


def _accept(rows: Sequence[Result]) -> str:
    lines = ["label\tposition\tacceptance"]
    for row, label in zip(rows, _labels(rows), strict=True):
        for position, rate in enumerate(row["acceptance_by_position"], start=1):
            lines.append(f"{_line(label)}\t{position}\t{rate}")
    return "\n".join(lines) + "\n"


def _speed_plot(rows: Sequence[Result]) -> bytes | None:
    """Horizontal bars of tok/s with their intervals; on each, a line at the plain tok/s it was interleaved with."""
    bars = [(row, label) for row, label in zip(rows, _labels(rows), strict=True) if _value(row, "bench/tok_s")]
    if not bars:
        return None
    figure, axes = _figure([row for row, _ in bars], len(bars))
    for y, (row, _) in enumerate(bars):
        speed, plain = _value(row, "bench/tok_s") or 0.0, _value(row, "bench/plain_tok_s")
        low, high = _value(row, "bench/tok_s_low"), _value(row, "bench/tok_s_high")
        lossy = _lossy(row)
        axes.barh(y, speed, 0.7, color=_LOSSY if lossy else _EXACT, hatch="//" if lossy else "", edgecolor="white")
        if low is not None and high is not None:
            error = [[max(0.0, speed - low)], [max(0.0, high - speed)]]
            axes.errorbar(speed, y, xerr=error, color="black", capsize=3, linewidth=1.2)
        if plain is not None:
            axes.vlines(plain, y - 0.5, y + 0.5, color=_PLAIN, linewidth=2, linestyle=(0, (2, 1)))
        end = max(value for value in (speed, high, plain) if value is not None)
        says = f"{speed:.1f}" + (f"  {_number(row, 'bench/speedup', '.2f')}x" if _value(row, "bench/speedup") else "")
        axes.annotate(says, (end, y), (6, 0), textcoords="offset points", va="center", fontsize=8)
    _labels_on(axes, [(row, label) for row, label in bars])
    axes.set_xlim(0, axes.get_xlim()[1] * 1.12)
    axes.set_xlabel("decode tok/s, 95% interval; and speed-up over plain")
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    legend: list[Artist] = [
        Line2D([], [], color=_PLAIN, linewidth=2, linestyle=(0, (2, 1)), label="plain greedy, interleaved")
    ]
    if any(not _lossy(row) for row, _ in bars):
        legend.append(Patch(facecolor=_EXACT, label="exact policy"))
    if any(_lossy(row) for row, _ in bars):
        legend.append(Patch(facecolor=_LOSSY, hatch="//", edgecolor="white", label="lossy"))
    return _png(figure, axes, legend)


def _acceptance_plot(rows: Sequence[Result]) -> bytes | None:
    """Acceptance rate and share of drafted tokens proposed, grouped by gate and ordered by its threshold."""
    bars = [(row, label) for row, label in zip(rows, _labels(rows), strict=True) if _rate(row) is not None]
    if not bars:
        return None
    gates = list(dict.fromkeys(_gate(row)[0] for row, _ in bars))
    bars.sort(key=lambda bar: (gates.index(_gate(bar[0])[0]), _gate(bar[0])[1]))
    figure, axes = _figure([row for row, _ in bars], len(bars))
    for y, (row, _) in enumerate(bars):
        rate, share = _rate(row) or 0.0, _value(row, "bench/proposed_share")
        lossy = _lossy(row)
        color, hatch = (_LOSSY, "//") if lossy else (_EXACT, "")
        axes.barh(y - 0.19, rate, 0.36, color=color, hatch=hatch, edgecolor="white")
        axes.annotate(f"{rate:.2f}", (rate, y - 0.19), (4, 0), textcoords="offset points", va="center", fontsize=8)
        if share is not None:
            axes.barh(y + 0.19, share, 0.36, color=_SHARE)
            axes.annotate(
                f"{share:.2f}", (share, y + 0.19), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
    for gate in gates:
        at = [y for y, (row, _) in enumerate(bars) if _gate(row)[0] == gate]
        axes.annotate(f"gate: {gate}", (1.06, sum(at) / len(at)), va="center", fontsize=9, annotation_clip=False)
        if at[0] > 0:
            axes.axhline(at[0] - 0.5, color="#999999", linewidth=0.8)
    _labels_on(axes, bars)
    axes.set_xlim(0, 1.05)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_xlabel("share of tokens")
    from matplotlib.patches import Patch

    legend = [Patch(facecolor=_EXACT, label="acceptance: accepted / proposed")]
    if any(_value(row, "bench/proposed_share") is not None for row, _ in bars):
        legend.append(Patch(facecolor=_SHARE, label="proposed / asked of the draft"))
    return _png(figure, axes, legend)


def _rate(row: Result) -> float | None:
    return _value(row, "bench/acceptance")


def _gate(row: Result) -> tuple[str, float]:
    gate = row["settings"].get("gate") or {}
    return str(gate.get("name", "none")), gate.get("threshold") or 0.0


def _figure(rows: Sequence[Result], bars: int) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # without pyplot: no window system, and nothing to close

    figure = Figure(figsize=(8, 1.6 + 0.5 * bars), dpi=120)
    axes = figure.add_subplot()
    setups = dict.fromkeys(_setup(row) for row in rows)
    title = next(iter(setups)) if len(setups) == 1 else "measured on different set-ups: compare speed-ups, not tok/s"
    axes.set_title(textwrap.fill(title, 90), fontsize=9, loc="left")
    return figure, axes


def _labels_on(axes: "Axes", bars: Sequence[tuple[Result, str]]) -> None:
    labels = [textwrap.fill(label + (" (lossy)" if _lossy(row) else ""), 36) for row, label in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=9)
    axes.set_ylim(len(bars) - 0.5, -0.5)  # the first row on top, as in the table
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _png(figure: "Figure", axes: "Axes", legend: "Sequence[Artist]") -> bytes:
    axes.legend(
        handles=legend,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.45 / axes.get_window_extent().height * figure.dpi),
        ncols=len(legend),
        fontsize=8,
        frameon=False,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, list) else value


def _line(words: str) -> str:
    return " ".join(words.split())


def _natural(words: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", words)]


if __name__ == "__main__":
    sys.exit(main())
