"""COCO annotation files: reading them as they are, and writing copies without their faults."""

import json
import tempfile
from collections.abc import Collection, Sequence
from functools import cache
from os import PathLike, path

from detectron2.utils.file_io import PathManager

from .findings import KINDS, Finding, unsound
from .raw_data import RawData, UnknownCategory

# What is valid, and what messages say of anything else.
_ID = (lambda x: type(x) in (int, str), ", which is no number")
_PIXELS = (lambda x: type(x) is int and 0 < x < 2**31, ": it must be in whole pixels")
_TEXT = (lambda x: isinstance(x, str), ", which is no text: put it in quotes")
_RULES = {"id": _ID, "image_id": _ID, "category_id": _ID, "height": _PIXELS, "width": _PIXELS}
_RULES |= {"file_name": _TEXT, "name": _TEXT}


def read_coco(name: str, json_file: str | PathLike, image_root: str) -> RawData:
    """An annotation file.

    Raises:
        OSError, ValueError: see :func:`parse_coco_json`.
    """
    content = parse_coco_json(json_file)
    data = RawData(name, image_root, source=str(json_file), label=_label)
    keys = ("id", "file_name", "height", "width")
    data.images = _sound_entries(data, "images", content, keys)
    data.categories = _sound_entries(data, "categories", content, ("id", "name"))
    if not content["categories"]:
        text = f"{data.source} has no categories: list them under 'categories'"
        data.refuse(ValueError(text), file=data.source)
    _read_annotations(data, content, {category["id"] for category in data.categories})
    return data


def parse_coco_json(
    file: str | PathLike, lists: Sequence[str] = ("images", "annotations", "categories")
) -> dict:
    """The content of an annotation file, which has the ``lists``; no entry is checked.

    Raises:
        OSError: for a missing file.
        ValueError: for a file that is not JSON or cut short, or lacks a list.
    """
    with PathManager.open(str(file), "r", encoding="utf-8") as f:
        try:
            data = json.load(f)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not a JSON file, or is cut short: {error}") from error
    for key in lists:
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise ValueError(f"{file} is not a COCO annotation file: it has no list {key!r}")
    return data


def load_coco_json(file: str | PathLike) -> list[dict]:
    """The records of an annotation file, without the names of its images and without masks.

    They differ from those of Detectron2's loader in two ways: annotations whose polygons are all
    invalid are kept, since they have a box, and classes keep the numbers of the file, which need
    not list them.

    Raises:
        OSError, ValueError: for what cannot be read, and what training would refuse.
    """
    content = parse_coco_json(file, ("images", "annotations"))
    data = RawData("", "", source=str(file), label=_label)
    images = _sound_entries(data, "images", content, ("id", "height", "width"))
    data.images = [image | {"file_name": ""} for image in images]
    _read_annotations(data, content, None)
    for annotation in data.annotations:
        annotation.pop("segmentation", None)
    return data.records(unsound(data.dropped()))[0]


def training_file(data: RawData, is_part: bool = False) -> str:
    """The annotation file that a data set is trained and evaluated with: its own, or a copy of it.

    A copy has no annotations that cannot be learnt, and has what the evaluation needs: "iscrowd",
    "area", and unique numbers in "id", none of them 0, which pycocotools takes for "no match".

    Args:
        is_part: whether the file has more images than the data set.

    Raises:
        ValueError: about the first entry that training refuses.
    """
    findings = data.dropped()
    is_complete = all("area" in a and "iscrowd" in a for a in data.annotations)
    if is_complete and _has_good_ids(data.annotations) and not findings and not is_part:
        return data.source
    # mkstemp: two data sets of one name in turn must not share a file that is still read.
    prefix = f"{path.basename(data.name)}_"
    handle, file = tempfile.mkstemp(".json", prefix, _folder_of_copies().name)
    with open(handle, "w", encoding="utf-8") as f:
        json.dump(cleaned(data, findings), f)
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
            annotation["bbox"] = _clipped(annotation["bbox"], images[annotation["image_id"]])
            annotation.pop("area", None)
        _, _, width, height = annotation["bbox"]
        annotations.append({"area": width * height} | annotation)
    if not _has_good_ids(annotations):
        annotations = [a | {"id": i + 1} for i, a in enumerate(annotations)]
    lists = {"images": list(images.values()), "annotations": annotations}
    return lists | {"categories": data.categories}


def _sound_entries(data: RawData, key: str, content: dict, wanted: Sequence[str]) -> list[dict]:
    """The entries of a list that have valid ``wanted`` keys and an id of their own."""
    first: dict[int | str, int] = {}
    for i, entry in enumerate(content[key]):
        try:
            _check_entry(data.source, f"{key}[{i}]", entry, wanted)
        except ValueError as error:
            data.refuse(error, file=data.source)
            continue
        other = first.setdefault(entry["id"], i)
        if other != i:
            text = f"{key}[{other}] and {key}[{i}] have the same id {entry['id']!r}"
            data.refuse(ValueError(f"{data.source}: {text}"), "id twice", file=data.source)
    return [content[key][i] for i in first.values()]


def _read_annotations(data: RawData, content: dict, known: Collection | None) -> None:
    """Add the annotations.

    Args:
        known: the ids of the categories, or None for any.
    """
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
        except ValueError as error:
            data.refuse(error, file=data.source, image=image, annotation=number)
            continue
        data.add(annotation, data.source, place if number is None else number)
        if number in ids:
            text = f"{place} has the id of another one"
            finding = Finding("annotation id twice", data.source, text, image, number)
            data.findings.append(finding)
        elif number is not None:
            ids.add(number)


def _check_entry(file: str, place: str, entry: object, keys: Sequence[str]) -> None:
    """Raise a ValueError unless an entry has ``keys``, with valid values."""
    missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise ValueError(
            f"{file} is not a COCO annotation file: {place} has no {', '.join(missing)}"
        )
    for key in keys:
        if key in _RULES:
            is_valid, fault = _RULES[key]
            if not is_valid(entry[key]):
                raise ValueError(f"{file}: {place} has the {key} {entry[key]!r}{fault}")


def _id_of(entry: object, key: str) -> int | str | None:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if type(value) in (int, str) else None


def _is_box(bbox: object) -> bool:
    return isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_number, bbox))


def _is_number(x: object) -> bool:
    return type(x) is float or (type(x) is int and abs(x) < 2**53)  # JSON's have no limit


def _label(finding: Finding) -> str:
    word = "" if str(finding.annotation).startswith("annotations[") else "annotation "
    return f"{word}{finding.annotation} of image {finding.image}"


def _has_good_ids(annotations: Sequence[dict]) -> bool:
    """Whether they are numbers, unique, and not 0: pycocotools takes it for no match."""
    ids = [annotation.get("id") for annotation in annotations]
    return all(type(i) is int and i != 0 for i in ids) and len(set(ids)) == len(ids)


def _clipped(bbox: Sequence[float], image: dict) -> list[float]:
    x, y, width, height = bbox
    x0, y0 = max(x, 0), max(y, 0)
    return [x0, y0, min(x + width, image["width"]) - x0, min(y + height, image["height"]) - y0]
