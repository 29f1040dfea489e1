"""A soak over time: latencies, throughput, acceptance and the server's memory, interval by interval."""

from collections.abc import Sequence

from selfspec.report.plots import png
from selfspec.soak.judge import Interval, per_interval

_PANELS = (
    ("TTFT, ms", ("ttft_p50_ms", "ttft_p99_ms")),
    ("inter-token, ms", ("inter_token_p50_ms", "inter_token_p99_ms")),
    ("total, ms", ("total_p50_ms", "total_p99_ms")),
    ("tok/s", ("tok_s",)),
    ("acceptance", ("acceptance",)),
    ("memory, MiB", ("memory_mb",)),
    ("errors", ("errors",)),
)


def draw(intervals: Sequence[Interval], title: str) -> bytes:
    """A PNG with a panel for each of what was measured; a dashed line where the server was started again."""
    from matplotlib.figure import Figure  # without pyplot: no window system, and nothing to close

    rows = [per_interval(interval) for interval in intervals]
    panels = [(words, keys) for words, keys in _PANELS if any(key in row for row in rows for key in keys)]
    ends = [sum(interval["seconds"] for interval in intervals[: i + 1]) for i in range(len(intervals))]
    restarts = [ends[i - 1] for i in range(1, len(rows)) if intervals[i]["life"] != intervals[i - 1]["life"]]
    figure = Figure(figsize=(8, 1.2 + 1.3 * len(panels)), dpi=120, layout="constrained")
    every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (words, keys) in zip(every, panels, strict=True):
        for key in keys:
            there = [(end, row[key]) for end, row in zip(ends, rows, strict=True) if key in row]
            label = next((name for name in ("p50", "p99") if name in key), None)
            axes.plot(*zip(*there, strict=True), marker="o", markersize=3, linewidth=1.2, label=label)
        for at in restarts:
            axes.axvline(at, color="#999999", linestyle="--", linewidth=0.8)
        axes.set_ylabel(words, fontsize=8)
        axes.set_ylim(0, 1.15 * max((row[key] for row in rows for key in keys if key in row), default=0) or 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.grid(True, color="#dddddd", linewidth=0.6)
    if len(panels[0][1]) > 1:
        every[0].legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    every[0].set_title(title, fontsize=9, loc="left")
    every[-1].set_xlim(left=0)
    every[-1].set_xlabel("seconds under load")
    return png(figure)
