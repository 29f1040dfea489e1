"""Whether one result is a regression of another: non-inferiority on the same prompts, by interval.

Of each prompt that both have, B's figure over A's (the mean over repeats of each); of these ratios the median, with a
bootstrap 95% interval over prompts. With the margin m, B is

- *no worse* where the interval's low end is at least 1 - m,
- *a regression* where its high end is below that,
- *undecided* otherwise, and with fewer than six prompts, of which no interval of a median holds 95%.

Speed-ups are of plain decoding in the same process, and so do without the machine's pace of that day; tok/s do not,
and see what makes plain decoding slower too; the acceptance length knows no time. What timings depend on must be the
same in both.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from selfspec.config import flatten
from selfspec.errors import UserError
from selfspec.metrics import bootstrap_median
from selfspec.report.results import FILE, Result, lossy, read, varying

UNITS = "units.csv"
MEASURES = ("speedup", "tok_s", "acceptance_length")
FEWEST = 6
"""Prompts: of five, the lowest and the highest leave the median outside in one case of sixteen."""
_MAY_DIFFER = ("torch",)
"""Of what timings depend on: a new version is what may be a regression."""


class Compared(NamedTuple):
    """One measure of B over A's, prompt by prompt: their median and its interval."""

    measure: str
    prompts: int
    ratio: float
    low: float
    high: float
    verdict: str


class Comparison(NamedTuple):
    """Of two results.

    Attributes:
        changed: A's text was plain decoding's, and B's is not.
        notes: what else is not the same.
    """

    compared: list[Compared]
    changed: bool
    notes: list[str]

    @property
    def exit_code(self) -> int:
        """0: no worse; 1: a regression; 3: undecided."""
        verdicts = {one.verdict for one in self.compared}
        return 1 if self.changed or "a regression" in verdicts else 3 if "undecided" in verdicts else 0


def compare(a: Path, b: Path, measures: Sequence[str] = MEASURES, margin: float = 0.05) -> Comparison:
    """Is the result in folder ``b`` a regression of that in ``a``?

    Args:
        measures: of :data:`MEASURES`; those that neither has are left out.
        margin: how much worse is as good, as a share.

    Raises:
        UserError: one has no result, or they are not to be compared: other hardware, another workload, no prompt in
            common, nothing measured.
    """
    old, new = _alone(a), _alone(b)
    _check_places(a, old, b, new)
    theirs, ours = _figures(a), _figures(b)
    common = [prompts for prompts in theirs if prompts in ours]
    if not common:
        raise UserError(f"{b}: has no prompt in common with {a}")
    compared = []
    for measure in measures:
        pairs = [(theirs[one].get(measure), ours[one].get(measure)) for one in common]
        ratios = [after / before for before, after in pairs if before and after]
        if ratios:
            compared.append(_compared(measure, ratios, margin))
    if not compared:
        raise UserError(f"{b}: has none of {', '.join(measures)} in common with {a}")
    return Comparison(compared, lossy(new) and not lossy(old), _notes(old, new, len(theirs), len(ours), len(common)))


def text(comparison: Comparison, margin: float) -> str:
    """What is told of it, a line a measure."""
    word = {0: "no regression", 1: "a regression", 3: "undecided: more prompts, or a wider margin, would tell"}
    return "\n".join(
        [
            *(
                f"{one.measure}: {one.ratio:.3f} of A's [{one.low:.3f}, {one.high:.3f}] on {one.prompts} prompts: "
                f"{one.verdict}"
                for one in comparison.compared
            ),
            *comparison.notes,
            f"B is {word[comparison.exit_code]} (margin {margin:g}; median of ratios, bootstrap 95% interval)",
        ]
    )


def _compared(measure: str, ratios: Sequence[float], margin: float) -> Compared:
    low, high = bootstrap_median(ratios, 0)
    verdict = "no worse" if low >= 1 - margin else "a regression" if high < 1 - margin else "undecided"
    if len(ratios) < FEWEST:
        verdict = "undecided"
    return Compared(measure, len(ratios), median(ratios), low, high, verdict)


def _alone(folder: Path) -> Result:
    """The one result of a folder."""
    if not (folder / FILE).is_file():
        raise UserError(f"{folder}: holds no {FILE}; compare the folders of two jobs (of a sweep: .../0)")
    result = read(folder / FILE)
    if result["status"] == "failed":
        raise UserError(f"{folder}: failed: {result['error'] or 'no reason given'}")
    return result


def _check_places(a: Path, old: Result, b: Path, new: Result) -> None:
    """Refuses what would compare machines, or tasks."""
    theirs, ours = (
        {
            key: value
            for key, value in flatten(
                {key: result["provenance"].get(key) or {} for key in ("hardware", "extra")}
            ).items()
            if key.rpartition(".")[2] not in _MAY_DIFFER
        }
        for result in (old, new)
    )
    if not theirs or not ours:
        raise UserError(f"{b if theirs else a}: does not say what it was measured on")
    for key in dict.fromkeys([*theirs, *ours]):
        if theirs.get(key) != ours.get(key):
            found = f"{key} is {ours.get(key)} in {b}, and {theirs.get(key)} in {a}"
            raise UserError(f"{found}: timings of different hardware are not compared")
    asked = [{k: v for k, v in (r["settings"].get("workload") or {}).items() if k not in _SAME} for r in (old, new)]
    if asked[0] != asked[1]:
        key = next(key for key in {**asked[0], **asked[1]} if asked[0].get(key) != asked[1].get(key))
        raise UserError(
            f"workload.{key} is {asked[1].get(key)} in {b}, and {asked[0].get(key)} in {a}: not the same prompts"
        )


_SAME = ("name", "source", "sha256", "parts")
"""Of a workload: by what a prompt is called, and how long it is, it is seen whether it is the same."""


def _figures(folder: Path) -> dict[tuple[str, str], Mapping[str, float]]:
    """By what was asked: each figure, the mean over repeats."""
    try:
        with (folder / UNITS).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        found: dict[tuple[str, str], dict[str, list[float]]] = {}
        for row in rows:
            one = found.setdefault((row["prompts"], row["prompt_tokens"]), {})
            for key in ("speedup", "tok_s"):
                if row[key]:
                    one.setdefault(key, []).append(float(row[key]))
            if int(row["cycles"]):
                one.setdefault("acceptance_length", []).append(int(row["cycle_tokens"]) / int(row["cycles"]))
    except OSError as error:
        raise UserError(f"{folder / UNITS}: cannot be read: {error.strerror}; run the job again: it resumes") from error
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{folder / UNITS}: is not what a bench leaves: {error}") from error
    return {asked: {key: fmean(values) for key, values in one.items()} for asked, one in found.items()}


def _notes(old: Result, new: Result, before: int, after: int, common: int) -> list[str]:
    """What is left out, and what differs besides."""
    notes = []
    if common < max(before, after):
        notes.append(f"{common} units are in both, of A's {before} and B's {after}")
    settings = [flatten(result["settings"]) for result in (old, new)]
    changed = [
        f"{key}: {settings[0].get(key)} -> {settings[1].get(key)}"
        for key in varying([old, new])
        if key.split(".")[0] not in ("checkpoint", "output_dir", "tracking", "name")
    ]
    if changed:
        notes.append(f"B has other settings: {', '.join(changed)}")
    if old["lossless"] != new["lossless"]:
        notes.append(f"lossless: {old['lossless']} -> {new['lossless']}")
    return notes
