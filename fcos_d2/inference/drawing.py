"""Pictures of detections."""

import colorsys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]  # RGB


def draw_instances(
    image: np.ndarray,
    instances: Instances,
    metadata: Metadata,
    threshold: float | Sequence[float] = 0.0,
    scale: float = 1.0,
) -> np.ndarray:
    """Draw boxes with their classes, scores if they have them, and masks, each class in its colour.

    Lines are edged with black, so that they are seen on any image.

    Args:
        image: (H, W, 3) uint8, BGR.
        instances: in pixels of the image, with ``pred_boxes`` and ``pred_classes``. On any device.
        metadata: ``thing_classes`` are the names; ``thing_colors`` the colours, if there are any.
        threshold: instances with a smaller score are not drawn. One for all classes, or one for
            each.
        scale: the size of the picture, relative to that of the image.

    Returns:
        (H * scale, W * scale, 3) uint8, BGR.
    """
    instances = instances.to("cpu")
    scores = None
    if instances.has("scores"):
        least = torch.as_tensor(threshold, dtype=torch.float64)
        if least.ndim:
            least = least[instances.pred_classes]
        instances = instances[instances.scores >= least]
        instances = instances[instances.scores.argsort(stable=True)]  # the best ones on top
        scores = instances.scores.tolist()
    classes, names = instances.pred_classes.tolist(), metadata.get("thing_classes", ())
    colors = metadata.get("thing_colors", None)
    if colors is None:
        colors = class_colors(max(len(names), 1 + max(classes, default=0)))
    colors = [tuple(colors[number]) for number in classes]
    labels = class_labels(classes, names)
    if scores is not None:
        labels = [f"{x} {score:.0%}" for x, score in zip(labels, scores, strict=True)]
    picture = np.ascontiguousarray(image[:, :, ::-1])
    if instances.has("pred_masks"):
        for mask, color in zip(np.asarray(instances.pred_masks), colors, strict=True):
            picture[mask] = (picture[mask] + np.array(color)) // 2
    if scale != 1:
        height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
        picture = cv2.resize(picture, (width, height))
    drawn = Image.fromarray(picture)
    font = label_font(min(max(12, min(drawn.size) // 40), 40))
    draw_boxes(drawn, (instances.pred_boxes.tensor * scale).tolist(), labels, colors, font)
    return np.asarray(drawn)[:, :, ::-1].copy()


def draw_boxes(
    picture: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[str],
    colors: Sequence[Color],
    font: ImageFont.FreeTypeFont,
) -> None:
    """Draw boxes, (x0, y0, x1, y1) in pixels, onto a picture, and then their labels over all."""
    draw, width = ImageDraw.Draw(picture), max(2, round(font.size / 8))
    for box, color in zip(boxes, colors, strict=True):
        x0, y0, x1, y1 = box[0], box[1], max(box[0], box[2]), max(box[1], box[3])
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black", width=width + 2)
        draw.rectangle((x0, y0, x1, y1), outline=color, width=width)
    for (x0, y0, *_), label, color in zip(boxes, labels, colors, strict=True):
        text = printable(label)
        _, _, right, bottom = font.getbbox(text)
        x0, y0 = max(0, min(x0, picture.width - right - 2)), max(0, y0 - bottom - 2)
        draw.rectangle((x0, y0, x0 + right + 2, y0 + bottom + 1), fill=color)
        draw.text((x0 + 1, y0), text, "black", font)


@cache
def label_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which has many alphabets, of ``size`` pixels."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(file, size)


def printable(text: str) -> str:
    """A name of a file or class as valid Unicode in one line."""
    return " ".join(text.encode(errors="replace").decode().split())


def plain_text(name: str) -> str:
    """A name as matplotlib can write it: no formulas, and valid Unicode.

    A leading "_" gets a space before it: matplotlib leaves such labels out of a legend.
    """
    text = name.encode(errors="replace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def class_labels(classes: Sequence[int], names: Sequence[str]) -> list[str]:
    """The name of each class, or its number where it has none."""
    return [names[number] if number < len(names) else str(number) for number in classes]


def class_colors(num_classes: int) -> list[Color]:
    """Distinct bright colours, RGB, the same ones each time."""
    hues = [i * 0.618034 % 1 for i in range(num_classes)]  # golden ratio: neighbours differ
    return [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, 0.65, 1)) for hue in hues]
