"""Heat maps over an image of what the head of a detector says, one panel for each level."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .charts import new_figure, shrunk
from .inspection import Inspection

_MAX_CLASSES = 4  # rows of heat maps: more would not be legible


def quality_figure(inspection: Inspection, kind: str) -> Figure:
    """Heat maps of quality. Dots are the locations of candidates: quality matters only there.

    Args:
        kind: MODEL.FCOS.QUALITY.

    Raises:
        ValueError: if the detector has no quality.
    """
    if inspection.quality is None:
        raise ValueError(f"There is no heat map of quality: MODEL.FCOS.QUALITY is {kind!r}")
    label = {"centerness": "centerness", "iou": "predicted IoU"}.get(kind, f"quality ({kind})")
    figure = _heat_figure(inspection, {"": inspection.quality}, label)
    found, scale = inspection.candidates, inspection.scale
    for level, axes in enumerate(figure.axes[: len(inspection.levels)]):
        locations = found.locations[found.level == level].unique(dim=0) * torch.tensor(scale)
        axes.scatter(*locations.T.numpy(), s=2, color="black", linewidths=0)
    figure.supxlabel("dots: locations with a class above the threshold", fontsize=9)
    return figure


def class_figure(inspection: Inspection) -> Figure:
    """Heat maps of class probability: the highest of all, then a row for each detected class."""
    rows = {"highest class": [x.amax(dim=0) for x in inspection.class_probability]}
    detected = dict.fromkeys(inspection.detections.pred_classes.tolist())  # best first
    for number in list(detected)[:_MAX_CLASSES]:
        rows[inspection.class_names[number]] = [x[number] for x in inspection.class_probability]
    return _heat_figure(inspection, rows, "class probability")


def _heat_figure(inspection: Inspection, rows: dict[str, list[Tensor]], label: str) -> Figure:
    height, width = inspection.image.shape[:2]
    num_levels, panel = len(inspection.levels), 2.7
    row_height = 0.9 * panel * min(height / width, 2) + 0.3
    figure = new_figure(panel * num_levels + 1, len(rows) * row_height + 0.4)
    grid = figure.subplots(len(rows), num_levels, squeeze=False)
    grey = 64 + shrunk(inspection.image).mean(axis=2) * 0.6  # muted: the colours stand out
    for row, (name, maps) in enumerate(rows.items()):
        for level, axes in enumerate(grid[row]):
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
            values = maps[level]
            heat = axes.imshow(
                values, cmap="YlOrRd", vmin=0, vmax=1, interpolation="nearest",
                alpha=0.15 + 0.7 * values.nan_to_num().numpy(),  # the image shows where it is low
                extent=_extent(inspection, level),
            )  # fmt: skip
            axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
            axes.set_xlabel(f"highest {values.nan_to_num().max():.2f}", fontsize=8)
            if row == 0:
                axes.set_title(inspection.level_title(level))
        grid[row][0].set_ylabel(name)
    figure.colorbar(heat, ax=grid, label=label, fraction=0.05, aspect=15 * len(rows))
    return figure


def _extent(inspection: Inspection, level: int) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of a level's cells, each cell around its location."""
    stride = inspection.levels.strides[level]
    begin = (inspection.levels.offset - 0.5) * stride
    height, width = inspection.class_probability[level].shape[1:]
    x, y = inspection.scale
    return begin * x, (begin + width * stride) * x, (begin + height * stride) * y, begin * y
