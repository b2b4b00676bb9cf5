"""Plots of :class:`AssignmentStatistics` as PNG files, and of scores against IoU."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..inference.drawing import plain_text
from .score_quality import ScoresAndIoUs, rank_correlation
from .statistics import AssignmentStatistics

COLORS = ("#3b75af", "#ef8636", "#519e3e", "#c53a32", "#8d69b8", "#84584e", "#d57dbe")
_BLUE, _ORANGE = COLORS[:2]


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches. Unlike pyplot, no display is needed, no global state changed."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def grouped_bars(
    axes: Axes,
    names: Sequence[str],
    groups: Mapping[str, Sequence[float | None]],
    text: Callable[[float], str],
) -> None:
    """Horizontal bars, the first name on top, one bar of each group beside the others.

    Args:
        names: of the rows.
        groups: by name, a value for each row; None is no bar, and the text "-".
        text: what is written at the end of a bar.
    """
    thickness = 0.8 / len(groups)
    for i, (color, (group, values)) in enumerate(zip(cycle(COLORS), groups.items())):
        places = [row + i * thickness for row in range(len(names))]
        lengths = [value or 0.0 for value in values]
        bars = axes.barh(places, lengths, thickness, color=color, label=plain_text(group))
        texts = ["-" if value is None else text(value) for value in values]
        axes.bar_label(bars, texts, padding=2, fontsize=8)
    middle = (len(groups) - 1) * thickness / 2
    axes.set_yticks([p + middle for p in range(len(names))], [plain_text(n[:30]) for n in names])
    axes.invert_yaxis()


def save_plots(statistics: AssignmentStatistics, folder: str | Path) -> list[Path]:
    """Write ``recall_by_size.png``, ``positives_per_level.png`` and ``ambiguity.png``.

    Args:
        folder: created if it does not exist; files with these names are overwritten.

    Returns:
        the paths of the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plots = {"recall_by_size": _recall, "positives_per_level": _positives, "ambiguity": _ambiguity}
    files = []
    for name, draw in plots.items():
        figure = new_figure(6.4, 4.4)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, statistics)
        # A wider axis keeps the bars of one or two levels from filling the plot.
        bars = len(axes.get_xticks())
        middle, half = (bars - 1) / 2, max(bars, 4) / 2
        axes.set_xlim(middle - half, middle + half)
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1])
    return files


def scores_figure(points: ScoresAndIoUs, quality: str, score_fusion: str) -> Figure:
    """Scores of candidates against the IoU of their boxes, without and with quality.

    Args:
        quality, score_fusion: the keys of MODEL.FCOS. With QUALITY "none" there is one panel, with
            SCORE_FUSION "sqrt" a third one, of the detector's own scores.
    """
    panels = {"class probability": points.class_probability}
    if quality != "none":
        panels["class probability · quality"] = points.product
        if score_fusion == "sqrt":
            panels["score: sqrt(class probability · quality)"] = points.score
    figure = new_figure(4.4 * len(panels), 4.9)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    # Fainter where there are many, so that dense places still differ.
    alpha = min(0.25, max(0.02, 8000 / max(len(points.iou), 1)))
    for axes, (name, scores) in zip(grid, panels.items(), strict=True):
        axes.scatter(scores, points.iou, s=5, alpha=alpha, linewidths=0, color=_BLUE)
        axes.plot([0, 1], [0, 1], "--", color="black", linewidth=1)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel=name)
        axes.set_ylabel("IoU with the ground truth of the class")
        found = points.iou >= 0.5
        correlations = (
            rank_correlation(scores, points.iou),
            rank_correlation(scores[found], points.iou[found]),
        )
        numbers = ("-" if c is None else f"{c:.2f}" for c in correlations)
        axes.set_title("rank correlation {}, of IoU ≥ 0.5: {}".format(*numbers), fontsize=10)
    figure.suptitle(f"{len(points.iou):,} candidates (before NMS), {points.images:,} image(s)")
    return figure


def _recall(axes: Axes, statistics: AssignmentStatistics) -> None:
    areas = ("area < 32² px", "32² ≤ area < 96² px", "area ≥ 96² px")
    names = [
        f"{size.name}\n{area}\n{size.boxes:,} boxes"
        for size, area in zip(statistics.sizes, areas, strict=True)
    ]
    names.append(f"all\n\n{statistics.boxes:,} boxes")
    shares = [size.recall for size in statistics.sizes] + [statistics.best_possible_recall]
    bars = axes.bar(names, [_percent(s) for s in shares], color=[_BLUE] * 3 + [_ORANGE], width=0.6)
    axes.bar_label(
        bars, ["no boxes" if s is None else f"{100 * s:.2f} %" for s in shares], padding=2
    )
    axes.set_title("Best possible recall by box size", pad=16)
    axes.set_xlabel("box size (box area in the original image)")
    axes.set_ylabel("boxes that own a location (%)")
    axes.set_ylim(0, 100)


def _positives(axes: Axes, statistics: AssignmentStatistics) -> None:
    counts = [level.positives for level in statistics.levels]
    total = max(statistics.positives, 1)
    bars = axes.bar(_level_names(statistics), counts, color=_BLUE, width=0.6)
    axes.bar_label(bars, [f"{n:,}\n{100 * n / total:.1f} %" for n in counts], padding=2)
    axes.set_title(f"Positive locations per level ({statistics.images:,} images)")
    axes.set_xlabel("level")
    axes.set_ylabel("positive locations")
    axes.set_ylim(0, 1.2 * max(1, *counts))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _ambiguity(axes: Axes, statistics: AssignmentStatistics) -> None:
    names = [*_level_names(statistics), "all"]
    levels = statistics.levels
    positives = [level.positives for level in levels] + [statistics.positives]
    ambiguous, between = (
        [100 * n / max(p, 1) for n, p in zip([*counts, sum(counts)], positives, strict=True)]
        for counts in (
            [level.ambiguous for level in levels],
            [level.ambiguous_classes for level in levels],
        )
    )
    within = [a - b for a, b in zip(ambiguous, between, strict=True)]
    axes.bar(names, between, color=_ORANGE, width=0.6, label="between different classes")
    bars = axes.bar(names, within, bottom=between, color=_BLUE, width=0.6, label="within one class")
    shares = zip(ambiguous, positives, strict=True)
    axes.bar_label(bars, [f"{a:.2f} %" if p else "no positives" for a, p in shares], padding=2)
    axes.set_title("Ambiguous positive locations")
    axes.set_xlabel("level")
    axes.set_ylabel("share of the positive locations (%)")
    # Room above the bars for the legend.
    axes.set_ylim(0, 1.35 * max(1, *ambiguous))
    axes.legend(loc="upper right", frameon=False, ncols=2)


def _level_names(statistics: AssignmentStatistics) -> list[str]:
    return [f"{level.name}\nstride {level.stride}" for level in statistics.levels]


def _percent(share: float | None) -> float:
    return 0.0 if share is None else 100 * share
