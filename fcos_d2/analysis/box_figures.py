"""Boxes over an image: where detections came from, and which locations would learn the truth.

Axes are in pixels of the original image; the first pixel reaches from 0 to 1.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ..inference.drawing import class_colors
from .charts import new_figure, shrunk
from .inspection import Inspection
from .positives import LocatedPositives

_Color = tuple[float, float, float]


def origins_figure(inspection: Inspection, threshold: float = 0.4) -> Figure:
    """Boxes of detections, with the four distances as arrows from the location that said them.

    Arrows may end outside their box, which is clipped to the image.

    Args:
        threshold: detections with a smaller score are left out.
    """
    detections = inspection.detections
    shown = detections[detections.scores >= threshold]
    height, width = inspection.image.shape[:2]
    inches = 8 / max(height, width)  # the longer side of the image is 8 inches
    figure = new_figure(max(width * inches, 4) + 0.2, height * inches + 0.8)
    axes = figure.add_subplot()
    _draw_image(axes, inspection.image)
    colors = _colors(len(shown))
    for i in reversed(range(len(shown))):  # so that the best lie on top
        d, color = shown[i], colors[i]
        (box,) = d.pred_boxes.tensor.tolist()
        _draw_box(axes, box, color)
        _draw_ltrb(axes, d.locations[0].numpy(), d.ltrb[0].numpy(), color)
        name = inspection.class_names[int(d.pred_classes)]
        level = inspection.level_names[int(d.level)]
        _write(axes, box, f"{name} {float(d.scores):.2f} {level}", color)
    axes.set_title(f"{len(shown)} of {len(detections)} detections: score of {threshold:g} or more")
    counts = shown.level.bincount(minlength=len(inspection.levels)).tolist()
    levels = (f"{inspection.level_title(i)}: {n}" for i, n in enumerate(counts) if n)
    axes.set_xlabel("    ".join(levels))
    return figure


def _draw_ltrb(axes: Axes, location: np.ndarray, ltrb: np.ndarray, color: _Color) -> None:
    """Arrows from a location (2,) to the left, top, right and bottom."""
    x, y = location.repeat(4).reshape(2, 4)
    arrows = ltrb * np.array([[-1, 0, 1, 0], [0, -1, 0, 1]])
    axes.quiver(
        x, y, *arrows, color=color, angles="xy", scale_units="xy", scale=1,
        width=0.003, headwidth=5, headlength=6, headaxislength=5.5,
    )  # fmt: skip
    axes.scatter(*location, s=30, color=color, edgecolors="black", linewidths=0.8, zorder=3)


def positives_figure(inspection: Inspection, positives: LocatedPositives) -> Figure:
    """The positives of each box in its colour, one panel for each level that has any."""
    levels = positives.level.unique().tolist() or [0]
    colors = _colors(len(positives.boxes))
    owned = positives.gt.bincount(minlength=len(positives.boxes)).tolist()
    height, width = inspection.image.shape[:2]
    panels, panel = len(levels), 5.4
    figure = new_figure(panel * panels, panel * min(height / width, 2) + (1 if panels > 1 else 1.5))
    grid = figure.subplots(1, panels, squeeze=False)[0]
    for axes, level in zip(grid, levels, strict=True):
        _draw_image(axes, inspection.image, alpha=0.6)
        here = positives.level == level
        at_home = set(positives.gt[here].tolist())
        for number, box in enumerate(positives.boxes.tolist()):
            style = ":" if owned[number] == 0 else "-" if number in at_home else (0, (1, 4))
            _draw_box(axes, box, colors[number], linestyle=style)
            if number in at_home or owned[number] == 0:
                text = inspection.class_names[int(positives.classes[number])]
                _write(axes, box, text if owned[number] else f"{text}: none", colors[number])
        for ambiguous, marker, size in ((False, "o", 22), (True, "X", 60)):
            chosen = here & (positives.ambiguous == ambiguous)
            if chosen.any():
                axes.scatter(
                    *positives.locations[chosen].T.numpy(), s=size, marker=marker, zorder=3,
                    c=[colors[number] for number in positives.gt[chosen]],
                    edgecolors="black", linewidths=0.8,
                )  # fmt: skip
        counts = f"{here.sum()} positives, {(here & positives.ambiguous).sum()} ambiguous"
        axes.set_title(f"{inspection.level_title(level)}: {counts}", fontsize=10)
    figure.suptitle(f"{len(owned)} boxes, {owned.count(0)} without a location")
    marks = {"marker": "o", "linestyle": "", "color": "white", "markeredgecolor": "black"}
    legend = [
        Line2D([], [], **marks, label="positive, in the colour of its box"),
        Line2D([], [], **marks | {"marker": "X"}, markersize=8, label="ambiguous"),
        Line2D([], [], color="black", linestyle=":", label="box without a location on this level"),
    ]
    figure.legend(
        handles=legend, loc="outside lower center", ncols=3 if panels > 1 else 1, frameon=False
    )
    return figure


def _draw_image(axes: Axes, image: np.ndarray, **style) -> None:
    """With a margin for boxes on its border and their labels."""
    height, width = image.shape[:2]
    axes.imshow(shrunk(image), extent=(0, width, height, 0), **style)
    margin = 0.04 * max(width, height)
    axes.set(xlim=(-margin, width + margin), ylim=(height + margin, -margin), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _draw_box(axes: Axes, box: Sequence[float], color: _Color, **style) -> None:
    x0, y0, x1, y1 = box
    axes.add_patch(
        Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.8, **style)
    )


def _write(axes: Axes, box: Sequence[float], text: str, color: _Color) -> None:
    """A label above the upper left corner of a box."""
    axes.annotate(
        text, box[:2], xytext=(1, 2), textcoords="offset points", fontsize=8, va="bottom",
        bbox={"facecolor": color, "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
    )  # fmt: skip


def _colors(number: int) -> list[_Color]:
    return [tuple(x / 255 for x in color) for color in class_colors(number)]
