"""Results -> the report's table of the sets of prompts that a job was benched on, one by one."""

import re
from collections.abc import Iterator, Sequence

from selfspec.report.quality import Section
from selfspec.report.results import Result, interval, labels, number, value

MACRO = "mean of all"
_COLUMNS = ("prompts", "loop", "tok/s", "plain tok/s", "speed-up", "without loops", "accept. rate", "accept. length")
_MEANS = (
    "Sets of prompts: speed-up and interval as above, over the prompts of each; 'mean of all' is the mean of their "
    "medians, each set counting for the same, by a bootstrap within the sets."
)


def names(rows: Sequence[Result]) -> list[str]:
    """Of all sets that a row was benched on, in the order of the first row that has them."""
    found = (re.fullmatch("bench/part/(.+)/prompts", key) for row in rows for key in row["measurements"])
    return list(dict.fromkeys(match[1] for match in found if match))


def sections(rows: Sequence[Result]) -> list[Section]:
    """A line a configuration and set; none where a workload is one set."""
    cells = [line for row, label in zip(rows, labels(rows), strict=True) for line in _lines(row, label)]
    return [Section(("configuration", "set", *_COLUMNS), cells, _MEANS)] if cells else []


def _lines(row: Result, label: str) -> Iterator[tuple[str, ...]]:
    for name in (own := names([row])):
        key = f"bench/part/{name}"
        yield (
            label,
            name,
            number(row, f"{key}/prompts", ".0f"),
            number(row, f"{key}/looping", ".0f"),
            number(row, f"{key}/tok_s", ".1f"),
            number(row, f"{key}/plain_tok_s", ".1f"),
            interval(row, f"{key}/speedup", ".2f", "x"),
            number(row, f"{key}/speedup_without_loops", ".2f"),
            number(row, f"{key}/acceptance", ".3f"),
            number(row, f"{key}/acceptance_length", ".2f"),
        )
    if own and value(row, "bench/speedup_macro") is not None:
        yield label, MACRO, *["-"] * 4, interval(row, "bench/speedup_macro", ".2f", "x"), *["-"] * 3
