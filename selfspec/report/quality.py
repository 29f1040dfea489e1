"""Results -> the report's tables of quality: perplexity, lm-eval, gates, and the targets beside what was measured."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from selfspec.report.results import Result, interval, labels, number, value


class Section(NamedTuple):
    """One table of a report: its caption says what the numbers are."""

    columns: tuple[str, ...]
    cells: list[tuple[str, ...]]
    caption: str


class Target(NamedTuple):
    """What was asked for.

    Attributes:
        key: of the measurement; of two, their quotient.
        bound: what it is to keep to.
        most: whether the bound is the most it may be, or the least.
        wanted: in words.
    """

    what: str
    key: tuple[str, ...]
    bound: float
    most: bool
    wanted: str


TARGETS = (
    Target("delta-PPL, reference answers", ("quality/reference_delta_ppl",), 0.18, True, "at most +0.18"),
    Target("delta-PPL, own text", ("quality/text_delta_ppl",), 0.18, True, "at most +0.18"),
    Target("acceptance rate", ("bench/acceptance",), 0.45, False, "about 0.50 (0.45 or more)"),
    Target(
        "TTFT over plain's", ("bench/ttft_ms", "bench/plain_ttft_ms"), 120 / 220, True, "at most 0.545 (120 of 220 ms)"
    ),
    Target("tok/s over plain's", ("bench/speedup",), 2.0, False, "at least 2.00"),
)
_PPL = (
    "PPL: exp(nats per token), all conversations together. Reference: their own answers, under the distribution that "
    "the configuration decodes with; text: what was generated, scored by the whole model. delta-PPL: less plain "
    "decoding's, with a bootstrap 95% interval over conversations. Equal: share of positions with the same token."
)
_TASKS = "lm-eval's own task definitions, no examples, plain decoding's score first; +- lm-eval's standard error."
_GATES = (
    "Gates: of the first draft token of a cycle, at each exit layer and readout, how often it is accepted, and the "
    "area under each gate's ROC curve for whether it is (0.5: the gate knows nothing)."
)
_MET = "Targets: 'unclear' where the 95% interval holds the bound."
_PPL_COLUMNS = ("reference PPL", "delta-PPL", "text PPL", "delta-PPL", "equal tokens", "first divergence")


def sections(rows: Sequence[Result]) -> list[Section]:
    """Those of which something was measured; none without a quality stage."""
    if not any(key.startswith("quality/") for row in rows for key in row["measurements"]):
        return []
    named = list(zip(rows, labels(rows), strict=True))
    made = [
        Section(("configuration", *columns), [cells for row, label in named for cells in of(row, label)], caption)
        for columns, of, caption in (
            (_PPL_COLUMNS, _perplexity, _PPL),
            (("lm-eval task", "documents", "acc", "acc_norm"), _tasks, _TASKS),
            (("exit", "head", "accepted", "maxp AUC", "entropy AUC", "varH AUC"), _gates, _GATES),
            (("target", "wanted", "measured", "met?"), _targets, _MET),
        )
    ]
    return [section for section in made if section.cells]


def _perplexity(row: Result, label: str) -> Iterator[tuple[str, ...]]:
    if value(row, "quality/reference_ppl") is None:
        return
    yield (
        label,
        number(row, "quality/reference_ppl", ".2f"),
        interval(row, "quality/reference_delta_ppl", "+.3f"),
        number(row, "quality/text_ppl", ".2f"),
        interval(row, "quality/text_delta_ppl", "+.3f"),
        number(row, "quality/equal_tokens", ".3f"),
        number(row, "quality/first_divergence", ".0f"),
    )


def _tasks(row: Result, label: str) -> Iterator[tuple[str, ...]]:
    for task in _names(row, r"quality/tasks/(.+)/plain/documents"):
        prefix = f"quality/tasks/{task}"
        ways = [way for way in ("plain", "configured") if value(row, f"{prefix}/{way}/documents") is not None]

        def score(metric: str, prefix: str = prefix, ways: Sequence[str] = ways) -> str:
            return " -> ".join(_with_error(row, f"{prefix}/{way}/{metric}") for way in ways)

        yield label, task, number(row, f"{prefix}/plain/documents", ".0f"), score("acc"), score("acc_norm")


def _with_error(row: Result, key: str) -> str:
    error = value(row, f"{key}_stderr")
    return number(row, key, ".3f") + (f" +- {error:.3f}" if error is not None else "")


def _gates(row: Result, label: str) -> Iterator[tuple[str, ...]]:
    for exit in sorted(_names(row, r"quality/gates/(.+)/acceptance"), key=lambda exit: int(exit.split("/")[0])):
        areas = (number(row, f"quality/gates/{exit}/{gate}_auc", ".3f") for gate in ("maxp", "entropy", "varH"))
        yield label, *exit.split("/"), number(row, f"quality/gates/{exit}/acceptance", ".3f"), *areas


def _targets(row: Result, label: str) -> Iterator[tuple[str, ...]]:
    for target in TARGETS:
        measured, *base = (value(row, key) for key in target.key)
        if measured is None or not all(base):
            continue
        key, form = target.key[0], "+.3f" if "delta" in target.key[0] else ".3f"
        if base and base[0]:
            measured /= base[0]
            shown, ends = f"{measured:{form}}", [measured]
        else:
            shown = interval(row, key, form)
            ends = [end for end in (value(row, f"{key}_low"), value(row, f"{key}_high")) if end is not None]
        met = {end <= target.bound if target.most else end >= target.bound for end in ends or [measured]}
        yield label, target.what, target.wanted, shown, "unclear" if len(met) > 1 else "yes" if met == {True} else "no"


def _names(row: Result, pattern: str) -> list[str]:
    found = (re.fullmatch(pattern, key) for key in row["measurements"])
    return [match[1] for match in found if match]
