"""AP and curves of the boxes of a run, and precision, recall and F1 at each of S scores."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO

from .matching import Matches, copy_sides, evaluate, join, matches

CURVE_IOUS = (0.5, 0.75, 0.9)  # of figures 4 to 6 of 1904.01355
MATCH_IOU = 0.5
AREAS = ("all", "small", "medium", "large")
_DETECTIONS = 100  # of an image, in curves and AP; by class, of an image and class


@dataclass(frozen=True)
class ScoreCurve:
    """Recall, precision and F1 of the detections of at least each score."""

    boxes: int  # of the ground truth
    scores: np.ndarray  # (S,) descending
    precision: np.ndarray  # (S,)
    recall: np.ndarray  # (S,)
    f1: np.ndarray  # (S,)

    @property
    def best(self) -> int | None:
        """Index of the score with the highest F1; None if nothing is found at any."""
        return int(self.f1.argmax()) if len(self.f1) and self.f1.max() > 0 else None

    @property
    def threshold(self) -> float | None:
        """Half-way between the best score and the next lower one; None if nothing is found."""
        if self.best is None:
            return None
        return float(self.scores[self.best : self.best + 2].mean())

    def at_best(self) -> dict[str, float | None]:
        """The threshold, and F1, precision and recall at the best score; None if there is none."""
        curves = {"f1": self.f1, "precision": self.precision, "recall": self.recall}
        best = {x: None if self.best is None else float(y[self.best]) for x, y in curves.items()}
        return {"threshold": self.threshold} | best


class BoxEvaluation:
    """Detections of a run, matched with the ground truth by the rules of COCO.

    Attributes:
        truth, detections: the two sides, as pycocotools has them.
        class_names: by category id, in the order of the ids.
        agnostic_matches: at ``MATCH_IOU``, where a detection may find a box of any class.
    """

    def __init__(self, truth: COCO, results: Sequence[dict]):
        """
        Args:
            results: in COCO's result format.

        Raises:
            ValueError: for results of images or categories that the ground truth does not have.
        """
        images, categories = set(truth.getImgIds()), set(truth.getCatIds())
        for i, result in enumerate(results):
            if result["image_id"] not in images or result["category_id"] not in categories:
                raise ValueError(
                    f"Result {i} is of image {result['image_id']!r} and category "
                    f"{result['category_id']!r}, which the data set does not have: the results are "
                    "of another data set"
                )
        self.truth = truth
        self.class_names = {c["id"]: c["name"] for c in truth.loadCats(sorted(categories))}
        self.detections = _load_results(truth, results)
        sides = copy_sides(truth, self.detections)
        by_class = evaluate(sides, maxDets=[_DETECTIONS])
        # (IoU thresholds, recalls, categories, areas, 1)
        self._precision, self._ious = by_class.eval["precision"], by_class.params.iouThrs
        every_area = {"areaRng": by_class.params.areaRng[:1], "areaRngLbl": AREAS[:1]}
        of_class = {"iouThrs": [MATCH_IOU], "maxDets": [_DETECTIONS], **every_area}
        self._matches = {
            category: matches(evaluate(sides, catIds=[number], **of_class))
            for number, category in enumerate(self.class_names)
        }
        # Curves are of COCO's 100 detections, but matches of all: it takes 100 of each class.
        most = max(map(len, self.detections.imgToAnns.values()), default=0)
        most = [_DETECTIONS, max(_DETECTIONS, most)]
        agnostic = evaluate(sides, useCats=0, iouThrs=CURVE_IOUS, maxDets=most, **every_area)
        self._recalls = np.array(agnostic.params.recThrs)
        self._curves = agnostic.eval["precision"][:, :, 0, 0, 0].clip(0)
        self.agnostic_matches = matches(agnostic)

    def average_precision(
        self, iou: float | None = None, area: str = "all", category: int | None = None
    ) -> float | None:
        """AP in percent as COCO's evaluator prints it; None without such boxes.

        Args:
            iou: one of 0.5, 0.55, ..., 0.95, or None for their mean.
            area: "all", "small", "medium" or "large".
            category: the id of one, or None for the mean over those with boxes.
        """
        precision = self._precision[:, :, :, AREAS.index(area)]
        if iou is not None:
            precision = precision[np.isclose(self._ious, iou)]
        if category is not None:
            precision = precision[:, :, [list(self.class_names).index(category)]]
        precision = precision[precision > -1]
        return 100 * float(precision.mean()) if precision.size else None

    def precision_recall(self, iou: float) -> tuple[np.ndarray, np.ndarray]:
        """Recall and precision, (101,) each, without classes, at one of ``CURVE_IOUS``.

        As in figures 4 to 6 of 1904.01355. The mean of the precision is the curve's AP.
        """
        return self._recalls, self._curves[CURVE_IOUS.index(iou)]

    def score_curve(self, category: int | None = None) -> ScoreCurve:
        """Of a category, or of all together, at an IoU of ``MATCH_IOU``."""
        of_class = self.matches(category)
        boxes = int((~of_class.box_ignored).sum())
        counted = ~of_class.detection_ignored
        scores, right = of_class.scores[counted], of_class.right[counted]
        order = (-scores).argsort(kind="stable")
        scores, found = scores[order], right[order].cumsum()
        # Detections with equal scores are kept or dropped together.
        last = np.flatnonzero(np.diff(scores, append=-np.inf))
        scores, found = scores[last], found[last]
        return ScoreCurve(
            boxes,
            scores,
            precision=found / (last + 1),
            recall=found / max(boxes, 1),
            f1=2 * found / (last + 1 + boxes),
        )

    def matches(self, category: int | None = None) -> Matches:
        """Of a category, or of all: each detection finds boxes of its class, at ``MATCH_IOU``."""
        return join(self._matches.values()) if category is None else self._matches[category]


def _load_results(truth: COCO, results: Sequence[dict]) -> COCO:
    keys = ("image_id", "category_id", "bbox", "score")
    boxes = [{key: result[key] for key in keys} for result in results if "bbox" in result]
    with contextlib.redirect_stdout(io.StringIO()):
        if boxes:
            return truth.loadRes(boxes)
        empty = COCO()
        empty.dataset = {**truth.dataset, "annotations": []}
        empty.createIndex()
        return empty
