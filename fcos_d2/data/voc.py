"""Data sets in PASCAL VOC layout, with the irregularities that they have in practice."""

import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from contextlib import suppress

from detectron2.evaluation.pascal_voc_evaluation import parse_rec

from .image_files import IMAGE_SUFFIXES, image_size
from .raw_data import RawData, UnknownCategory


def read_voc(name: str, root: str, split: str, classes: Sequence[str]) -> RawData:
    """A split in VOC layout.

    Unlike Detectron2's loader it reads a split of one image, names with spaces, images in other
    formats than JPEG, and files without ``<size>``, for which it reads the header of the image.

    Args:
        root: the folder with ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.
        split: a file of ``ImageSets/Main`` without ".txt"; each line names an image. If there is
            none, this is an OSError.
        classes: all names of objects, in the order of the class numbers.
    """
    data = RawData(name, os.path.join(root, "JPEGImages"), source=f"{root}, split {split}")
    return _read(data, files_of_split(root, split), classes)


def read_xml(name: str, folder: str, images: str, classes: Sequence[str]) -> RawData:
    """All files of VOC's format in a folder, with the images of the same names in another one.

    Like :func:`read_voc` in all else; without a file, it is a ValueError.
    """
    files = xml_files(folder)
    if not files:
        raise ValueError(f"{folder} has no .xml files")
    return _read(RawData(name, images, source=folder), files, classes)


def xml_files(folder: str) -> list[str]:
    """The paths of the .xml files in a folder, by name."""
    names = sorted(n for n in os.listdir(folder) if n.lower().endswith(".xml") and n[0] != ".")
    return [os.path.join(folder, name) for name in names]


def _read(data: RawData, files: Sequence[str], classes: Sequence[str]) -> RawData:
    labels: dict[tuple[str, str], str] = {}  # by image and object, with the corners of the file
    data.label = lambda finding: labels[finding.image, finding.annotation]
    data.categories = [{"id": i + 1, "name": str(c)} for i, c in enumerate(classes)]
    image_files = find_image_files(data.image_root)
    for xml_file in files:
        image = os.path.splitext(os.path.basename(xml_file))[0]
        file_name = image_files.get(image, f"{image}.jpg")
        with data.refusing(file=xml_file, image=image):
            tree = _parse_xml(xml_file)
            size = _image_size(xml_file, tree, os.path.join(data.image_root, file_name))
            data.add_image(image, file_name, size)
            for i, element in enumerate(tree.findall("object")):
                where, place = f"{xml_file}: <object> number {i + 1}", f"object {i + 1}"
                with data.refusing(file=xml_file, image=image, annotation=place):
                    corners = _corners(where, element)
                    labels[image, place] = f"{image} ({', '.join(f'{x:g}' for x in corners)})"
                    x0, y0, x1, y1 = corners
                    # The corners are numbers of pixels, from 1, and both belong to the box. But if
                    # they are the same, it has no area.
                    bbox = [x0 - 1, y0 - 1, x1 - x0 + (x1 > x0), y1 - y0 + (y1 > y0)]
                    category = _category(where, element, classes)
                    annotation = {"image_id": image, "category_id": category, "bbox": bbox}
                    data.add(annotation, xml_file, place)
    return data


def check_readable_by_pascal_voc_evaluator(root: str, records: Sequence[dict]) -> None:
    """Raise a ValueError for a file that Detectron2's evaluator cannot read."""
    for name in (record["image_id"] for record in records):
        file = _annotation_file(root, name)
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


def files_of_split(root: str, split: str) -> list[str]:
    """The annotation file of each image of a split in VOC layout."""
    return [_annotation_file(root, image) for image in dict.fromkeys(_names(root, split))]


def names_of_objects(files: Iterable[str]) -> list[str]:
    """The names of the objects in files, sorted. Files that cannot be read are left out."""
    names = set()
    for file in files:
        with suppress(OSError, ValueError):
            objects = _parse_xml(file).findall("object")
            names |= {element.findtext("name") or "" for element in objects}
    return sorted(names)


def _names(root: str, split: str) -> list[str]:
    with open(os.path.join(root, "ImageSets", "Main", f"{split}.txt"), encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def _annotation_file(root: str, name: str) -> str:
    return os.path.join(root, "Annotations", f"{name}.xml")


def _parse_xml(file: str) -> ET.ElementTree:
    try:
        return ET.parse(file)
    except ET.ParseError as error:
        raise ValueError(f"{file} is not an XML file, or is cut short: {error}") from error


def find_image_files(folder: str) -> dict[str, str]:
    """The file of each image by its name without suffix; JPEG files come before others."""
    files = os.listdir(folder) if os.path.isdir(folder) else []
    found = {}
    for suffix in reversed(IMAGE_SUFFIXES):
        found |= {os.path.splitext(f)[0]: f for f in files if f.lower().endswith(suffix)}
    return found


def _image_size(xml_file: str, tree: ET.ElementTree, image_file: str) -> tuple[int, int]:
    """(height, width) of an image."""
    with suppress(TypeError, ValueError):  # TypeError: no such element
        return int(tree.findtext("size/height")), int(tree.findtext("size/width"))
    try:
        return image_size(image_file)
    except OSError as error:
        raise ValueError(
            f"{xml_file} has no <size> with whole numbers, and the image {image_file} cannot be "
            f"read: {error}"
        ) from error


def _category(where: str, element: ET.Element, classes: Sequence[str]) -> int:
    name = element.findtext("name")
    if name not in classes:
        raise UnknownCategory(
            f"{where} has the <name> {name!r}, which CLASSES does not list: {list(classes)}. It "
            "must list every <name> of the annotations, with the same spelling"
        )
    return list(classes).index(name) + 1


def _corners(where: str, element: ET.Element) -> list[float]:
    """xmin, ymin, xmax, ymax as in the file."""
    corners = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    with suppress(TypeError, ValueError):  # TypeError: no such element
        numbers = [float(x) for x in corners]
        if all(map(math.isfinite, numbers)):
            return numbers
    raise ValueError(
        f"{where} has no <bndbox> with four numbers: xmin, ymin, xmax, ymax are {corners}"
    )
