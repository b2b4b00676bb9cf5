"""One picture of the first images that a training sees: as they are augmented, with their boxes."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from PIL import Image, ImageDraw, ImageFont

from ..checkpoint import replacing
from ..data import TrainingLoader, class_names
from ..inference.drawing import (
    class_colors,
    class_labels,
    draw_boxes,
    label_font,
    printable,
)

_IMAGES, _COLUMNS = 10, 5
_CELL, _CAPTION, _GAP = 320, 20, 6  # pixels: the sides of a cell, the line below it, the margin


def save_augmented(loader: TrainingLoader, cfg: CfgNode, file: str | os.PathLike) -> None:
    """Write a picture of the first ten images that a training from ``loader`` sees.

    Args:
        file: ends in .jpg or .png. One that exists is replaced.

    Raises:
        ValueError: for an image that cannot be used, or another ending.
        OSError: where it cannot be written.
    """
    kind = {".jpg": "JPEG", ".png": "PNG"}.get(Path(file).suffix)
    if kind is None:
        raise ValueError(f"The name of a picture must end in .jpg or .png, got {str(file)!r}")
    elements = loader.first_elements(_IMAGES)
    sheet = augmented_sheet(elements, cfg.INPUT.FORMAT, class_names(cfg) or ())
    with replacing(os.fspath(file), "wb") as f:
        sheet.save(f, kind, quality=80)


def try_to_save_augmented(loader: TrainingLoader, cfg: CfgNode, file: str | os.PathLike) -> None:
    """Like :func:`save_augmented`, but errors become a warning: a training goes on without it."""
    try:
        Path(file).unlink(missing_ok=True)  # that of an earlier run shows other images
        save_augmented(loader, cfg, file)
    except Exception as error:  # of many kinds: of the data, of the disk, of mappers of others
        logging.getLogger(__name__).warning(
            f"There is no picture {file} of augmented images: {type(error).__name__}: {error}"
        )


def augmented_sheet(
    elements: Sequence[dict], image_format: str, names: Sequence[str] = ()
) -> Image.Image:
    """Images of a training batch in equal cells, five in a row, as large as fits into a cell.

    Args:
        elements: each has an ``image`` (C, H, W) of ``image_format``, and may have ``instances``
            with ``gt_boxes`` and ``gt_classes``.
        image_format: INPUT.FORMAT.
        names: of the classes; a class without a name is written as its number.

    Returns:
        in RGB.
    """
    font = label_font(12)
    rows = -(-len(elements) // _COLUMNS)
    width, height = _CELL + _GAP, _CELL + _CAPTION + _GAP
    sheet = Image.new("RGB", (_COLUMNS * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, element in enumerate(elements):
        x, y = _GAP + i % _COLUMNS * width, _GAP + i // _COLUMNS * height
        sheet.paste(_cell(element, image_format, names, font), (x, y))
        of_image = element["image"].shape
        size = f"{of_image[2]} x {of_image[1]}"
        name = printable(os.path.basename(element.get("file_name", "")))
        while font.getlength(f"{name}  {size}") > _CELL:
            name = f"…{name.removeprefix('…')[1:]}"  # the end of a name tells more than the start
        draw.text((x, y + _CELL + 2), f"{name}  {size}", "black", font)
    return sheet


def _cell(
    element: dict, image_format: str, names: Sequence[str], font: ImageFont.FreeTypeFont
) -> Image.Image:
    pixels = detection_utils.convert_image_to_rgb(element["image"].permute(1, 2, 0), image_format)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    scale = _CELL / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], reducing_gap=3)
    cell = Image.new("RGB", (_CELL, _CELL), (225, 225, 225))
    cell.paste(image)
    if "instances" not in element:
        return cell
    instances = element["instances"]
    classes = instances.gt_classes.tolist()
    colors = class_colors(max(len(names), *classes, 0) + 1)
    boxes = (instances.gt_boxes.tensor * scale).tolist()
    of_classes = class_labels(classes, names), [colors[number] for number in classes]
    draw_boxes(cell, boxes, *of_classes, font)
    return cell
