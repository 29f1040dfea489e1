"""Results -> plots: speeds beside their baselines, and how much of the drafts was accepted."""

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from selfspec.report.parts import MACRO, names
from selfspec.report.results import Result, curve, labels, lossy, number, setup, value

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Bar = tuple[Result, str]
"""A row and its label."""
_MOST = 100
"""Bars in a plot: of more, the fastest. Nobody reads a thousand, and a picture has at most 65,536 rows of pixels."""
_EXACT, _LOSSY, _PLAIN, _SHARE = "#6f9bc8", "#e0a060", "#b02020", "#cfd8e3"


def speed(rows: Sequence[Result]) -> bytes | None:
    """Horizontal bars of tok/s with their intervals; on each, a line at the plain tok/s it was interleaved with."""
    bars = [(row, label) for row, label in zip(rows, labels(rows), strict=True) if value(row, "bench/tok_s")]
    if not bars:
        return None
    of, bars = len(bars), _fastest(bars)
    figure, axes = _figure(bars, of)
    for y, (row, _) in enumerate(bars):
        tok_s, plain = value(row, "bench/tok_s") or 0.0, value(row, "bench/plain_tok_s")
        low, high = value(row, "bench/tok_s_low"), value(row, "bench/tok_s_high")
        color, hatch = (_LOSSY, "//") if lossy(row) else (_EXACT, "")
        axes.barh(y, tok_s, 0.7, color=color, hatch=hatch, edgecolor="white")
        if low is not None and high is not None:
            error = [[max(0.0, tok_s - low)], [max(0.0, high - tok_s)]]
            axes.errorbar(tok_s, y, xerr=error, color="black", capsize=3, linewidth=1.2)
        if plain is not None:
            axes.vlines(plain, y - 0.5, y + 0.5, color=_PLAIN, linewidth=2, linestyle=(0, (2, 1)))
        end = max(at for at in (tok_s, high, plain) if at is not None)
        says = f"{tok_s:.1f}" + (f"  {number(row, 'bench/speedup', '.2f')}x" if value(row, "bench/speedup") else "")
        _say(axes, says, end, y)
    _labels_on(axes, bars)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.12)
    axes.set_xlabel("decode tok/s, 95% interval; and speed-up over plain")
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    legend: list[Artist] = [
        Line2D([], [], color=_PLAIN, linewidth=2, linestyle=(0, (2, 1)), label="plain greedy, interleaved")
    ]
    if any(not lossy(row) for row, _ in bars):
        legend.append(Patch(facecolor=_EXACT, label="exact policy"))
    if any(lossy(row) for row, _ in bars):
        legend.append(Patch(facecolor=_LOSSY, hatch="//", edgecolor="white", label="lossy"))
    return _png(figure, axes, legend)


