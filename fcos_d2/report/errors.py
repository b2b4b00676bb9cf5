"""What a detector confuses, and its largest errors: by the matches of detections and boxes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pycocotools.mask import iou

from .evaluation import MATCH_IOU, BoxEvaluation
from .matching import Matches

_POOR_IOU = 0.1  # with a smaller IoU a detection counts as background
# A false positive is of the first kind that is true of it.
KINDS = {
    "twice": "a box of its class that another detection found",
    "wrong class": f"a box of another class, with an IoU of {MATCH_IOU:g} or more",
    "poor box": f"a box with an IoU of {_POOR_IOU:g} to {MATCH_IOU:g}",
    "background": f"no box with an IoU of {_POOR_IOU:g} or more",
    "missed": "a box that no detection of its class found",
}


@dataclass(frozen=True)
class Error:
    """A false positive or a missed box."""

    kind: str  # one of KINDS
    image_id: int | str  # of COCO's file
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the image
    category: int  # of the detection or the missed box
    score: float | None  # None for a missed box
    iou: float  # with the box, or for a missed box with the detection, that it overlaps most
    other: int | None  # the category of that one; None if there is no overlap


def confusion_matrix(evaluation: BoxEvaluation, threshold: float) -> np.ndarray:
    """(K + 1, K + 1) counts: ground truth in rows, detections in columns, background last.

    COCOeval matches boxes and detections of any class, the best scores first, at an IoU of
    ``MATCH_IOU``. Crowds, and detections in them, are left out.

    Args:
        threshold: detections with a smaller score are left out.
    """
    numbers = {category: i for i, category in enumerate(evaluation.class_names)}
    background = len(numbers)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    truth, detections = evaluation.truth.anns, evaluation.detections.anns
    matches = evaluation.agnostic_matches
    row_of = dict.fromkeys(_counted(matches, threshold), background)
    for i, detection, ignored in _boxes(matches):
        row = numbers[truth[i]["category_id"]]
        if detection in row_of:
            row_of[detection] = row
        elif not ignored:
            matrix[row, background] += 1
    for detection, row in row_of.items():
        matrix[row, numbers[detections[detection]["category_id"]]] += 1
    return matrix


def find_errors(evaluation: BoxEvaluation, threshold: float) -> list[Error]:
    """All false positives and missed boxes, worst first: by score, and missed boxes by area.

    Args:
        threshold: detections with a smaller score are left out.
    """
    matches = evaluation.matches()
    counted = set(_counted(matches, threshold))
    wrong = counted - set(matches.found_by.tolist())
    missed = {
        i for i, detection, ignored in _boxes(matches) if not ignored and detection not in counted
    }
    errors = []
    for image_id in evaluation.truth.getImgIds():
        errors += _errors_of_image(evaluation, image_id, threshold, wrong, missed)
    return sorted(errors, key=_badness, reverse=True)


def _counted(matches: Matches, threshold: float) -> list[int]:
    """The ids of detections that are right or wrong: in crowds they are neither."""
    counted = (matches.scores >= threshold) & ~matches.detection_ignored
    return matches.detections[counted].tolist()


def _boxes(matches: Matches) -> Iterator[tuple[int, int, bool]]:
    """The id of each box, the id of the detection that found it or 0, and if it is ignored."""
    columns = matches.boxes, matches.found_by, matches.box_ignored
    return zip(*(column.tolist() for column in columns), strict=True)


def _errors_of_image(
    evaluation: BoxEvaluation, image_id: int | str, threshold: float, wrong: set, missed: set
) -> Iterator[Error]:
    boxes, found = (x.imgToAnns[image_id] for x in (evaluation.truth, evaluation.detections))
    corners, others = ([x["bbox"] for x in side] for side in (found, boxes))
    ious = np.reshape(iou(corners, others, [0] * len(boxes)), (len(found), len(boxes)))
    ious = ious * [not box["iscrowd"] for box in boxes]
    same_class = np.equal.outer(*([x["category_id"] for x in side] for side in (found, boxes)))
    for row, detection in enumerate(found):
        if detection["id"] in wrong:
            yield _error(_kind(ious[row], same_class[row]), detection, boxes, ious[row])
    ious[[d["score"] < threshold for d in found]] = 0
    for column, box in enumerate(boxes):
        if box["id"] in missed:
            yield _error("missed", box, found, ious[:, column])


def _kind(ious: np.ndarray, same_class: np.ndarray) -> str:
    """The kind of a false positive, by its IoU with each box and whether the classes agree."""
    if (ious[same_class] >= MATCH_IOU).any():
        return "twice"
    if (ious[~same_class] >= MATCH_IOU).any():
        return "wrong class"
    return "poor box" if (ious >= _POOR_IOU).any() else "background"


def _error(kind: str, annotation: dict, others: list[dict], ious: np.ndarray) -> Error:
    x, y, width, height = annotation["bbox"]
    return Error(
        kind,
        annotation["image_id"],
        (x, y, x + width, y + height),
        annotation["category_id"],
        annotation.get("score"),
        iou=float(ious.max(initial=0)),
        other=others[ious.argmax()]["category_id"] if ious.any() else None,
    )


def _badness(error: Error) -> float:
    x0, y0, x1, y1 = error.box
    return (x1 - x0) * (y1 - y0) if error.kind == "missed" else error.score
