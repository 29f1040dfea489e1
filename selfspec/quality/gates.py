"""How well each gate's signal predicts, at each exit layer, whether a drafted token will be accepted: ROC curves.

A gate that keeps the tokens on one side of a threshold proposes some of those that would be accepted (true positives)
and some that would be rejected (false positives); the curve is that trade over all thresholds, its area (AUC) the
chance that an accepted token looks better than a rejected one. 0.5 is no knowledge at all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfspec.files import csv_text
from selfspec.types import Measurements

GATES = {"maxp": ("max_prob", 1), "entropy": ("entropy", -1), "varH": ("var_entropy", -1)}
"""Every gate's signal, and whether a large one speaks for the token (1) or against it (-1)."""
POINTS = 200
"""The most points of a curve that are kept: a plot has no more pixels."""

Floats = NDArray[np.float64]


class Exit(NamedTuple):
    """Where a draft leaves the model, and what reads it there (``raw``, or the draft mode that was fitted)."""

    layer: int
    head: str


@dataclass(frozen=True)
class Curve:
    """One gate at one exit.

    Attributes:
        auc: ``None`` where all tokens stand, or none.
        false_positives, true_positives: rates at each threshold, both from 0 to 1.
        thresholds: of the gate, as its config has them.
    """

    exit: Exit
    gate: str
    auc: float | None
    false_positives: Floats
    true_positives: Floats
    thresholds: Floats


def curves(units: Iterable[dict[str, Any]]) -> list[Curve]:
    """Of all units' signals together, exit by exit and gate by gate."""
    from sklearn.metrics import roc_auc_score, roc_curve

    made = []
    for exit, signals in _pooled(units).items():
        accepted = signals["accepted"].astype(bool)
        decided = 0 < accepted.sum() < len(accepted)
        for gate, (signal, sign) in GATES.items():
            if not decided:
                made.append(Curve(exit, gate, None, *(np.empty(0) for _ in range(3))))
                continue
            score = sign * signals[signal]
            false, true, thresholds = roc_curve(accepted, score)
            keep = np.unique(np.linspace(0, len(false) - 1, POINTS).astype(int))
            area = float(roc_auc_score(accepted, score))
            made.append(Curve(exit, gate, area, false[keep], true[keep], sign * thresholds[keep]))
    return made


def summarise(units: Sequence[dict[str, Any]], made: Sequence[Curve]) -> Measurements:
    """AUCs, and the share of drafted tokens that stand, by exit."""
    found: Measurements = {}
    for exit, signals in _pooled(units).items():
        found[f"gates/{exit.layer}/{exit.head}/acceptance"] = float(signals["accepted"].mean())
        found[f"gates/{exit.layer}/{exit.head}/tokens"] = len(signals["accepted"])
    for curve in made:
        if curve.auc is not None:
            found[f"gates/{curve.exit.layer}/{curve.exit.head}/{curve.gate}_auc"] = curve.auc
    return found


def table(made: Sequence[Curve]) -> str:
    """The curves as CSV, a point a line."""
    head = ("exit_layer", "head", "gate", "auc", "threshold", "false_positive_rate", "true_positive_rate")
    points = (
        [*curve.exit, curve.gate, curve.auc, *map(float, point)]
        for curve in made
        for point in zip(curve.thresholds, curve.false_positives, curve.true_positives, strict=True)
    )
    return csv_text([head, *points])


def _pooled(units: Iterable[dict[str, Any]]) -> dict[Exit, dict[str, Floats]]:
    parts: dict[Exit, dict[str, list[list[float]]]] = {}
    for one in (exit for unit in units for exit in unit["exits"]):
        into = parts.setdefault(Exit(one["layer"], one["head"]), {})
        for name in ("accepted", *(signal for signal, _ in GATES.values())):
            into.setdefault(name, []).append(one[name])
    return {
        exit: {name: np.concatenate(lists).astype(float) for name, lists in names.items()}
        for exit, names in sorted(parts.items())
    }
