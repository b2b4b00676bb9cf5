"""Charts of runs, alone or beside others: training, AP, score threshold, confusion."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..analysis.charts import bars_figure, new_chart, new_figure
from ..inference.drawing import plain_text
from .evaluation import CURVE_IOUS, MATCH_IOU, BoxEvaluation, ScoreCurve

_MOST_CLASSES = 30  # in a matrix
_MOST_BARS = 80  # classes
_MOST_NUMBERS = 15  # classes of a matrix with a number in each cell


def training_figure(runs: Mapping[str, Sequence[dict]]) -> Figure | None:
    """Losses, rate and AP over the iterations; None if none of them was written.

    Args:
        runs: by name, the rows of metrics.json, with "AP" and "test_loss" where there are some.
    """
    every = [row for rows in runs.values() for row in rows]
    panels = {"total_loss": "loss", "lr": "learning rate", "AP": "AP"}
    panels = {key: title for key, title in panels.items() if any(key in row for row in every)}
    if not panels:
        return None
    last = 1.02 * max(1, *(row["iteration"] for row in every))
    figure = new_figure(4.4 * len(panels), 3.6)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (key, title) in zip(grid, panels.items(), strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            # A single AP would be no line.
            style = {"color": f"C{i}", "marker": "o" if key == "AP" else None}
            _plot(axes, rows, key, name if len(runs) > 1 else key, **style)
            if key == "total_loss":
                label = f"{name}, test images" if len(runs) > 1 else "test images"
                _plot(axes, rows, "test_loss", label, color=f"C{i}", marker="o", linestyle="--")
        if len(runs) == 1 and key == "total_loss":
            names = sorted({k for row in every for k in row if k.startswith("loss")})
            for i, name in enumerate(names, 1):
                _plot(axes, every, name, name, color=f"C{i}", linewidth=1)
        axes.set(title=title, xlabel="iteration")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        top = axes.dataLim.y1  # infinite where all values are NaN
        axes.set(xlim=(0, last), ylim=(0, 1.08 * top if 0 < top < np.inf else 1))
    if len(runs) > 1:
        lines = figure.axes[0].get_legend_handles_labels()
        figure.legend(*lines, frameon=False, loc="outside lower center", ncols=3)
    elif "total_loss" in panels:
        figure.axes[0].legend(frameon=False)
    return figure


def _plot(axes: Axes, rows: Sequence[dict], key: str, label: str, **style) -> None:
    points = [(row["iteration"], row[key]) for row in rows if key in row]
    if points:
        axes.plot(*np.array(points).T, **style, label=plain_text(label))


def precision_recall_figure(runs: Mapping[str, BoxEvaluation]) -> Figure:
    """Without classes, one panel for each IoU, as in figures 4 to 6 of 1904.01355."""
    figure = new_figure(4.4 * len(CURVE_IOUS), 4.3)
    for axes, iou in zip(figure.subplots(1, len(CURVE_IOUS)), CURVE_IOUS, strict=True):
        for name, evaluation in runs.items():
            recall, precision = evaluation.precision_recall(iou)
            label = f"{plain_text(name)}: AP {100 * precision.mean():.1f}"
            axes.plot(recall, precision, label=label)
        axes.set(title=f"IoU {iou:g}", xlabel="recall", ylabel="precision")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize=8)
    return figure


def score_figure(curve: ScoreCurve) -> Figure:
    """Precision, recall and F1 over the score threshold."""
    figure, axes = new_chart(4)
    # Each value holds from its score down to the next lower one.
    for name in ("precision", "recall", "f1"):
        label = "F1" if name == "f1" else name
        axes.step(curve.scores, getattr(curve, name), where="post", label=label)
    if curve.threshold is not None:
        axes.axvline(curve.threshold, color="black", linestyle="--", linewidth=1)
        text = f" F1 {curve.f1[curve.best]:.2f} at {curve.threshold:.2f}"
        axes.annotate(text, (curve.threshold, 1.01), annotation_clip=False, fontsize=9)
    axes.set(xlabel="score threshold", xlim=(0, 1), ylim=(0, 1))
    axes.set_ylabel(f"at an IoU of {MATCH_IOU:g}, all classes together")
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


def ap_figure(
    names: Sequence[str], runs: Mapping[str, Sequence[float | None]], title: str
) -> Figure:
    """AP of each class or size, a bar for each run. Of many, those with the lowest AP of the first.

    Args:
        names: of the classes or sizes.
        runs: by name, the AP of each of ``names``; None is no bar.
    """
    first = np.array(next(iter(runs.values())), dtype=np.float64)  # NaN, for None, is last
    shown = np.sort(first.argsort(kind="stable")[:_MOST_BARS])
    if len(shown) < len(names):
        title += f": the {len(shown)} lowest of {len(names)}"
    groups = {run: [values[number] for number in shown] for run, values in runs.items()}
    figure = bars_figure([names[i] for i in shown], groups, "{:.1f}".format, title, "AP")
    figure.axes[0].set_xlim(0, 105)
    return figure


def confusion_figure(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """The result of :func:`~fcos_d2.report.errors.confusion_matrix`; of many classes the worst."""
    wrong = matrix - np.diag(matrix.diagonal())
    confused = (wrong.sum(0) + wrong.sum(1))[:-1]
    shown = np.sort((-confused).argsort(kind="stable")[:_MOST_CLASSES])
    rows = [*shown, len(names)]
    counts = matrix[np.ix_(rows, rows)]
    labels = [plain_text(names[i][:20]) for i in shown] + ["background"]
    # Shares of each row, over all columns: they show rare classes too.
    shares = counts / matrix[rows].sum(1, keepdims=True).clip(1)
    side = min(2.6 + 0.42 * len(labels), 12)
    figure = new_figure(side + 0.6, side)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="detected", ylabel="ground truth")
    if len(labels) <= _MOST_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            color = "white" if share > 0.5 else "black"
            text = f"{counts[row, column]:,}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    if len(shown) < len(names):
        axes.set_title(f"the {len(shown)} of {len(names)} classes that are confused most")
    return figure
