"""Classes and sizes of the boxes of a data set, and the levels that the sizes go to."""

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

from ..data.check import to_records
from ..data.findings import Finding
from ..data.raw_data import RawData
from ..inference.drawing import plain_text
from .assignment import analyze_boxes
from .charts import bars_figure, new_chart, save_figures

_BINS = (0, 16, 32, 64, 128, 256, 512)  # where bins of square roots of areas begin, in pixels
_MOST_CLASSES = 40  # in a plot
_NONE = "no location"


@dataclass(frozen=True)
class DataStatistics:
    """Of one data set; crowds and boxes with an error are left out of ``sizes``."""

    name: str
    images: int
    boxes: dict[str, int]  # by class, in the order of the class numbers
    images_with: dict[str, int]  # number of images by class
    # Sides of boxes in pixels, by the level where a box owns most locations, or "no location".
    # Without a config there is one level, "boxes".
    sizes: dict[str, list[float]]

    def to_dict(self) -> dict:
        """Ready for JSON, with the number of boxes in each bin of sizes."""
        numbers = vars(self) | {"sizes": self._binned()}
        del numbers["name"]
        return numbers

    def _binned(self) -> dict[str, dict[str, int]]:
        """For each level the number of boxes in each bin of sizes."""
        ends = [f"{low}-{high}" for low, high in itertools.pairwise((*_BINS, ""))]
        counts = {level: np.histogram(x, [*_BINS, np.inf])[0] for level, x in self.sizes.items()}
        return {level: dict(zip(ends, n.tolist(), strict=True)) for level, n in counts.items()}

    def table(self) -> str:
        """As text for a terminal."""
        classes = [(c, n, self.images_with[c]) for c, n in self.boxes.items()]
        levels = self._binned()
        sizes = {"side of the box": [f"{bin} px" for bin in next(iter(levels.values()))]}
        sizes |= {level: bins.values() for level, bins in levels.items()}
        tables = (classes, ("class", "boxes", "images")), (sizes, "keys")
        tables = [tabulate(*table, disable_numparse=True) for table in tables]
        total = f"{self.name}: {self.images} images, {sum(self.boxes.values())} boxes"
        return "\n\n".join([total, *tables])


def data_statistics(
    data: RawData, findings: list[Finding], cfg: CfgNode | None = None, progress: bool = False
) -> tuple[DataStatistics, list[Finding]]:
    """The numbers of a data set, and a finding for each of its sound boxes that owns no location.

    Args:
        findings: of ``check_annotations``.
        cfg: of the detector that assigns the boxes. Without one there are no such findings, and
            sizes are those in the files.
    """
    pairs = [(a["image_id"], a["category_id"]) for a in data.annotations]
    boxes, images_with = (
        {c["name"]: count[c["id"]] for c in data.categories}
        for count in (Counter(c for _, c in found) for found in (pairs, set(pairs)))
    )
    records, indices = to_records(data, findings)
    unowned = []
    if cfg is None:
        areas = [a["bbox"][2] * a["bbox"][3] for r in records for a in r["annotations"]]
        sizes = {"boxes": [area**0.5 for area in areas]}
    else:
        assigned = analyze_boxes(cfg, records, progress=progress)
        main = torch.where(assigned.positives.sum(1) > 0, assigned.positives.argmax(1), -1)
        levels = {name: i for i, name in enumerate(assigned.level_names)} | {_NONE: -1}
        sizes = {name: assigned.sides[main == i].tolist() for name, i in levels.items()}
        for record, number in assigned.unowned:
            index = indices[record][number]
            _, _, width, height = data.annotations[index]["bbox"]
            size = f"{width:g} x {height:g} pixels in the file"
            unowned.append(data.finding("box owns no location", index, size))
    return DataStatistics(data.name, len(data.images), boxes, images_with, sizes), unowned


def save_data_charts(sets: list[DataStatistics], folder: str | Path) -> list[Path]:
    """Write ``classes.png``, and ``sizes_NAME.png`` for each data set; returns the paths."""
    figures = {"classes": _classes_figure(sets)}
    for data in sets:
        figures["sizes_" + re.sub(r"[^\w-]", "_", data.name)] = _sizes_figure(data)
    return save_figures(figures, folder)


def _classes_figure(sets: list[DataStatistics]) -> Figure:
    total = Counter()
    for data in sets:
        total.update(data.boxes)
    names = sorted(total, key=total.get, reverse=True)[:_MOST_CLASSES]
    groups = {data.name: [data.boxes.get(name, 0) for name in names] for data in sets}
    more = f" (the {len(names)} most frequent of {len(total)})" if len(total) > len(names) else ""
    figure = bars_figure(names, groups, "{:,}".format, f"Boxes per class{more}", "boxes")
    axis = figure.axes[0].xaxis
    axis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_major_formatter("{x:,.0f}")
    return figure


def _sizes_figure(data: DataStatistics) -> Figure:
    figure, axes = new_chart()
    shown = {name: of_level for name, of_level in data.sizes.items() if of_level}
    sides = [side for of_level in shown.values() for side in of_level] or [8]
    low = max(min(sides), 1) / 1.1
    high = max(max(sides), 4 * low)
    if shown:
        colors = {name: f"C{i}" for i, name in enumerate(data.sizes)} | {_NONE: "grey"}
        colors = [colors[name] for name in shown]  # a level has the same colour in every chart
        clipped = [np.maximum(of_level, low) for of_level in shown.values()]
        edges = np.geomspace(low, high * 1.001, 41)
        labels = [f"{name} ({len(sides):,})" for name, sides in shown.items()]
        axes.hist(clipped, edges, stacked=True, color=colors, label=labels)
        title = "" if "boxes" in shown else "level where a box owns most locations (boxes)"
        figure.legend(frameon=False, loc="outside lower center", ncols=6, title=title)
    else:
        axes.text(0.5, 0.5, "no boxes", transform=axes.transAxes, ha="center")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    where = "in the files" if "boxes" in data.sizes else "at the test resize"
    axes.set_title(f"Sizes of the boxes of {plain_text(data.name)}")
    axes.set_xlabel(f"square root of the area, in pixels {where}")
    axes.set_ylabel("boxes")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure
