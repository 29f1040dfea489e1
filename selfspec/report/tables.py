"""Results -> tables: ``summary.csv``, ``accept.tsv`` and ``report.txt``, with the plots beside them.

A speed never stands without its baseline, and a lossy configuration never without being called so.
"""

import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfspec.config import flatten
from selfspec.errors import one_line
from selfspec.files import csv_text, write_atomic
from selfspec.report import parts, plots, quality
from selfspec.report.results import (
    Result,
    curve,
    distinct,
    interval,
    labels,
    lossy,
    number,
    setup,
    value,
    varying,
    verdict,
)
from selfspec.report.why import why

SPEEDUP_MEANS = (
    "Speed-up: against plain greedy decoding by the same engine, interleaved with it in the same process; "
    "the median of per-prompt ratios, with a bootstrap 95% interval."
)
LOOPS_MEAN = (
    "By total time: all tokens over all seconds, over plain decoding's. Without loops: the median again, of the "
    "prompts whose answers do not end in repeating themselves, and how many do, of how many."
)
_COLUMNS = (
    "configuration",
    "tok/s",
    "plain tok/s",
    "speed-up",
    "by total time; without loops",
    "accept. rate",
    "accept. length",
    "TTFT ms (plain)",
    "lossless?",
)
_STYLES = {"FAILED": "bold red", "NO": "bold red", "LOSSY": "bold yellow", "yes": "green"}


def table(results: Iterable[Result], explain: bool = True) -> Table:
    """One row a plan, as given; ``explain``: a caption says what was measured where, and what the columns mean."""
    rows = distinct(results)
    made = _empty(_caption(rows) if explain else None)
    for header in _COLUMNS:
        left = header in (_COLUMNS[0], _COLUMNS[-1])
        made.add_column(header, justify="left" if left else "right", overflow="fold")
    for result, label in zip(rows, labels(rows), strict=True):
        word = verdict(result)
        made.add_row(
            Text(label),
            interval(result, "bench/tok_s", ".1f"),
            number(result, "bench/plain_tok_s", ".1f"),
            interval(result, "bench/speedup", ".2f", "x"),
            repetition(result),
            number(result, "bench/acceptance", ".3f"),
            number(result, "bench/acceptance_length", ".2f"),
            f"{number(result, 'bench/ttft_ms', '.1f')} ({number(result, 'bench/plain_ttft_ms', '.1f')})"
            if value(result, "bench/ttft_ms") is not None
            else "-",
            Text(word, style=_STYLES.get(word, "")),
        )
    return made


def further(results: Iterable[Result], explain: bool = True) -> list[Table]:
    """The tables of sets of prompts and of what the quality stage measured, where there is something."""
    made = []
    rows = distinct(results)
    for section in [*parts.sections(rows), *quality.sections(rows)]:
        one = _empty(section.caption if explain else None)
        for header in section.columns:
            one.add_column(header, overflow="fold")
        for cells in section.cells:
            one.add_row(*map(Text, cells))
        made.append(one)
    return made


def text(results: Iterable[Result], explain: bool = True) -> str:
    """The tables as plain text (and Markdown), as wide as they need to be: no cell is cut off or wrapped."""
    rows, buffer = distinct(results), io.StringIO()
    console = Console(file=buffer, width=10_000, color_system=None, force_terminal=False)
    for made in [table(rows, explain), *further(rows, explain)]:
        made.box, made.show_edge, made.pad_edge, made.padding = box.MARKDOWN, True, True, (0, 1)
        console.print(made)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines()) + "\n"


def show(results: Iterable[Result], explain: bool = True) -> None:
    """Prints the tables on stdout: fitted to a terminal, in full anywhere else."""
    console, results = Console(), distinct(results)
    if console.is_terminal:
        made = table(results, explain)
        if console.measure(made, options=console.options.update(width=10_000)).maximum > console.width:
            for column in made.columns[1:]:  # as narrow as their longest word, which is enough for 80 columns
                words = (word for cell in (column.header, *column.cells) for word in str(cell).split())
                column.width = max(map(len, words))
        console.print(made, crop=False)
        for one in further(results, explain):
            console.print()
            console.print(one, crop=False)
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
        "tok_s.png": plots.speed(rows),
        "acceptance.png": plots.acceptance(rows),
        "parts.png": plots.parts(rows),
        "exits.png": plots.exits(rows),
    }
    written = []
    for name, data in files.items():
        if data is not None:
            write_atomic(folder / name, data)
            written.append(folder / name)
    return written


def _empty(caption: str | None) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=None if caption is None else Text(caption),
        caption_justify="left",
    )


