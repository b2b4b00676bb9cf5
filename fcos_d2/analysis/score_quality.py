"""How well scores rank boxes, without and with quality (1904.01355, appendix)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import check_image_size
from detectron2.structures import pairwise_iou
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from ..data.image_files import read_image
from ..inference import Predictor
from ..modeling.head import WITHOUT_FACTOR
from .charts import new_figure
from .inspection import inspect_image
from .positives import boxes_at_test_resize


@dataclass(frozen=True)
class ScoresAndIoUs:
    """The candidates of a data set: locations and classes above the threshold, before NMS."""

    images: int
    class_probability: Tensor  # (C,)
    quality: Tensor  # (C,) in [0, 1]; 1 with QUALITY "none" and "joint"
    score: Tensor  # (C,) fused from both (SCORE_FUSION)
    iou: Tensor  # (C,) the highest with a ground-truth box of the candidate's class; 0 without one

    @property
    def product(self) -> Tensor:
        """(C,) class probability times quality, whatever SCORE_FUSION."""
        return self.class_probability * self.quality


def scores_and_ious(
    predictor: Predictor, cfg: CfgNode, records: Sequence[dict], *, progress: bool = False
) -> ScoresAndIoUs:
    """Compare the candidates of images with their ground truth. Crowds are left out.

    Args:
        predictor: of an FCOS, made of ``cfg``.
        records: in Detectron2's format, with the files of images.
        progress: show a progress bar.

    Raises:
        ValueError: for another detector, and for an image of another size than its record says.
        OSError: for a file that cannot be read.
    """
    parts = []
    for record in tqdm(records, unit=" images", disable=not progress):
        found = inspect_image(predictor, read_record_image(record)).candidates
        truth, _, _ = boxes_at_test_resize(cfg, record)
        boxes = found.pred_boxes.clone()
        boxes.clip(found.image_size)
        ious = pairwise_iou(boxes, truth.gt_boxes)  # (C, M)
        ious[found.pred_classes[:, None] != truth.gt_classes] = 0
        iou = ious.amax(dim=1) if len(truth) else torch.zeros(len(found))
        parts.append(torch.stack([found.class_probability, found.quality, found.scores, iou]))
    columns = torch.cat(parts, dim=1) if parts else torch.zeros(4, 0)
    return ScoresAndIoUs(len(records), *columns)


def scores_figure(points: ScoresAndIoUs, quality: str, score_fusion: str) -> Figure:
    """Scores of candidates against the IoU of their boxes, without and with quality.

    Args:
        quality, score_fusion: the keys of MODEL.FCOS. With QUALITY "none" or "joint" there is one
            panel, with SCORE_FUSION "sqrt" a third one, of the detector's own scores.
    """
    panels = {"class probability": points.class_probability}
    if quality not in WITHOUT_FACTOR:
        panels["class probability · quality"] = points.product
        if score_fusion == "sqrt":
            panels["score: sqrt(class probability · quality)"] = points.score
    figure = new_figure(4.4 * len(panels), 4.9)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    # Fainter where there are many, so that dense places still differ.
    alpha = min(0.25, max(0.02, 8000 / max(len(points.iou), 1)))
    for axes, (name, scores) in zip(grid, panels.items(), strict=True):
        axes.scatter(scores, points.iou, s=5, alpha=alpha, linewidths=0)
        axes.plot([0, 1], [0, 1], "--", color="black", linewidth=1)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel=name)
        axes.set_ylabel("IoU with the ground truth of the class")
        chosen = (slice(None), points.iou >= 0.5)
        correlations = [rank_correlation(scores[x], points.iou[x]) for x in chosen]
        numbers = ("-" if c is None else f"{c:.2f}" for c in correlations)
        axes.set_title("rank correlation {}, of IoU ≥ 0.5: {}".format(*numbers), fontsize=10)
    figure.suptitle(f"{len(points.iou):,} candidates (before NMS), {points.images:,} image(s)")
    return figure


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation of two (C,) tensors; None if one is constant."""
    if len(a.unique()) < 2 or len(b.unique()) < 2:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(x: Tensor) -> np.ndarray:
    """(C,) float64 ranks; equal values have the mean of theirs."""
    _, inverse, counts = np.unique(x.numpy(), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def read_record_image(record: dict, file: str | None = None) -> np.ndarray:
    """(H, W, 3) uint8, BGR, of a record in Detectron2's format.

    Args:
        file: read instead of the record's own.

    Raises:
        ValueError: if the image has another size than the record says.
        OSError: for a file that cannot be read.
    """
    file = file or record["file_name"]
    image = read_image(file, "BGR")
    check_image_size(record | {"file_name": file}, image)
    return image
