"""COCO annotation files, checked: what is wrong with one is said before anything trains on it."""

import json
import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from os import PathLike, path

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

_NAMED = 10  # entries of a kind that a message names

# Cleaned copies of annotation files. Removed when the process ends.
_copies: tempfile.TemporaryDirectory | None = None


def coco_loader(
    json_file: str,
    image_root: str,
    name: str,
    classes: Sequence[str] | None = None,
    keep: Callable[[str], bool] | None = None,
) -> Callable[[], list[dict]]:
    """A function that loads a data set with Detectron2's loader, from a checked file.

    A file that had to be cleaned is loaded, and later evaluated, from a copy of it. If ``classes``
    are given, another list in the file is a ValueError. With ``keep``, only images whose
    "file_name" it accepts are loaded, and evaluated.
    """
    source: str | None = None

    def load() -> list[dict]:
        nonlocal source
        if source is None:
            data, is_changed = read_coco_json(json_file)
            found = [c["name"] for c in sorted(data["categories"], key=lambda c: c["id"])]
            if classes is not None and found != list(classes):
                raise ValueError(
                    f"{json_file} has the classes {found}, but CLASSES of the data set {name!r} "
                    f"are {list(classes)}. Remove CLASSES, or take the file that they are of"
                )
            if keep is not None:
                data["images"] = [i for i in data["images"] if keep(str(i["file_name"]))]
                ids = {image["id"] for image in data["images"]}
                data["annotations"] = [a for a in data["annotations"] if a["image_id"] in ids]
                is_changed = True
            source = _write_copy(name, data) if is_changed else json_file
            # The COCO evaluator reads this file.
            MetadataCatalog.get(name).set(json_file=source)
        return load_coco_json(source, image_root, name)

    return load


def read_coco_json(
    file: str | PathLike,
    image_keys: Sequence[str] = ("id", "file_name", "height", "width"),
    has_categories: bool = True,
) -> tuple[dict, bool]:
    """The content of an annotation file, checked and cleaned.

    Annotations that cannot be learnt are left out, with one warning that names them: boxes without
    area, negative or not finite, and annotations of images that the file does not list. What the
    evaluation needs and can be worked out is filled in: "iscrowd", "area", and unique numbers in
    "id", none of them 0, which pycocotools takes for "no match".

    Args:
        image_keys: what every image must have.
        has_categories: whether the file must have categories, and its annotations one of them.

    Returns:
        the content, and whether it differs from the file's.

    Raises:
        ValueError: for a file that is not JSON or cut short, or for an entry that lacks something,
            has no valid form, an unknown category, or an id that an image or category before it
            has. The message names the file and the entry.
    """
    data = parse_coco_json(file, has_categories)
    _check_entries(file, "images", data["images"], image_keys)
    _check_unique(file, "images", data["images"])
    if has_categories:
        if not data["categories"]:
            raise ValueError(f"{file} has no categories: list them under 'categories'")
        _check_entries(file, "categories", data["categories"], ("id", "name"))
        _check_unique(file, "categories", data["categories"])
    _check_entries(file, "annotations", data["annotations"], ("image_id", "category_id", "bbox"))
    _check_boxes(file, data["annotations"])
    if has_categories:
        _check_categories(file, data)

    annotations = _leave_out_bad(file, data)
    is_changed = len(annotations) < len(data["annotations"])
    annotations, is_filled_in = _fill_in(annotations)
    return {**data, "annotations": annotations}, is_changed or is_filled_in


def parse_coco_json(file: str | PathLike, has_categories: bool = True) -> dict:
    """The content of an annotation file, of which only the lists were looked for.

    Raises:
        OSError: for a missing file.
        ValueError: for a file that is not JSON or cut short, or lacks a list.
    """
    with PathManager.open(str(file), "r", encoding="utf-8") as f:
        try:
            data = json.load(f)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not a JSON file, or is cut short: {error}") from error
    for key in ("images", "annotations", *(("categories",) if has_categories else ())):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise ValueError(f"{file} is not a COCO annotation file: it has no list {key!r}")
    return data


def _check_entries(file, name: str, entries: list, keys: Iterable[str]) -> None:
    for i, entry in enumerate(entries):
        check_entry(file, name, i, entry, keys)


