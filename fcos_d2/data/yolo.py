"""Data sets in YOLO layout: a data.yaml, images, and a text file of normalised boxes for each."""

import logging
import os
from collections.abc import Sequence

from detectron2.structures import BoxMode

from .image_files import image_size
from .yolo_files import image_files, label_file, label_lines, read_data_yaml


def load_yolo(data: str, split: str) -> tuple[list[dict], list[str]]:
    """Records of a split, in Detectron2's format, and the classes.

    Polygons become boxes with a segmentation. An image without a label file has no boxes. Boxes
    without area are left out with one warning that names them. Of images only headers are read.

    Args:
        data: a data.yaml, or the folder that it is in.
        split: a key of data.yaml, such as "train" or "val".

    Raises:
        OSError: for a missing or unreadable file.
        ValueError: for what is wrong in a file, with its name and line; for a split without images,
            or with no label file at all.
    """
    described = read_data_yaml(data)
    records, left_out, labelled = [], [], 0
    for image_file in image_files(described, split):
        height, width = image_size(image_file)
        file = label_file(described, image_file)
        labelled += os.path.exists(file)
        annotations = []
        for number, line in label_lines(file):
            where = f"{file}, line {number}"
            annotation = parse_line(where, line, described.classes, height, width)
            x0, y0, x1, y1 = annotation["bbox"]
            if x1 > x0 and y1 > y0:
                annotations.append(annotation)
            else:
                left_out.append(where)
        records.append(
            {
                "file_name": image_file,
                "image_id": os.path.relpath(image_file, described.folders[-1]),
                "height": height,
                "width": width,
                "annotations": annotations,
            }
        )
    if records and not labelled:
        raise ValueError(
            f"None of the {len(records)} images of the split {split!r} of {described.file} has a "
            "label file. The one of the first image would be "
            f"{label_file(described, records[0]['file_name'])}"
        )
    if left_out:
        logging.getLogger(__name__).warning(
            f"{described.file}, split {split}: dropped {len(left_out)} box(es) without area: "
            f"{'; '.join(left_out)}"
        )
    return records, described.classes


def parse_line(where: str, line: str, classes: Sequence[str], height: int, width: int) -> dict:
    """The annotation of a line: "class x y width height" or "class x0 y0 x1 y1 x2 y2 ...".

    Args:
        where: the file and the line, for errors.
        height, width: of the image, in pixels.

    Returns:
        an annotation in Detectron2's format, in pixels; its box may have no area.

    Raises:
        ValueError: for a line of another form, an unknown class, and values outside of [0, 1].
    """
    try:
        number, *values = map(float, line.split())
    except ValueError as error:
        text = line.strip()[:80]
        raise ValueError(f"{where} has something else than numbers: {text!r}") from error
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError(
            f"{where} has {len(values)} numbers behind the class. A box has 4 (x and y of its "
            "centre, width, height), a polygon an even number from 6 on"
        )
    if number not in range(len(classes)):
        raise ValueError(
            f"{where} has the class {number:g}, but data.yaml has {len(classes)} classes, from 0 "
            f"to {len(classes) - 1}"
        )
    bad = [x for x in values if not 0 <= x <= 1]  # NaN, too
    if bad:
        raise ValueError(
            f"{where} has {bad[0]:g}, which is not in [0, 1]: coordinates are divided by the width "
            "and height of the image"
        )
    annotation = {"category_id": int(number), "bbox_mode": BoxMode.XYXY_ABS}
    if len(values) == 4:
        x, y, w, h = values
        corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    else:
        xs, ys = values[0::2], values[1::2]
        corners = (min(xs), min(ys), max(xs), max(ys))
        annotation["segmentation"] = [_in_pixels(values, height, width)]
    return annotation | {"bbox": _in_pixels(corners, height, width)}


def _in_pixels(values: Sequence[float], height: int, width: int) -> list[float]:
    return [x * (height if i % 2 else width) for i, x in enumerate(values)]