def memory(samples: Sequence[Sequence[float]], names: Sequence[str]) -> bytes:
    """Lines of memory over time: of samples of milliseconds and, by name, MiB; what is always 0 is left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(names, start=1):
        if any(sample[i] for sample in samples):
            axes.plot([sample[0] for sample in samples], [sample[i] for sample in samples], label=name)
    axes.set_xlabel("ms")
    axes.set_ylabel("MiB")
    return _png(figure, axes, axes.get_legend_handles_labels()[0])


def acceptance(rows: Sequence[Result]) -> bytes | None:
    """Acceptance rate and share of drafted tokens proposed, grouped by gate and ordered by its threshold."""
    bars = [(row, label) for row, label in zip(rows, labels(rows), strict=True) if _rate(row) is not None]
    if not bars:
        return None
    of, bars = len(bars), _fastest(bars)
    gates = list(dict.fromkeys(_gate(row)[0] for row, _ in bars))
    bars.sort(key=lambda bar: (gates.index(_gate(bar[0])[0]), _gate(bar[0])[1]))
    figure, axes = _figure(bars, of)
    for y, (row, _) in enumerate(bars):
        rate, share = _rate(row) or 0.0, value(row, "bench/proposed_share")
        color, hatch = (_LOSSY, "//") if lossy(row) else (_EXACT, "")
        axes.barh(y - 0.19, rate, 0.36, color=color, hatch=hatch, edgecolor="white")
        _say(axes, f"{rate:.2f}", rate, y - 0.19)
        if share is not None:
            axes.barh(y + 0.19, share, 0.36, color=_SHARE)
            _say(axes, f"{share:.2f}", share, y + 0.19)
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
    if any(value(row, "bench/proposed_share") is not None for row, _ in bars):
        legend.append(Patch(facecolor=_SHARE, label="proposed / asked of the draft"))
    return _png(figure, axes, legend)


def parts(rows: Sequence[Result]) -> bytes | None:
    """A heat map: the speed-up of every configuration on every set of prompts, and the mean of all."""
    columns = names(rows)
    bars = [(row, label) for row, label in zip(rows, labels(rows), strict=True) if value(row, "bench/speedup_macro")]
    if not bars or not columns:
        return None
    from matplotlib.colors import TwoSlopeNorm

    of, bars = len(bars), _fastest(bars)
    keys = [*(f"bench/part/{name}/speedup" for name in columns), "bench/speedup_macro"]
    cells = [[value(row, key) for key in keys] for row, _ in bars]
    known = [cell for line in cells for cell in line if cell is not None]
    figure, axes = _figure(bars, of)
    figure.set_size_inches(4 + 0.62 * len(keys), figure.get_size_inches()[1])
    # Centred on 1: what is slower than plain decoding has another colour, whatever the others come to.
    norm = TwoSlopeNorm(1.0, min(0.5, *known), max(2.0, *known))
    shown = [[float("nan") if cell is None else cell for cell in line] for line in cells]
    axes.imshow(shown, cmap="RdBu", norm=norm, aspect="auto")
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            says = "-" if cell is None else f"{cell:.2f}"
            dark = cell is not None and abs(float(norm(cell)) - 0.5) > 0.35
            axes.text(x, y, says, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    _labels_on(axes, bars)
    axes.xaxis.grid(False)
    axes.set_xticks(range(len(keys)), [*columns, MACRO], rotation=45, ha="right", fontsize=9)
    axes.set_xlabel("speed-up over plain decoding, the median of each set of prompts")
    return png(figure)


def exits(rows: Sequence[Result]) -> bytes | None:
    """Over the exit layer, the speed-up that the fit stage foretold, a line a row; and what was measured, as points."""
    curves = [(row, label) for row, label in zip(rows, labels(rows), strict=True) if curve(row)]
    if not curves:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=120)
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(setup(curves[0][0]), 90), fontsize=9, loc="left")
    for row, label in curves:
        layers, speedups = zip(*((layer, exit["speedup"]) for layer, exit in curve(row).items()), strict=True)
        (line,) = axes.plot(layers, speedups, marker="o", markersize=3, linewidth=1.2, label=f"{label}: foretold")
        measured, low, high = (value(row, f"bench/speedup{end}") for end in ("", "_low", "_high"))
        at = value(row, "fit/exit_layer")
        if at is not None and measured is not None:
            error = None if low is None or high is None else [[measured - low], [high - measured]]
            axes.errorbar([at], [measured], yerr=error, fmt="s", color=line.get_color(), capsize=3, label="measured")
    axes.axhline(1, color=_PLAIN, linewidth=1.2, linestyle=(0, (2, 1)), label="plain greedy")
    axes.set_xlabel("exit layer")
    axes.set_ylabel("speed-up over plain")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, frameon=False)
    return png(figure)


def _say(axes: "Axes", words: str, end: float, y: float) -> None:
    """Beside the end of a bar."""
    axes.annotate(words, (end, y), (5, 0), textcoords="offset points", va="center", fontsize=8)


def _rate(row: Result) -> float | None:
    return value(row, "bench/acceptance")


def _gate(row: Result) -> tuple[str, float]:
    gate = row["settings"].get("gate") or {}
    return str(gate.get("name", "none")), gate.get("threshold") or 0.0


def _fastest(bars: list[Bar]) -> list[Bar]:
    """Those there is room for, in their order."""
    speedups = sorted((-(value(row, "bench/speedup") or 0.0), at) for at, (row, _) in enumerate(bars))
    return [bars[at] for at in sorted(at for _, at in speedups[:_MOST])]


def _figure(bars: Sequence[Bar], of: int) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # without pyplot: no window system, and nothing to close

    figure = Figure(figsize=(8, 1.6 + 0.5 * len(bars)), dpi=120)
    axes = figure.add_subplot()
    setups = dict.fromkeys(setup(row) for row, _ in bars)
    title = next(iter(setups)) if len(setups) == 1 else "measured on different set-ups: compare speed-ups, not tok/s"
    if len(bars) < of:
        title += f"; the {len(bars)} of {of} rows with the highest speed-up (summary.csv has all)"
    axes.set_title(textwrap.fill(title, 90), fontsize=9, loc="left")
    return figure, axes


def _labels_on(axes: "Axes", bars: Sequence[Bar]) -> None:
    wrapped = [textwrap.fill(label + (" (lossy)" if lossy(row) else ""), 36) for row, label in bars]
    axes.set_yticks(range(len(bars)), wrapped, fontsize=9)
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
    return png(figure)


def png(figure: "Figure") -> bytes:
    """The same bytes for the same picture, whatever made it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()
