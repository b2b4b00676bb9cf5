"""Checks that need no pixels, and the cleaned copy of a data set."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.structures import BoxMode

from ..classes import how_they_differ
from ..coco import fault_of_box, has_good_ids
from .findings import KINDS, Finding, RawData
from .reading import read_records

# Pixels by which a box may reach beyond the image: corners are rounded in many ways.
_TOLERANCE = 1.0
# IoU of two boxes of one class that may be one object.
_SAME = 0.8


def check_annotations(data: RawData, nearly_twice: bool = True) -> list[Finding]:
    """What is wrong with the boxes and classes of a data set, without those found in reading it.

    Args:
        nearly_twice: also compare each box with all others of its image, which takes most of the
            time.
    """
    images = {image["id"]: image for image in data.images}
    names = {category["id"]: category["name"] for category in data.categories}
    findings = []
    first: dict[tuple, int] = {}
    sound = defaultdict(list)  # by image, without those that are there twice
    for i, annotation in enumerate(data.annotations):
        kind, text = _fault(annotation, images, names)
        if kind:
            findings.append(data.finding(kind, i, text))
        if KINDS[kind].repair == "annotation" if kind else False:
            continue
        is_crowd = annotation.get("iscrowd", 0)
        if is_crowd:
            findings.append(data.finding("crowd", i, "left out of training"))
        box = (annotation["image_id"], *(round(x, 2) for x in annotation["bbox"]))
        other = first.setdefault(box, i)
        if other != i:
            of_class = data.annotations[other]["category_id"]
            same = of_class == annotation["category_id"]
            kind = "box twice" if same else "box twice, of two classes"
            text = f"the same box as {data.places[other][1]}"
            text += "" if same else f", which is a {names[of_class]}"
            findings.append(data.finding(kind, i, text))
        elif not is_crowd:
            sound[annotation["image_id"]].append(i)
    for indices in sound.values() if nearly_twice else ():
        findings += _nearly_twice(data, indices)
    return [*findings, *_about_images(data), *_about_classes(data)]


def summary(name: str, records: Sequence[dict], classes: Sequence[str]) -> str:
    """What is wrong with records in Detectron2's format, in one line: all that takes little time.

    Records that do not say the size of their image are left out.

    Args:
        classes: their names; any number is one if there are none.
    """
    records = [r for r in records if "height" in r and "width" in r]
    if not classes:
        numbers = {a["category_id"] for r in records for a in r.get("annotations", ())}
        classes = range(max(numbers, default=-1) + 1)
    data = read_records(name, records, classes)
    findings = check_annotations(data, nearly_twice=False)
    kinds = Counter(f.kind for f in findings if f.severity != "note")
    found = ", ".join(f"{kind} ({number})" for kind, number in kinds.most_common())
    return f"{name}: {len(data.images)} images, {len(data.annotations)} boxes; " + (
        f"{found}: tools/check_dataset.py says where" if found else "their annotations are fine"
    )


def check_sets(sets: Sequence[RawData]) -> list[Finding]:
    """Data sets that are to be trained and tested with together: whether classes are the same."""
    findings = []
    names = [[c["name"] for c in sorted(d.categories, key=_order)] for d in sets]
    for data, theirs in zip(sets[1:], names[1:], strict=True):
        if theirs != names[0]:
            how = how_they_differ(theirs, names[0])
            text = f"{data.name} has {theirs}, {how} {sets[0].name}: {names[0]}"
            findings.append(Finding("other classes than the first set", data.name, text[:1000]))
    return findings


def cleaned(data: RawData, findings: Sequence[Finding]) -> dict:
    """The content of a COCO annotation file without what the findings say is wrong.

    Images and annotations with an error are left out, boxes beyond the edge are clipped, boxes that
    are there twice are kept once, and annotations are numbered anew if their ids are not unique.
    """
    repairs = [(KINDS[f.kind].repair, f) for f in findings]
    bad_images = {f.image for repair, f in repairs if repair == "image"}
    bad = {f.index for repair, f in repairs if repair == "annotation"}
    clip = {f.index for repair, f in repairs if repair == "clip"}
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
    if not has_good_ids(annotations):
        annotations = [a | {"id": i + 1} for i, a in enumerate(annotations)]
    return {
        "images": list(images.values()),
        "annotations": annotations,
        "categories": data.categories,
    }


def to_records(data: RawData, findings: Sequence[Finding]) -> tuple[list[dict], list[list[int]]]:
    """The sound annotations as records in Detectron2's format, and their indices in ``data``."""
    bad = {f.index for f in findings if KINDS[f.kind].repair == "annotation"}
    numbers = {c["id"]: i for i, c in enumerate(sorted(data.categories, key=_order))}
    records = {
        image["id"]: {"height": image["height"], "width": image["width"], "annotations": []}
        for image in data.images
    }
    indices: dict = {image: [] for image in records}
    for i, annotation in enumerate(data.annotations):
        if i not in bad and not annotation.get("iscrowd", 0):
            image = annotation["image_id"]
            records[image]["annotations"].append(
                {
                    "bbox": annotation["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": numbers[annotation["category_id"]],
                }
            )
            indices[image].append(i)
    return list(records.values()), list(indices.values())


def _fault(annotation: dict, images: dict, names: dict) -> tuple[str, str]:
    """The worst fault of an annotation and its details; empty if there is none."""
    if annotation["category_id"] not in names:
        return "unknown category", f"{annotation['category_id']!r} is not listed"
    if annotation["image_id"] not in images:
        return "annotation without image", f"image {annotation['image_id']!r} is not listed"
    bbox, image = annotation["bbox"], images[annotation["image_id"]]
    kind = fault_of_box(bbox) or _fault_of_place(bbox, image)
    if not kind:
        return "", ""
    box = f"[{', '.join(f'{x:g}' for x in bbox)}]"
    return kind, f"{box} in an image of {image['width']} x {image['height']}"


def _fault_of_place(bbox: Sequence[float], image: dict) -> str:
    x, y, width, height = bbox
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        return "box outside of the image"
    if width > image["width"] + _TOLERANCE or height > image["height"] + _TOLERANCE:
        return "box larger than the image"
    right, bottom = x + width - image["width"], y + height - image["height"]
    return "box beyond the edge" if max(-x, -y, right, bottom) > _TOLERANCE else ""


def _nearly_twice(data: RawData, indices: Sequence[int]) -> Iterator[Finding]:
    """Boxes of one class in an image that are almost the same: perhaps labelled by two people."""
    boxes = np.array([data.annotations[i]["bbox"] for i in indices], np.float64)
    classes = np.array([str(data.annotations[i]["category_id"]) for i in indices])
    low, size = boxes[:, :2], boxes[:, 2:]
    area = size.prod(axis=1)
    for n in range(1, len(indices)):
        top = np.minimum(low[:n] + size[:n], low[n] + size[n])
        common = (top - np.maximum(low[:n], low[n])).clip(0).prod(axis=1)
        iou = common / (area[:n] + area[n] - common) * (classes[:n] == classes[n])
        best = int(iou.argmax())
        if iou[best] >= _SAME:
            other = data.places[indices[best]][1]
            text = f"IoU {iou[best]:.2f} with {other}, of the same class"
            yield data.finding("box nearly twice", indices[n], text)


def _about_images(data: RawData) -> Iterator[Finding]:
    annotated = {annotation["image_id"] for annotation in data.annotations}
    for image in data.images:
        if image["id"] not in annotated:
            yield Finding("image without boxes", image["file_name"], "", image["id"])


def _about_classes(data: RawData) -> Iterator[Finding]:
    counts = Counter(annotation["category_id"] for annotation in data.annotations)
    for category in data.categories:
        if not counts[category["id"]]:
            text = f"{category['name']} has no box in {data.name}"
            yield Finding("class without boxes", data.name, text)


def _clipped(bbox: Sequence[float], image: dict) -> list[float]:
    x, y, width, height = bbox
    x0, y0 = max(x, 0), max(y, 0)
    return [x0, y0, min(x + width, image["width"]) - x0, min(y + height, image["height"]) - y0]


def _order(category: dict) -> tuple[bool, int | str]:
    return isinstance(category["id"], str), category["id"]
