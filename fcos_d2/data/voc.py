"""Data sets in PASCAL VOC layout, with the irregularities that they have in practice."""

import logging
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence

from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import BoxMode

from .image_files import IMAGE_SUFFIXES, image_size


def load_voc(root: str, split: str, classes: Sequence[str]) -> list[dict]:
    """Records of a split, as Detectron2's loader gives them.

    Unlike that loader it reads a split of one image, names with spaces, images in other formats
    than JPEG, and files without ``<size>``, for which it reads the image's header. Boxes without
    area are left out with one warning that names them.

    Args:
        root: the folder with ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.
        split: a file of ``ImageSets/Main`` without ".txt"; each line names an image.
        classes: all names of objects; their order is that of the class numbers.

    Raises:
        OSError: for a missing file.
        ValueError: for a file that cannot be parsed or lacks something, for coordinates that are
            no numbers, and for a class that is not listed; it names the file.
    """
    image_files = find_image_files(root)
    records, left_out = [], []
    for name in split_names(root, split):
        xml_file, image_file, tree = parse_xml(root, name, image_files)
        height, width = image_size_of(xml_file, tree, image_file)
        annotations = []
        for i, element in enumerate(tree.findall("object")):
            category_id, (x0, y0, x1, y1) = parse_object(xml_file, i, element, classes)
            if x1 > x0 and y1 > y0:
                # Corners are pixel numbers from 1, and both pixels belong to the box.
                bbox = [x0 - 1, y0 - 1, x1, y1]
                annotations.append(
                    {"category_id": category_id, "bbox": bbox, "bbox_mode": BoxMode.XYXY_ABS}
                )
            else:
                left_out.append(f"{name} ({x0:g}, {y0:g}, {x1:g}, {y1:g})")
        records.append(
            {
                "file_name": image_file,
                "image_id": name,
                "height": height,
                "width": width,
                "annotations": annotations,
            }
        )
    if left_out:
        logging.getLogger(__name__).warning(
            f"{root}, split {split}: dropped {len(left_out)} box(es) without area, as image "
            f"(xmin, ymin, xmax, ymax): {'; '.join(left_out)}"
        )
    return records


def check_readable_by_pascal_voc_evaluator(root: str, records: Sequence[dict]) -> None:
    """Report what Detectron2's evaluator cannot read, before the training, not after it.

    Raises:
        ValueError: naming the file, and what to do.
    """
    for record in records:
        name = record["image_id"]
        file = annotation_file(root, name)
        if len(name.split()) > 1:
            raise ValueError(
                f"{file}: the PASCAL VOC evaluator cannot read names with spaces. Rename the "
                "image, or set EVALUATOR 'coco' for this data set"
            )
        try:
            parse_rec(file)
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"{file}: the PASCAL VOC evaluator needs <pose>, <truncated>, <difficult> and "
                f"whole-number corners in every object ({error}). Add them, or set EVALUATOR "
                "'coco' for this data set"
            ) from error


def split_names(root: str, split: str) -> list[str]:
    """The images of a split. For a missing file there is an OSError."""
    with open(os.path.join(root, "ImageSets", "Main", f"{split}.txt"), encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def annotation_file(root: str, name: str) -> str:
    """Where the annotations of an image are."""
    return os.path.join(root, "Annotations", f"{name}.xml")


def parse_xml(
    root: str, name: str, image_files: Mapping[str, str]
) -> tuple[str, str, ET.ElementTree]:
    """The annotation file of an image, the image's file, and the content of the first.

    Raises:
        OSError: for a missing annotation file.
        ValueError: for a file that cannot be parsed.
    """
    xml_file = annotation_file(root, name)
    try:
        tree = ET.parse(xml_file)
    except ET.ParseError as error:
        raise ValueError(f"{xml_file} is not an XML file, or is cut short: {error}") from error
    image_file = os.path.join(root, "JPEGImages", image_files.get(name, f"{name}.jpg"))
    return xml_file, image_file, tree


def find_image_files(root: str) -> dict[str, str]:
    """File of each image by its name without suffix; JPEG files come before others."""
    folder = os.path.join(root, "JPEGImages")
    files = os.listdir(folder) if os.path.isdir(folder) else []
    order = {suffix: i for i, suffix in enumerate(IMAGE_SUFFIXES)}
    images = [f for f in files if os.path.splitext(f)[1].lower() in order]
    images.sort(key=lambda f: order[os.path.splitext(f)[1].lower()], reverse=True)
    return {os.path.splitext(f)[0]: f for f in images}


def image_size_of(xml_file: str, tree: ET.ElementTree, image_file: str) -> tuple[int, int]:
    """(height, width) of an image."""
    try:
        return int(tree.findtext("size/height")), int(tree.findtext("size/width"))
    except (TypeError, ValueError):  # TypeError: no such element
        pass
    try:
        return image_size(image_file)
    except OSError as error:
        raise ValueError(
            f"{xml_file} has no <size> with whole numbers, and the image {image_file} cannot be "
            f"read: {error}"
        ) from error


def parse_object(
    xml_file: str, index: int, element: ET.Element, classes: Sequence[str]
) -> tuple[int, list[float]]:
    """Class number and corners as in the file."""
    where = f"{xml_file}: <object> number {index + 1}"
    name = element.findtext("name")
    if name not in classes:
        raise ValueError(
            f"{where} has the <name> {name!r}, which CLASSES does not list: {list(classes)}. It "
            "must list every <name> of the annotations, with the same spelling"
        )
    corners = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        numbers = [float(x) for x in corners]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("not finite")
        return classes.index(name), numbers
    except (TypeError, ValueError) as error:  # TypeError: no such element
        raise ValueError(
            f"{where} has no <bndbox> with four numbers: xmin, ymin, xmax, ymax are {corners}"
        ) from error
