"""COCO annotation files: reading them as they are, and writing copies without their faults."""

import json
import logging
import tempfile
from collections.abc import Collection, Sequence
from functools import cache
from os import PathLike, path

import numpy as np
from detectron2.utils.file_io import PathManager
from pycocotools import mask

from .findings import KINDS, Finding, unsound
from .raw_data import RawData, UnknownCategory, garbage_collection_paused

# What is valid, and what messages say of anything else.
_ID = (lambda x: type(x) in (int, str), ", which is no number")
_PIXELS = (lambda x: type(x) is int and 0 < x < 2**31, ": it must be in whole pixels")
_TEXT = (lambda x: isinstance(x, str), ", which is no text: put it in quotes")
_RULES = {"id": _ID, "image_id": _ID, "category_id": _ID, "height": _PIXELS, "width": _PIXELS}
_RULES |= {"file_name": _TEXT, "name": _TEXT}


@garbage_collection_paused()
def read_coco(name: str, json_file: str | PathLike, image_root: str) -> RawData:
    """An annotation file. Images and categories are sorted by their ids, as Detectron2 does it.

    A file that is not there is an OSError; one that is not in COCO's format is a ValueError.
    """
    content = _parse(json_file, ("images", "annotations", "categories"))
    data = RawData(name, image_root, source=str(json_file), label=_label)
    keys = ("id", "file_name", "height", "width")
    data.images = _sound_entries(data, "images", content, keys)
    data.categories = _sound_entries(data, "categories", content, ("id", "name"))
    if not content["categories"]:
        text = f"{data.source} has no categories: list them under 'categories'"
        data.refuse(ValueError(text), file=data.source)
    _read_annotations(data, content, {category["id"] for category in data.categories})
    return data


def load_coco_json(file: str | PathLike) -> list[dict]:
    """The records of an annotation file, without the names of its images and without masks.

    Unlike Detectron2's loader it keeps annotations whose polygons are all invalid, since they have
    a box. Classes keep the numbers of the file, which need not list them. What training refuses is
    an OSError or a ValueError.
    """
    data = RawData("", "", source=str(file), label=_label)
    content = _parse(file, ("images", "annotations"))
    images = _sound_entries(data, "images", content, ("id", "height", "width"))
    data.images = [image | {"file_name": ""} for image in images]
    _read_annotations(data, content, None)
    for annotation in data.annotations:
        annotation.pop("segmentation", None)
    return data.records(unsound(data.dropped()))


def training_records(data: RawData, findings: Sequence[Finding]) -> list[dict]:
    """The records of Detectron2's ``load_coco_json``, with floating-point coordinates.

    As there, an annotation is left out if its polygons all have fewer than three corners. The
    ``findings`` are those of :meth:`RawData.dropped`.
    """
    records, left_out = data.records(unsound(findings)), 0
    for record in records:
        annotations = record["annotations"]
        try:
            record["annotations"] = [a for a in annotations if _convert(a)]
        except Exception as error:  # of many kinds, of NumPy and of pycocotools
            raise ValueError(
                f"{data.source}: image {record['image_id']!r} has a segmentation that is neither a "
                f"list of polygons nor a run-length code, or keypoints that are no numbers: {error}"
            ) from error
        left_out += len(annotations) - len(record["annotations"])
    if left_out:
        logging.getLogger(__name__).warning(
            f"{data.source}: left out {left_out} annotation(s) without a polygon of three corners"
        )
    return records


def _convert(annotation: dict) -> bool:
    """Convert an annotation of a record, in place. False: none of its polygons is valid."""
    annotation.setdefault("iscrowd", 0)
    # Sums are new objects. The old ones would keep the blocks of memory that they are in, so that
    # the memory of the file could not be given back.
    annotation["bbox"] = [x + 0.0 for x in annotation["bbox"]]
    if annotation.get("keypoints"):  # from the numbers of pixels to their centres
        numbers = enumerate(annotation["keypoints"])
        annotation["keypoints"] = [x if i % 3 == 2 else x + 0.5 for i, x in numbers]
    found = annotation.pop("segmentation", None)
    if isinstance(found, list) and found:
        polygons = [p for p in found if len(p) % 2 == 0 and len(p) >= 6]
        annotation["segmentation"] = [np.asarray(p, dtype=np.float64) for p in polygons]
        return len(polygons) > 0
    if found:
        is_list = isinstance(found["counts"], list)
        annotation["segmentation"] = mask.frPyObjects(found, *found["size"]) if is_list else found
    return True


def can_be_evaluated(data: RawData, findings: Sequence[Finding]) -> bool:
    """Whether COCO's evaluation can take the file: it needs "area", "iscrowd" and unique ids."""
    is_complete = all("area" in a and "iscrowd" in a for a in data.annotations)
    return is_complete and _has_good_ids(data.annotations) and not findings


def write_repaired(data: RawData, findings: Sequence[Finding]) -> str:
    """Write an annotation file for COCO's evaluation; returns its path."""
    # mkstemp: two data sets of one name in turn must not share a file that is still read.
    prefix = f"{path.basename(data.name)}_"
    handle, file = tempfile.mkstemp(".json", prefix, _folder_of_copies().name)
    with open(handle, "w", encoding="utf-8") as f:
        f.write(json.dumps(cleaned(data, findings)))  # json.dump takes three times as long
    return file


@cache
def _folder_of_copies() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="fcos_d2_annotations_")