def _caption(rows: Sequence[Result]) -> str:
    lines = []
    measured = [row for row in rows if value(row, "bench/tok_s") is not None]
    if measured:
        setups = Counter(setup(row) for row in measured)
        lines += [f"Measured: {one}." for one in setups]
        if len(setups) > 1:
            lines += [
                "Rows differ in what they were measured on; compare speed-ups, not tok/s:",
                *(f"  {label}: {setup(row)}" for row, label in zip(rows, labels(rows), strict=True) if row in measured),
            ]
        lines += ["tok/s: new tokens after the first / seconds after the first. " + SPEEDUP_MEANS]
        if any(value(row, "bench/looping") is not None for row in measured):
            lines.append(LOOPS_MEAN)
    if any(row["lossless"] == "ties" for row in rows):
        lines.append(
            "ties: tokens differ from plain decoding only where two logits are equal within the dtype's rounding."
        )
    if any(row["lossless"] == "sampled" for row in rows):
        lines.append("sampled: tokens were drawn from plain decoding's distribution, and are not the ones it drew.")
    if any(lossy(row) for row in rows):
        lines.append("LOSSY, NO: these tokens are not those of plain decoding; the speed-up is not for the same text.")
    for row, label in zip(rows, labels(rows), strict=True):
        lines += [f"{label}: {words}" for words in (*chosen(row), why(row), *against(row)) if words]
        if stalled := value(row, "bench/stalled"):
            lines.append(
                f"{label}: the machine stalled in {stalled:.0f} of the answers (passes of ten times the usual length): "
                "measure again before you believe its time"
            )
        if row["status"] == "failed":
            lines.append(f"{label}: FAILED: {one_line(row['error'] or 'no reason given')}")
        lines += [f"{label}: {one_line(note)}" for note in row["notes"]]
    return "\n".join(lines)


def repetition(row: Result) -> str:
    """The speed-up by total time and without loops: ``1.87x; 1.55x [1.40, 1.81] (8/24 loop)``; a dash without one."""
    looping, prompts = (value(row, f"bench/{key}") for key in ("looping", "prompts"))
    if looping is None or prompts is None or value(row, "bench/speedup_total") is None:
        return "-"
    total, without = number(row, "bench/speedup_total", ".2f"), interval(row, "bench/speedup_without_loops", ".2f", "x")
    return f"{total}x; {without} ({looping:.0f}/{prompts:.0f} loop)"


def chosen(row: Result) -> list[str]:
    """Which exit layer the fit stage chose and why, what it foretold beside what came, and the others."""
    layer, told = value(row, "fit/exit_layer"), curve(row)
    if layer is None:
        return []
    others = ", ".join(f"{at} {exit['speedup']:.2f}x" for at, exit in told.items() if at != layer)
    best, plain, measured = told[int(layer)], number(row, "fit/plain_ms", ".1f"), number(row, "bench/speedup", ".2f")
    return [
        f"exit layer {layer:.0f} and K={best['K']:.0f} promised most: {best['speedup']:.2f}x (measured: {measured}x), "
        f"a first token accepted at {best['acceptance']:.2f}, a cycle of one at {best['cycle_ms']:.1f} ms for plain "
        f"decoding's {plain}; other layers at their best K: {others}"
    ]


def against(row: Result) -> list[str]:
    """What stood beside a configuration in the same process, and how they compare."""
    names = [
        key.split("/")[2] for key in row["measurements"] if key.startswith("bench/against/") and key.endswith("/ratio")
    ]

    def beside(name: str, words: str) -> str:
        ratio, rate = (
            interval(row, f"bench/against/{name}/{key}", form) for key, form in (("ratio", ".2f"), ("tok_s", ".1f"))
        )
        without = interval(row, f"bench/against/{name}/ratio_without_loops", ".2f")
        return f"{ratio} times {words} ({rate} tok/s)" + (f"; {without} without loops" if without != "-" else "")

    said = [beside(name, name) for name in names if not name.startswith("K=")]
    if fixed := [name for name in names if name.startswith("K=")]:
        best = max(fixed, key=lambda name: value(row, f"bench/against/{name}/tok_s") or 0.0)
        said.append(beside(best, f"the best fixed K of {', '.join(name[2:] for name in fixed)}: {best}"))
    return said


def _summary(rows: Sequence[Result]) -> str:
    settings = varying(rows)
    measurements = sorted({key for row in rows for key in row["measurements"]})
    lines: list[list[object]] = []
    for row in rows:
        flat = flatten(row["settings"])
        values = [value(row, key) for key in measurements]
        lossless = "lossy" if lossy(row) and row["lossless"] is None else row["lossless"]
        head = [row["plan_id"], row["label"], row["name"], row["status"], lossless]
        lines.append([*head, *(_cell(flat.get(key)) for key in settings), *values, one_line(row["error"] or "")])
    return csv_text([["plan_id", "label", "name", "status", "lossless", *settings, *measurements, "error"], *lines])


def _accept(rows: Sequence[Result]) -> str:
    lines = ["label\tposition\tacceptance"]
    for row, label in zip(rows, labels(rows), strict=True):
        for position, rate in enumerate(row["acceptance_by_position"], start=1):
            lines.append(f"{one_line(label)}\t{position}\t{rate}")
    return "\n".join(lines) + "\n"


def _cell(setting: object) -> object:
    return json.dumps(setting) if isinstance(setting, list) else setting
