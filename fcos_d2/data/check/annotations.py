"""Checks that need no pixels."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ..classes import how_they_differ
from ..findings import Finding, unsound
from ..raw_data import UNLEARNABLE, RawData
from .registered import read_records

# IoU of two boxes of one class that may be one object.
_SAME = 0.8
# A class in less than this share of the images that the most frequent one is in is rare.
_RARE = 0.1


def check_annotations(data: RawData, nearly_twice: bool = True) -> list[Finding]:
    """What is wrong with the boxes and classes that were read.

    Args:
        nearly_twice: also compare each box with all others of its image, which takes long.
    """
    findings = data.faulty_boxes()
    misplaced = {f.index for f in findings if f.kind != "box beyond the edge"}
    crowds = {i for i, a in enumerate(data.annotations) if a.get("iscrowd", 0)} - misplaced
    findings += [data.finding("crowd", i, "left out of training") for i in crowds]
    twice = list(_twice(data, misplaced))
    findings = sorted([*findings, *twice], key=lambda f: (f.kind not in UNLEARNABLE, f.index))
    if nearly_twice:
        for indices in data.indices({*misplaced, *crowds, *(f.index for f in twice)}):
            findings += _nearly_twice(data, indices)
    return [*findings, *_about_images_and_classes(data)]


def summary(name: str, records: Sequence[dict], classes: Sequence[str]) -> str:
    """What is wrong with records in Detectron2's format, in one line, without slow checks.

    Records without the size of their image are left out. Without ``classes`` each number is one.
    """
    records = [r for r in records if "height" in r and "width" in r]
    if not classes:
        numbers = {a["category_id"] for r in records for a in r.get("annotations", ())}
        classes = range(max(numbers, default=-1) + 1)
    data = read_records(name, records, classes)
    findings = [*data.findings, *check_annotations(data, nearly_twice=False)]
    kinds = Counter(f.kind for f in findings if f.severity != "note")
    found = ", ".join(f"{kind} ({number})" for kind, number in kinds.most_common())
    boxes = sum(len(r.get("annotations", ())) for r in records)
    return f"{name}: {len(records)} images, {boxes} boxes; " + (
        f"{found}: `fcos check` says where" if found else "their annotations are fine"
    )


def check_sets(sets: Sequence[RawData]) -> list[Finding]:
    """Compare the classes of data sets for the training and the test of one detector."""
    findings = []
    for data in sets[1:]:
        theirs, first = data.classes, sets[0].classes
        if theirs != first:
            how = how_they_differ(theirs, first)
            text = f"{data.name} has {theirs}, {how} {sets[0].name}: {first}"
            findings.append(Finding("other classes than the first set", data.name, text[:1000]))
    return findings


def check_rare_classes(data: RawData) -> list[Finding]:
    """Notes on how to train on rare classes more often, the rarest first.

    Detectron2's RepeatFactorTrainingSampler shows an image sqrt(t / f) times in an epoch, where t
    is REPEAT_THRESHOLD, and f the share of the images that have its rarest class (1908.03195). With
    the share of the most frequent class as t, the ratios of all classes become their square roots.
    """
    pairs = {(a["image_id"], a["category_id"]) for a in data.annotations}
    images_with = Counter(category for _, category in pairs)
    number = len({image for image, _ in pairs})  # training leaves out those without boxes
    highest = max(images_with.values(), default=0)
    names = {category["id"]: category["name"] for category in data.categories}
    return [
        Finding(
            "rare class",
            data.name,
            f"{names[category]} is in {n} of {number} images, the most frequent class in "
            f"{highest}. With DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler and "
            f"DATALOADER.REPEAT_THRESHOLD {highest / number:.2g} each of its images is seen about "
            f"{(highest / n) ** 0.5:.1f} times in an epoch",
        )
        for category, n in sorted(images_with.items(), key=lambda item: item[1])
        if n < _RARE * highest
    ]


def to_records(data: RawData, findings: Sequence[Finding]) -> tuple[list[dict], list[list[int]]]:
    """The sound annotations as records in Detectron2's format, and their indices in ``data``."""
    left_out = unsound(findings) | {i for i, a in enumerate(data.annotations) if a.get("iscrowd")}
    return data.records(left_out), data.indices(left_out)


def _twice(data: RawData, misplaced: Collection[int]) -> Iterator[Finding]:
    """Boxes that are the same in one image, up to 0.01 pixels."""
    names = {category["id"]: category["name"] for category in data.categories}
    images, boxes = data.box_arrays()
    indices = np.delete(np.arange(len(boxes)), list(misplaced))
    rows = np.column_stack([images[indices], boxes[indices].round(2)])
    _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    first = indices[first[which.reshape(-1)]]
    is_repeated = first != indices
    for i, other in zip(indices[is_repeated].tolist(), first[is_repeated].tolist(), strict=True):
        kind, text = "box twice", f"the same box as {data.places[other][1]}"
        of_class = data.annotations[other]["category_id"]
        if of_class != data.annotations[i]["category_id"]:
            kind, text = f"{kind}, of two classes", f"{text}, which is a {names[of_class]}"
        yield data.finding(kind, i, text)


def _nearly_twice(data: RawData, indices: Sequence[int]) -> Iterator[Finding]:
    """Boxes of one class in an image that are almost the same: perhaps labelled by two people."""
    boxes = np.array([data.annotations[i]["bbox"] for i in indices], np.float64).reshape(-1, 4)
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


def _about_images_and_classes(data: RawData) -> Iterator[Finding]:
    annotated = {annotation["image_id"] for annotation in data.annotations}
    for image in data.images:
        if image["id"] not in annotated:
            yield Finding("image without boxes", image["file_name"], "", image["id"])
    used = {annotation["category_id"] for annotation in data.annotations}
    for category in data.categories:
        if category["id"] not in used:
            text = f"{category['name']} has no box in {data.name}"
            yield Finding("class without boxes", data.name, text)