def cleaned(data: RawData, findings: Sequence[Finding]) -> dict:
    """The content of a COCO annotation file without what the findings say is wrong.

    Images and annotations with an error are left out, boxes beyond the edge are clipped, boxes that
    are there twice are kept once, and annotations are numbered anew if their ids are not unique.
    """
    bad_images = {f.image for f in findings if KINDS[f.kind].repair == "image"}
    clip = {f.index for f in findings if KINDS[f.kind].repair == "clip"}
    bad = unsound(findings)
    images = {image["id"]: image for image in data.images if image["id"] not in bad_images}
    annotations = []
    for i, annotation in enumerate(data.annotations):
        if i in bad or annotation["image_id"] not in images:
            continue
        annotation = {"iscrowd": 0} | annotation
        if i in clip:
            (x, y, width, height), image = annotation["bbox"], images[annotation["image_id"]]
            right, bottom = min(x + width, image["width"]), min(y + height, image["height"])
            x, y = max(x, 0), max(y, 0)
            annotation["bbox"] = [x, y, right - x, bottom - y]
            annotation.pop("area", None)
        _, _, width, height = annotation["bbox"]
        annotations.append({"area": width * height} | annotation)
    if not _has_good_ids(annotations):
        annotations = [a | {"id": i + 1} for i, a in enumerate(annotations)]
    lists = {"images": list(images.values()), "annotations": annotations}
    return lists | {"categories": data.categories}


def _parse(file: str | PathLike, lists: Sequence[str]) -> dict:
    """The content of an annotation file, which has the ``lists``; no entry is checked."""
    with PathManager.open(str(file), "r", encoding="utf-8") as f:
        try:
            data = json.load(f)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not a JSON file, or is cut short: {error}") from error
    for key in lists:
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise ValueError(f"{file} is not a COCO annotation file: it has no list {key!r}")
    return data


def _sound_entries(data: RawData, key: str, content: dict, wanted: Sequence[str]) -> list[dict]:
    """The entries of a list that have valid ``wanted`` keys and an id of their own, by id."""
    first: dict[int | str, int] = {}
    for i, entry in enumerate(content[key]):
        with data.refusing(file=data.source):
            _check_entry(data.source, f"{key}[{i}]", entry, wanted)
            other = first.setdefault(entry["id"], i)
            if other != i:
                text = f"{key}[{other}] and {key}[{i}] have the same id {entry['id']!r}"
                data.refuse(ValueError(f"{data.source}: {text}"), "id twice", file=data.source)
    numbers = sorted(first, key=lambda number: (isinstance(number, str), number))
    return [content[key][first[number]] for number in numbers]


def _read_annotations(data: RawData, content: dict, known: Collection | None) -> None:
    """Add the annotations. ``known`` are the ids of the categories, or None for any."""
    listed = str(list(known or ()))[:500]  # may be many
    ids = set()
    for i, annotation in enumerate(content["annotations"]):
        place = f"annotations[{i}]"
        number, image = _id_of(annotation, "id"), _id_of(annotation, "image_id")
        named = f"{data.source}: {place if number is None else f'annotation {number}'}"
        try:
            _check_entry(data.source, place, annotation, ("image_id", "category_id", "bbox"))
            bbox, category = annotation["bbox"], annotation["category_id"]
            if not _is_box(bbox):
                text = f"a bbox that is not [x, y, width, height] in numbers: {bbox}"
                raise ValueError(f"{named} has {text}")
            if known is not None and category not in known:
                text = f"category_id {category!r}, which 'categories' does not list: {listed}"
                raise UnknownCategory(f"{named} has {text}")
            if annotation.get("ignore"):
                raise ValueError(f"{named} has 'ignore', which is not supported: use 'iscrowd'")
        except ValueError as error:
            data.refuse(error, file=data.source, image=image, annotation=number)
            continue
        data.add(annotation, data.source, place if number is None else number)
        if number in ids:
            kind, text = "annotation id twice", f"{place} has the id of another one"
            data.findings.append(Finding(kind, data.source, text, image, number))
        elif number is not None:
            ids.add(number)


def _check_entry(file: str, place: str, entry: object, keys: Sequence[str]) -> None:
    """Raise a ValueError unless an entry has ``keys``, with valid values."""
    missing = ", ".join(key for key in keys if not isinstance(entry, dict) or key not in entry)
    if missing:
        raise ValueError(f"{file} is not a COCO annotation file: {place} has no {missing}")
    for key in keys:
        if key in _RULES:
            is_valid, fault = _RULES[key]
            if not is_valid(entry[key]):
                raise ValueError(f"{file}: {place} has the {key} {entry[key]!r}{fault}")


def _id_of(entry: object, key: str) -> int | str | None:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if type(value) in (int, str) else None


def _is_box(bbox: object) -> bool:
    """Whether it is a list of four numbers. JSON sets whole ones no limit, a float does."""
    return (isinstance(bbox, list) and len(bbox) == 4) and all(
        type(x) is float or (type(x) is int and abs(x) < 2**53) for x in bbox
    )


def _label(finding: Finding) -> str:
    word = "" if str(finding.annotation).startswith("annotations[") else "annotation "
    return f"{word}{finding.annotation} of image {finding.image}"


def _has_good_ids(annotations: Sequence[dict]) -> bool:
    """Whether they are numbers, unique, and not 0, which pycocotools takes for no match."""
    ids = [annotation.get("id") for annotation in annotations]
    return all(type(i) is int and i != 0 for i in ids) and len(set(ids)) == len(ids)
