"""COCOeval of the boxes of a run, and precision, recall and F1 at each of S scores."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

CURVE_IOUS = (0.5, 0.75, 0.9)  # of figures 4 to 6 of 1904.01355
MATCH_IOU = 0.5
AREAS = ("all", "small", "medium", "large")
_EVERY_AREA, _MOST_DETECTIONS = 0, -1  # indices of COCOeval's parameters


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
    """Detections of a run, matched with the ground truth by COCOeval.

    Attributes:
        truth, detections: the two sides, as pycocotools has them.
        class_names: by category id, in the order of the ids.
        by_class: COCOeval as evaluators run it: a detection finds boxes of its class.
        agnostic: the same without classes, at ``CURVE_IOUS``.
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
        self.by_class = _evaluate(self.truth, self.detections, by_class=True)
        self.agnostic = _evaluate(self.truth, self.detections, by_class=False)

    def average_precision(
        self, iou: float | None = None, area: str = "all", category: int | None = None
    ) -> float | None:
        """AP in percent as COCO's evaluator prints it; None without such boxes.

        Args:
            iou: one of 0.5, 0.55, ..., 0.95, or None for their mean.
            area: "all", "small", "medium" or "large".
            category: the id of one, or None for the mean over those with boxes.
        """
        # (IoU thresholds, recalls, categories, areas, numbers of detections)
        precision = self.by_class.eval["precision"]
        precision = precision[:, :, :, AREAS.index(area), _MOST_DETECTIONS]
        if iou is not None:
            precision = precision[np.isclose(self.by_class.params.iouThrs, iou)]
        if category is not None:
            precision = precision[:, :, [list(self.class_names).index(category)]]
        precision = precision[precision > -1]
        return 100 * float(precision.mean()) if precision.size else None

    def precision_recall(self, iou: float) -> tuple[np.ndarray, np.ndarray]:
        """Recall and precision, (101,) each, without classes, at one of ``CURVE_IOUS``.

        As in figures 4 to 6 of 1904.01355. The mean of the precision is the curve's AP.
        """
        of_iou = self.agnostic.eval["precision"][CURVE_IOUS.index(iou)]
        return self.agnostic.params.recThrs, of_iou[:, 0, _EVERY_AREA, 0].clip(0)

    def score_curve(self, category: int | None = None) -> ScoreCurve:
        """Of a category, or of all together, at an IoU of ``MATCH_IOU``."""
        boxes, scores, right = 0, [np.zeros(0)], [np.zeros(0, dtype=bool)]
        for image in self.matches(category):
            boxes += int((image["gtIgnore"] == 0).sum())
            counted = ~image["dtIgnore"][0].astype(bool)
            scores.append(np.asarray(image["dtScores"])[counted])
            right.append(image["dtMatches"][0][counted] != 0)
        scores, right = np.concatenate(scores), np.concatenate(right)
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

    def matches(self, category: int | None = None) -> Iterator[dict]:
        """COCOeval's result of each image and class, or of one class, for boxes of all sizes.

        The first row of its arrays is for an IoU of ``MATCH_IOU``.
        """
        images = len(self.by_class.params.imgIds)
        matches = self.by_class.evalImgs
        if category is not None:
            begin = images * list(self.class_names).index(category)
            matches = matches[begin : begin + images]
        return filter(None, matches)

    def agnostic_matches(self) -> Iterator[dict]:
        """The same of each image, without classes."""
        return filter(None, self.agnostic.evalImgs)


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


def _evaluate(truth: COCO, detections: COCO, by_class: bool) -> COCOeval:
    evaluation = COCOeval(truth, detections, "bbox")
    if not by_class:
        evaluation.params.useCats = 0
        # Curves are of COCO's 100 detections, but matches of all: it takes 100 of each class.
        most = max(map(len, detections.imgToAnns.values()), default=0)
        evaluation.params.maxDets = [100, max(100, most)]
        evaluation.params.iouThrs = np.array(CURVE_IOUS)
        evaluation.params.areaRng = evaluation.params.areaRng[: _EVERY_AREA + 1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[: _EVERY_AREA + 1]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    # The list goes class by class, area by area, image by image. The other areas, which take most
    # of the memory, are in the accumulated numbers.
    images, areas = len(evaluation.params.imgIds), len(evaluation.params.areaRng)
    evaluation.evalImgs = [
        match
        for number, match in enumerate(evaluation.evalImgs)
        if number // images % areas == _EVERY_AREA
    ]
    return evaluation
