"""COCO annotation files: reading them as they are, and writing copies without their faults."""

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from os import PathLike, path

from detectron2.utils.file_io import PathManager

from .findings import KINDS, Finding, unsound
from .raw_data import RawData


def read_coco(
    name: str, json_file: str | PathLike, image_root: str, boxes_only: bool = False
) -> RawData:
    """An annotation file.

    Args:
        boxes_only: the file may lack categories and the names of images, which are left out.

    Raises:
        OSError, ValueError: see :func:`parse_coco_json`.
    """
    content = parse_coco_json(json_file, () if boxes_only else ("categories",))
    data = RawData(name, image_root, source=str(json_file), label=_label)
    if boxes_only:
        images = _sound_entries(data, "images", content, ("id", "height", "width"))
        data.images = [image | {"file_name": ""} for image in images]
    else:
        keys = ("id", "file_name", "height", "width")
        data.images = _sound_entries(data, "images", content, keys)
        data.categories = _sound_entries(data, "categories", content, ("id", "name"))
        if not content["categories"]:
            text = f"{data.source} has no categories: list them under 'categories'"
            data.refuse(ValueError(text), file=data.source)
    known = {category["id"] for category in data.categories}
    listed = str(list(known))[:500]  # may be many
    ids = set()
    for i, annotation in enumerate(content["annotations"]):
        place = f"annotations[{i}]"
        number = annotation.get("id") if isinstance(annotation, dict) else None
        try:
            _check_entry(data.source, place, annotation, ("image_id", "category_id", "bbox"))
        except ValueError as error:
            data.refuse(error, file=data.source, annotation=number)
            continue
        number = number if isinstance(number, int | str) else place
        if boxes_only:
            annotation.pop("segmentation", None)
        error = None
        if annotation["category_id"] not in known and not boxes_only:
            error = ValueError(
                f"{data.source}: {_named(annotation, place)} has category_id "
                f"{annotation['category_id']!r}, which 'categories' does not list: {listed}"
            )
        index = data.add(annotation, data.source, number, error)
        if number in ids:
            text = f"{place} has the id of another one"
            data.findings.append(data.finding("annotation id twice", index, text))
        ids.add(number)
    return data


def parse_coco_json(file: str | PathLike, more_lists: Sequence[str] = ("categories",)) -> dict:
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
    for key in ("images", "annotations", *more_lists):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise ValueError(f"{file} is not a COCO annotation file: it has no list {key!r}")
    return data


def load_coco_json(file: str | PathLike) -> list[dict]:
    """The records of an annotation file, without the names of its images and without masks.

    They differ from those of Detectron2's loader in two ways: annotations whose polygons are all
    invalid are kept, since they have a box, and classes keep the numbers of the file.

    Raises:
        OSError, ValueError: for what cannot be read, and what training would refuse.
    """
    data = read_coco("", file, "", boxes_only=True)
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
    return {
        "images": list(images.values()),
        "annotations": annotations,
        "categories": data.categories,
    }


def _sound_entries(data: RawData, key: str, content: dict, wanted: Sequence[str]) -> list[dict]:
    """The entries of a list that have what they must have, and an id of their own."""
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
            error = ValueError(f"{data.source}: {text}")
            data.refuse(error, "id twice", file=data.source)
    return [content[key][i] for i in first.values()]


def _check_entry(file: str, place: str, entry: object, keys: Sequence[str]) -> None:
    """Raise a ValueError unless an entry has valid ``keys``."""
    missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise ValueError(
            f"{file} is not a COCO annotation file: {place} has no {', '.join(missing)}"
        )
    for key in keys:
        value = entry[key]
        if (key == "id" or key.endswith("_id")) and type(value) not in (int, str):
            raise ValueError(f"{file}: {place} has the {key} {value!r}, which is no number")
        if key in ("height", "width") and (type(value) is not int or not 0 < value < 2**31):
            raise ValueError(f"{file}: {place} has the {key} {value!r}: it must be in whole pixels")
        if key in ("file_name", "name") and not isinstance(value, str):
            text = f"{place} has the {key} {value!r}, which is no text: put it in quotes"
            raise ValueError(f"{file}: {text}")
        if key == "bbox" and not _is_box(value):
            raise ValueError(
                f"{file}: {_named(entry, place)} has a bbox that is not [x, y, width, height] in "
                f"numbers: {value}"
            )


def _is_box(x: object) -> bool:
    return isinstance(x, list) and len(x) == 4 and all(map(_is_number, x))


def _is_number(x: object) -> bool:
    return type(x) is float or (type(x) is int and abs(x) < 2**53)  # JSON's have no end


def _named(annotation: dict, place: str) -> str:
    """What messages call an annotation."""
    return f"annotation {annotation['id']}" if "id" in annotation else place


def _label(data: RawData, finding: Finding) -> str:
    named = _named(data.annotations[finding.index], str(finding.annotation))
    return f"{named} of image {finding.image}"


def _has_good_ids(annotations: Sequence[dict]) -> bool:
    """Whether they are numbers, unique, and not 0: pycocotools takes it for no match."""
    ids = [annotation.get("id") for annotation in annotations]
    return all(type(i) is int and i != 0 for i in ids) and len(set(ids)) == len(ids)


def _clipped(bbox: Sequence[float], image: dict) -> list[float]:
    x, y, width, height = bbox
    x0, y0 = max(x, 0), max(y, 0)
    return [x0, y0, min(x + width, image["width"]) - x0, min(y + height, image["height"]) - y0]
