"""What charts have in common."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..inference.drawing import plain_text


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches. Unlike pyplot it needs no display and changes no global state."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def new_chart(height: float = 4.4) -> tuple[Figure, Axes]:
    """A figure with one chart, open on top and on the right."""
    figure = new_figure(6.4, height)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def shrunk(image: np.ndarray, side: int = 1200) -> np.ndarray:
    """Every n-th pixel of an image (H, W, ...), so that its longer side has at most ``side``.

    Matplotlib takes minutes and gigabytes for photos of many megapixels. A figure has about 1200.
    """
    step = -(-max(image.shape[:2]) // side)
    return image[::step, ::step]


def save_figures(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Write each figure as a PNG file of its name; returns the paths."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = [Path(folder, f"{name}.png") for name in figures]
    for file, figure in zip(files, figures.values(), strict=True):
        figure.savefig(file)
    return files


def bars_figure(
    names: Sequence[str],
    groups: Mapping[str, Sequence[float | None]],
    text: Callable[[float], str],
    title: str,
    label: str,
) -> Figure:
    """Horizontal bars, the first name on top, one bar of each group beside the others.

    Args:
        names: of the rows.
        groups: by name, a value for each row; None is no bar, and the text "-".
        text: makes the text at the end of a bar.
        label: what the values are.
    """
    figure, axes = new_chart(1.5 + 0.3 * len(names) * max(1, 0.6 * len(groups)))
    thickness = 0.8 / len(groups)
    for i, (group, values) in enumerate(groups.items()):
        places = [row + i * thickness for row in range(len(names))]
        lengths = [value or 0.0 for value in values]
        bars = axes.barh(places, lengths, thickness, label=plain_text(group))
        texts = ["-" if value is None else text(value) for value in values]
        axes.bar_label(bars, texts, padding=2, fontsize=8)
    middle = (len(groups) - 1) * thickness / 2
    axes.set_yticks([p + middle for p in range(len(names))], [plain_text(n[:30]) for n in names])
    axes.invert_yaxis()
    axes.margins(x=0.12)  # room for the texts
    axes.set(title=title, xlabel=label)
    if len(groups) > 1:
        figure.legend(frameon=False, loc="outside lower center", ncols=4)
    return figure