def check_entry(file, name: str, i: int, entry: object, keys: Iterable[str]) -> None:
    """Raise a ValueError unless entry ``i`` of the list ``name`` has valid ``keys``."""
    missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise ValueError(
            f"{file} is not a COCO annotation file: {name}[{i}] has no {', '.join(missing)}"
        )
    for key in keys:
        value = entry[key]
        if (key == "id" or key.endswith("_id")) and type(value) not in (int, str):
            raise ValueError(f"{file}: {name}[{i}] has the {key} {value!r}, which is no number")
        if key in ("height", "width") and (type(value) is not int or not 0 < value < 2**31):
            raise ValueError(
                f"{file}: {name}[{i}] has the {key} {value!r}: it must be in whole pixels"
            )


def _check_boxes(file, annotations: list[dict]) -> None:
    for i, annotation in enumerate(annotations):
        check_box(file, annotation, i)


def check_box(file, annotation: dict, i: int) -> None:
    """Raise a ValueError unless the box of annotation number ``i`` is four numbers."""
    bbox = annotation["bbox"]
    numbers = [_is_number(x) for x in bbox] if isinstance(bbox, list) else []
    if len(numbers) != 4 or not all(numbers):
        raise ValueError(
            f"{file}: {named(annotation, i)} has a bbox that is not [x, y, width, height] in "
            f"numbers: {bbox}"
        )


def _is_number(x: object) -> bool:
    return type(x) is float or (type(x) is int and abs(x) < 2**53)  # JSON's have no end


def _check_unique(file, name: str, entries: list[dict]) -> None:
    first: dict = {}
    for i, entry in enumerate(entries):
        if entry["id"] in first:
            raise ValueError(
                f"{file}: {name}[{first[entry['id']]}] and {name}[{i}] have the same id "
                f"{entry['id']!r}"
            )
        first[entry["id"]] = i


def _check_categories(file, data: dict) -> None:
    known = {category["id"] for category in data["categories"]}
    for i, annotation in enumerate(data["annotations"]):
        if annotation["category_id"] not in known:
            raise ValueError(
                f"{file}: {named(annotation, i)} has category_id {annotation['category_id']!r}, "
                f"which 'categories' does not list: {sorted(known)}"
            )


def _leave_out_bad(file, data: dict) -> list[dict]:
    images = {image["id"] for image in data["images"]}
    kept, left_out = [], defaultdict(list)
    for i, annotation in enumerate(data["annotations"]):
        if annotation["image_id"] not in images:
            problem = "of images that the file does not list"
        else:
            problem = fault_of_box(annotation["bbox"])
            problem = problem and f"with {problem}"
        if problem is None:
            kept.append(annotation)
            continue
        left_out[problem].append(f"{named(annotation, i)} of image {annotation['image_id']}")
    if left_out:
        parts = [
            f"{len(names)} {problem} ({', '.join(names[:_NAMED])}"
            f"{', ...' if len(names) > _NAMED else ''})"
            for problem, names in left_out.items()
        ]
        logging.getLogger(__name__).warning(f"{file}: left out annotations: {'; '.join(parts)}")
    return kept


def fault_of_box(bbox: Sequence[float]) -> str | None:
    """Why a box [x, y, width, height] cannot be learnt, or None."""
    _, _, width, height = bbox
    if not all(map(math.isfinite, bbox)):
        return "NaN or infinity in the box"
    if width < 0 or height < 0:
        return "a negative width or height"
    if width == 0 or height == 0:
        return "a box without area"
    return None


def _fill_in(annotations: list[dict]) -> tuple[list[dict], bool]:
    """The annotations with "id", "area" and "iscrowd", and whether any of them was missing."""
    ids_are_good = has_good_ids(annotations)
    complete = []
    for i, annotation in enumerate(annotations):
        _, _, width, height = annotation["bbox"]
        numbered = {} if ids_are_good else {"id": i + 1}
        complete.append({"area": width * height, "iscrowd": 0} | annotation | numbered)
    return complete, complete != annotations


def has_good_ids(annotations: Sequence[dict]) -> bool:
    """Whether they are numbers, unique, and not 0: pycocotools takes it for no match."""
    ids = [annotation.get("id") for annotation in annotations]
    return all(type(i) is int and i != 0 for i in ids) and len(set(ids)) == len(ids)


def named(annotation: dict, index: int) -> str:
    """What messages call an annotation."""
    return f"annotation {annotation['id']}" if "id" in annotation else f"annotations[{index}]"


def _write_copy(name: str, data: dict) -> str:
    global _copies
    if _copies is None:
        _copies = tempfile.TemporaryDirectory(prefix="fcos_d2_annotations_")
    # mkstemp: two data sets of one name in turn must not share a file that is still read.
    handle, file = tempfile.mkstemp(".json", f"{path.basename(name)}_", _copies.name)
    with open(handle, "w", encoding="utf-8") as f:
        json.dump(data, f)
    return file
