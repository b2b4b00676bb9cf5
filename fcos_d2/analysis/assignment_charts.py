"""Charts of :class:`AssignmentStatistics` as PNG files."""

from pathlib import Path

from .assignment import AssignmentStatistics, share
from .charts import bars_figure, save_figures


def save_assignment_charts(statistics: AssignmentStatistics, folder: str | Path) -> list[Path]:
    """Write ``recall_by_size.png``, ``positives_per_level.png`` and ``ambiguity.png``."""
    sizes = [f"{x.name}: {x.boxes:,} boxes" for x in statistics.sizes]
    recalls = [x.recall for x in statistics.sizes] + [statistics.best_possible_recall]
    levels = [f"{x.name} · stride {x.stride}" for x in statistics.levels]
    ambiguous = [share(x.ambiguous, x.positives) for x in statistics.levels]
    between = [share(x.ambiguous_classes, x.positives) for x in statistics.levels]
    figures = {
        "recall_by_size": bars_figure(
            [*sizes, f"all: {statistics.boxes:,} boxes"],
            {"recall": recalls},
            "{:.2%}".format,
            "Best possible recall by box size",
            "share of the boxes that own a location (sizes as in COCO)",
        ),
        "positives_per_level": bars_figure(
            levels,
            {"positives": [x.positives for x in statistics.levels]},
            "{:,}".format,
            f"Positive locations per level ({statistics.images:,} images)",
            "positive locations",
        ),
        "ambiguity": bars_figure(
            [*levels, "all"],
            {
                "for more than one box": [*ambiguous, statistics.ambiguous],
                "for boxes of different classes": [*between, statistics.ambiguous_classes],
            },
            "{:.2%}".format,
            "Ambiguous positive locations",
            "share of the positive locations",
        ),
    }
    return save_figures(figures, folder)
