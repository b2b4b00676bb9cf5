"""Data sets in YOLO layout: a data.yaml, images, and a text file of normalised boxes for each."""

import os
from collections.abc import Sequence

from .data_yaml import image_files, label_file, label_lines, read_data_yaml
from .image_files import image_size
from .raw_data import RawData


def read_yolo(name: str, data_yaml: str, split: str) -> RawData:
    """A split in YOLO layout. For errors see :func:`read_data_yaml` and :func:`image_files`.

    Polygons become boxes with a segmentation. An image without a label file has no boxes. Only the
    headers of images are read.

    Args:
        data_yaml: a data.yaml, the folder that it is in, or a list of classes.
        split: a key of data.yaml, such as "train" or "val".
    """
    described, label_files = read_data_yaml(data_yaml), []
    data = RawData(name, described.folders[-1], source=f"{described.file}, split {split}")
    data.categories = [{"id": i + 1, "name": c} for i, c in enumerate(described.classes)]
    found, missing = image_files(described, split)
    for text in missing:
        data.refuse(FileNotFoundError(text), "no image", file=described.file)
    for image_file in found:
        image = os.path.relpath(image_file, data.image_root)
        # ".." behind a folder that is a link leads to another place.
        file_name = os.path.abspath(image_file) if image.startswith("..") else image
        with data.refusing("unreadable image", file=image_file, image=image):
            data.add_image(image, file_name, image_size(image_file))
            label_files.append(label_file(described, image_file))
            _read_labels(data, label_files[-1], described.classes)
    if label_files and not any(map(os.path.exists, label_files)):
        error = ValueError(
            f"None of the {len(label_files)} images of the split {split!r} of {described.file} has "
            f"a label file. The one of the first image would be {label_files[0]}"
        )
        data.refuse(error, file=described.file)
    return data


def _read_labels(data: RawData, file: str, classes: Sequence[str]) -> None:
    """Add the boxes of the last image."""
    image, height, width = (data.images[-1][key] for key in ("id", "height", "width"))
    with data.refusing(file=file, image=image):  # a file that is not text
        for number, line in label_lines(file):
            place = f"line {number}"
            with data.refusing(file=file, image=image, annotation=place):
                box = _parse_line(f"{file}, {place}", line, classes, height, width)
                data.add({"image_id": image} | box, file, place)


def _parse_line(where: str, line: str, classes: Sequence[str], height: int, width: int) -> dict:
    """The annotation of a line: "class x y width height" or "class x0 y0 x1 y1 x2 y2 ...".

    Returns:
        "category_id", "bbox" and for a polygon "segmentation", as in COCO, in pixels. The box may
        have no area.
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
            f"{where} has the class {number:g}, but there are {len(classes)} classes, from 0 to "
            f"{len(classes) - 1}"
        )
    bad = [x for x in values if not 0 <= x <= 1]  # NaN, too
    if bad:
        raise ValueError(
            f"{where} has {bad[0]:g}, which is not in [0, 1]: coordinates are divided by the width "
            "and height of the image"
        )
    annotation = {"category_id": int(number) + 1}
    if len(values) == 4:
        x, y, w, h = values
        corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    else:
        xs, ys = values[0::2], values[1::2]
        corners = (min(xs), min(ys), max(xs), max(ys))
        annotation["segmentation"] = [_in_pixels(values, height, width)]
    x0, y0, x1, y1 = _in_pixels(corners, height, width)
    return annotation | {"bbox": [x0, y0, x1 - x0, y1 - y0]}


def _in_pixels(values: Sequence[float], height: int, width: int) -> list[float]:
    return [x * (height if i % 2 else width) for i, x in enumerate(values)]
