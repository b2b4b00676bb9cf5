"""Detections of a run and the boxes of the ground truth, matched by COCO's rules.

hotcoco computes in Rust what pycocotools' COCOeval computes in Python: the same arrays.
"""

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import hotcoco
import numpy as np
from pycocotools.coco import COCO


class Matches(NamedTuple):
    """D detections and B boxes of all images, matched at one IoU."""

    detections: np.ndarray  # (D,) ids
    scores: np.ndarray  # (D,)
    right: np.ndarray  # (D,) bool: it found a box
    detection_ignored: np.ndarray  # (D,) bool: it lies in a crowd
    boxes: np.ndarray  # (B,) ids
    found_by: np.ndarray  # (B,) the id of the detection that found it, or 0
    box_ignored: np.ndarray  # (B,) bool: it is a crowd


def join(matches: Iterable[Matches]) -> Matches:
    return Matches(*map(np.concatenate, zip(*matches, strict=True)))


def copy_sides(truth: COCO, detections: COCO) -> tuple[hotcoco.COCO, hotcoco.COCO]:
    """Both sides for hotcoco, with numbers for images and categories: their ids may be of any kind.

    The numbers follow the order of the ids; boxes and detections keep their ids.
    """
    numbers = [{x: i for i, x in enumerate(sorted(ids))} for ids in (truth.imgs, truth.cats)]
    boxes = _columns(truth, *numbers, id=np.int64, area=float, iscrowd=np.int64)
    results = _columns(detections, *numbers, score=float)
    copy = hotcoco.COCO.from_arrays(
        [{"id": number} for number in range(len(truth.imgs))],
        [{"id": number, "name": str(number)} for number in range(len(truth.cats))],
        boxes["image_id"],
        boxes["category_id"],
        boxes["bbox"],
        ids=boxes["id"],
        area=boxes["area"],
        iscrowd=boxes["iscrowd"],
    )
    # loadRes takes columns in this order, and counts ids from 1, as pycocotools does.
    order = ("image_id", "bbox", "score", "category_id")
    return copy, copy.loadRes(np.column_stack([results[key] for key in order]))


def _columns(side: COCO, images: dict, categories: dict, **types: type) -> dict[str, np.ndarray]:
    """Of annotations whose image and category are listed; pycocotools does not see others."""
    kept = [
        annotation
        for annotation in side.dataset["annotations"]
        if annotation["image_id"] in images and annotation["category_id"] in categories
    ]
    columns = {"image_id": [images[annotation["image_id"]] for annotation in kept]}
    columns["category_id"] = [categories[annotation["category_id"]] for annotation in kept]
    columns |= {key: [annotation[key] for annotation in kept] for key in ("bbox", *types)}
    types |= {"image_id": np.int64, "category_id": np.int64, "bbox": float}
    arrays = {key: np.array(values, types[key]) for key, values in columns.items()}
    return arrays | {"bbox": arrays["bbox"].reshape(-1, 4)}


def evaluate(sides: tuple[hotcoco.COCO, hotcoco.COCO], **params: object) -> hotcoco.COCOeval:
    """
    Args:
        params: of COCOeval, in place of its defaults.
    """
    evaluation = hotcoco.COCOeval(*sides, "bbox")
    for name, value in params.items():
        setattr(evaluation.params, name, value)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def matches(evaluation: hotcoco.COCOeval) -> Matches:
    """At its first IoU, of an evaluation of one area."""
    images = evaluation.eval_imgs

    def join_images(key: str, dtype: type) -> np.ndarray:
        return np.fromiter(chain.from_iterable(image[key] for image in images), dtype)

    def join_first_rows(key: str, dtype: type) -> np.ndarray:
        return np.fromiter(chain.from_iterable(image[key][0] for image in images), dtype)

    return Matches(
        detections=join_images("dtIds", np.int64),
        scores=join_images("dtScores", float),
        right=join_first_rows("dtMatched", bool),
        detection_ignored=join_first_rows("dtIgnore", bool),
        boxes=join_images("gtIds", np.int64),
        found_by=join_first_rows("gtMatches", np.int64),
        box_ignored=join_images("gtIgnore", bool),
    )
