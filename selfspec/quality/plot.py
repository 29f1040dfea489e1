"""ROC curves -> a picture: every gate by exit layer, and its curve at one exit."""

from collections.abc import Sequence

from selfspec.quality.gates import GATES, Curve, Exit
from selfspec.report.plots import png

_COLOURS = dict(zip(GATES, ("#2f6fa8", "#d08030", "#5a9a5a"), strict=True))


def roc(made: Sequence[Curve], layer: int | None) -> bytes | None:
    """Areas of all exits on the left; on the right the curves of ``layer``, or of the last exit; PNG.

    ``None`` where no exit had both accepted and rejected tokens.
    """
    from matplotlib.figure import Figure

    curves = [curve for curve in made if curve.auc is not None]
    if not curves:
        return None
    exits = list(dict.fromkeys(curve.exit for curve in curves))
    heads = list(dict.fromkeys(exit.head for exit in exits))
    figure = Figure(figsize=(10, 4.2), dpi=120)
    left, right = figure.subplots(1, 2)
    for gate, colour in _COLOURS.items():
        for head in heads:
            points = [(c.exit.layer, c.auc) for c in curves if c.gate == gate and c.exit.head == head]
            marker, style = ("o", "-") if head == "raw" else ("*", "none")
            left.plot(
                *zip(*points, strict=True),
                marker=marker,
                markersize=5 if head == "raw" else 12,
                linestyle=style,
                color=colour,
                label=f"{gate}, {head} head",
            )
    left.axhline(0.5, color="#999999", linewidth=0.8, linestyle=":")
    left.set(xlabel="exit layer", ylabel="AUC", title="does the gate know what will be accepted?")
    shown = [exit for exit in exits if exit.layer == layer] or exits[-1:]
    for curve in (curve for curve in curves if curve.exit in shown):
        style = "-" if curve.exit.head == "raw" else "--"
        name = _name(curve.exit, curve.gate)
        right.plot(curve.false_positives, curve.true_positives, style, color=_COLOURS[curve.gate], label=name)
    right.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
    right.set(xlabel="proposed, of rejected tokens", ylabel="proposed, of accepted tokens")
    right.set_title(f"exit layer {shown[0].layer}")
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def _name(exit: Exit, gate: str) -> str:
    return f"{gate}, {exit.head} head"
