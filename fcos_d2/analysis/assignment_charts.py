"""Charts of :class:`AssignmentStatistics` as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from .assignment import AssignmentStatistics
from .charts import BLUE, ORANGE, new_chart, save_figures


def save_assignment_charts(statistics: AssignmentStatistics, folder: str | Path) -> list[Path]:
    """Write ``recall_by_size.png``, ``positives_per_level.png`` and ``ambiguity.png``."""
    draw = {"recall_by_size": _recall, "positives_per_level": _positives, "ambiguity": _ambiguity}
    figures = {}
    for name, draw_chart in draw.items():
        figures[name], axes = new_chart()
        draw_chart(axes, statistics)
    return save_figures(figures, folder)


def _recall(axes: Axes, statistics: AssignmentStatistics) -> None:
    areas = ("area < 32² px", "32² ≤ area < 96² px", "area ≥ 96² px")
    names = [
        f"{size.name}\n{area}\n{size.boxes:,} boxes"
        for size, area in zip(statistics.sizes, areas, strict=True)
    ]
    names.append(f"all\n\n{statistics.boxes:,} boxes")
    shares = [size.recall for size in statistics.sizes] + [statistics.best_possible_recall]
    texts = ["no boxes" if share is None else f"{100 * share:.2f} %" for share in shares]
    colors = [BLUE] * 3 + [ORANGE]
    _bars(axes, names, [100 * (share or 0) for share in shares], texts, color=colors)
    axes.set_title("Best possible recall by box size", pad=16)
    axes.set(xlabel="box size (box area in the original image)")
    axes.set(ylabel="boxes that own a location (%)", ylim=(0, 100))


def _positives(axes: Axes, statistics: AssignmentStatistics) -> None:
    names, counts = _level_names(statistics), [level.positives for level in statistics.levels]
    total = max(statistics.positives, 1)
    _bars(axes, names, counts, [f"{n:,}\n{100 * n / total:.1f} %" for n in counts])
    axes.set_title(f"Positive locations per level ({statistics.images:,} images)")
    axes.set(xlabel="level", ylabel="positive locations", ylim=(0, 1.2 * max(1, *counts)))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _ambiguity(axes: Axes, statistics: AssignmentStatistics) -> None:
    names = [*_level_names(statistics), "all"]
    counts = [(x.positives, x.ambiguous, x.ambiguous_classes) for x in statistics.levels]
    positives, *of_positives = np.array([*counts, np.sum(counts, axis=0)]).T
    ambiguous, between = (100 * n / positives.clip(1) for n in of_positives)
    axes.bar(names, between, color=ORANGE, width=0.6, label="between different classes")
    shares = zip(ambiguous, positives, strict=True)
    texts = [f"{a:.2f} %" if p else "no positives" for a, p in shares]
    _bars(axes, names, ambiguous - between, texts, bottom=between, label="within one class")
    axes.set_title("Ambiguous positive locations")
    # Room above the bars for the legend.
    axes.set(xlabel="level", ylabel="share of the positive locations (%)")
    axes.set_ylim(0, 1.35 * max(1, *ambiguous))
    axes.legend(loc="upper right", frameon=False, ncols=2)


def _level_names(statistics: AssignmentStatistics) -> list[str]:
    return [f"{level.name}\nstride {level.stride}" for level in statistics.levels]


def _bars(
    axes: Axes, names: Sequence[str], heights: Sequence[float], texts: Sequence[str], **style
) -> None:
    bars = axes.bar(names, heights, **{"color": BLUE, "width": 0.6} | style)
    axes.bar_label(bars, texts, padding=2)
    # Keep the bars of one or two levels from filling the chart.
    middle, half = (len(names) - 1) / 2, max(len(names), 4) / 2
    axes.set_xlim(middle - half, middle + half)
