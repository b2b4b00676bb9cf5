"""From the head's maps to detections: threshold, score, top-k, decode, clip, NMS.

Shapes: N images, L levels, K classes, (Hi, Wi) cells of level i, S selected cells of the batch,
C candidates of the batch.

Candidate: a location and a class whose probability is above the threshold. A cell with several
such classes makes several candidates with the same box.

Every step is safe to trace: sizes that depend on the data stay in tensors.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.config import configurable
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms

from .head import QUALITIES, HeadOutputs
from .points import Levels, centerness, ltrb_to_boxes
from .validation import check_between, check_choice, check_count


class _Cells(NamedTuple):
    """Cells with at least one candidate, and the head's maps there."""

    image: Tensor  # (S,) int64
    level: Tensor  # (S,) int64
    locations: Tensor  # (S, 2) pixels
    class_logits: Tensor  # (S, K)
    ltrb: Tensor  # (S, 4) pixels
    quality: Tensor  # (S,) in [0, 1], or NaN; all 1 with QUALITY "none"


class FCOSPostProcessor:
    """Turns what the head returns into detections (1904.01355, section 3.1)."""

    @configurable
    def __init__(
        self,
        *,
        score_thresh: float = 0.05,
        score_thresh_on: str = "class",
        topk_candidates: int = 1000,
        nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        score_fusion: str = "sqrt",
        quality: str = "centerness",
        clip_boxes: str = "before_nms",
    ):
        """
        Args:
            max_detections_per_image: ``TEST.DETECTIONS_PER_IMAGE``; negative for no limit.
            Others: see the keys of ``MODEL.FCOS`` in :mod:`fcos_d2.config`.

        Raises:
            ValueError: for a value that its key does not offer.
        """
        check_choice("QUALITY", quality, QUALITIES)
        check_choice("SCORE_FUSION", score_fusion, ("sqrt", "product"))
        check_choice("SCORE_THRESH_ON", score_thresh_on, ("class", "score"))
        check_choice("CLIP_BOXES", clip_boxes, ("before_nms", "after_nms"))
        check_between("SCORE_THRESH_TEST", score_thresh, 0, 1)
        check_between("NMS_THRESH_TEST", nms_thresh, 0, 1)
        check_count("TOPK_CANDIDATES_TEST", topk_candidates, 1)
        self.score_thresh = score_thresh
        self.score_thresh_on = score_thresh_on
        self.topk_candidates = topk_candidates
        self.nms_thresh = nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.score_fusion = score_fusion
        self.quality = quality
        self.clip_boxes = clip_boxes

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {
            "score_thresh": cfg.MODEL.FCOS.SCORE_THRESH_TEST,
            "score_thresh_on": cfg.MODEL.FCOS.SCORE_THRESH_ON,
            "topk_candidates": cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST,
            "nms_thresh": cfg.MODEL.FCOS.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "score_fusion": cfg.MODEL.FCOS.SCORE_FUSION,
            "quality": cfg.MODEL.FCOS.QUALITY,
            "clip_boxes": cfg.MODEL.FCOS.CLIP_BOXES,
        }

    def __call__(
        self, outputs: HeadOutputs, levels: Levels, image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """
        Args:
            outputs: of the head; left as they are.
            levels: the geometry of the levels.
            image_sizes: (height, width) of each image without padding.

        Returns:
            for each image its detections, best first: ``pred_boxes`` inside the image and not
            empty, ``scores`` float32, ``pred_classes``.
        """
        return [self.suppress(x) for x in self.candidates(outputs, levels, image_sizes)]

    def candidates(
        self,
        outputs: HeadOutputs,
        levels: Levels,
        image_sizes: Sequence[tuple[int, int]],
        topk: int | None = None,
        with_cells: bool = False,
    ) -> list[Instances]:
        """The steps that look at each location alone. Arguments as of the call.

        Args:
            topk: of each image and level; by default ``TOPK_CANDIDATES_TEST``.
            with_cells: add what the head says at the cell of each candidate. :meth:`suppress`
                keeps these fields.

        Returns:
            for each image, with the fields of the call; boxes may reach beyond the image. With
            ``with_cells`` also ``level`` (C,) int64, ``locations`` (C, 2) and ``ltrb`` (C, 4) in
            pixels, ``class_probability`` (C,), and ``quality`` (C,), 1 with QUALITY "none".
        """
        if (outputs.quality_logits is not None) != (self.quality in ("centerness", "iou")):
            raise ValueError(f"The head's outputs do not fit the quality {self.quality!r}")
        # 1. Threshold.
        cells = self._select_cells(outputs, levels)
        cell, classes = (cells.class_logits > self.logit_thresh).nonzero(as_tuple=True)

        # 2. Score.
        scores = self.score(cells.class_logits[cell, classes].sigmoid(), cells.quality[cell])
        threshold = self.score_thresh if self.score_thresh_on == "score" else -math.inf
        above = _where(scores > threshold)  # NaN is not
        cell, classes, scores = cell[above], classes[above], scores[above]

        # 3. Top-k of each image and level.
        group = (cells.image * len(levels) + cells.level)[cell]
        num_groups = len(image_sizes) * len(levels)
        topk = self.topk_candidates if topk is None else topk
        best = top_k_per_group(scores, group, num_groups, topk)
        cell, classes, scores = cell[best], classes[best], scores[best]

        # 4. Decode.
        boxes = ltrb_to_boxes(cells.locations[cell], cells.ltrb[cell])
        finite = _where(boxes.isfinite().all(dim=1))
        cell, classes = cell[finite], classes[finite]
        fields = {
            "pred_boxes": Boxes(boxes[finite]),
            "scores": scores[finite],
            "pred_classes": classes,
        }
        if with_cells:
            names = ("level", "locations", "ltrb", "quality")
            fields |= {name: getattr(cells, name)[cell] for name in names}
            fields["class_probability"] = cells.class_logits[cell, classes].sigmoid()
        image = cells.image[cell]
        return [_instances(size, fields, _where(image == i)) for i, size in enumerate(image_sizes)]

    def suppress(self, candidates: Instances) -> Instances:
        """Clipping and NMS of the candidates of one image; keeps the best of what is left."""
        # 5. Clip; with CLIP_BOXES "after_nms" this comes last.
        if self.clip_boxes == "before_nms":
            candidates = _clip(candidates)

        # 6. Class-wise NMS, in float64: to keep the classes apart batched_nms may move their boxes
        # by several image sizes, which in float32 would round them by up to 1/128 pixel.
        keep = batched_nms(
            candidates.pred_boxes.tensor.double(),
            candidates.scores.double(),
            candidates.pred_classes,
            self.nms_thresh,
        )
        # Best first, of equal scores the first: batched_nms leaves the order of these open.
        keep = keep.sort().values
        keep = keep[candidates.scores[keep].argsort(descending=True, stable=True)]
        if self.max_detections_per_image >= 0:
            keep = keep[: self.max_detections_per_image]
        detections = candidates[keep]
        return detections if self.clip_boxes == "before_nms" else _clip(detections)

    def _select_cells(self, outputs: HeadOutputs, levels: Levels) -> _Cells:
        """The cells of all levels that have a class above the threshold.

        These are few, so that all that follows touches little memory. The sigmoid is monotone:
        logits are compared, and it is taken of candidates alone. A cell with NaN has none.
        """
        selected = []
        for level, class_logits in enumerate(outputs.class_logits):
            best = class_logits.amax(dim=1).float()
            above = best > self.logit_thresh
            if self.score_thresh_on == "score" and outputs.quality_logits is not None:
                quality = outputs.quality_logits[level][:, 0].float().sigmoid()
                above &= self.score(best.sigmoid(), quality) > self.score_thresh
            image, y, x = above.nonzero(as_tuple=True)
            ltrb = outputs.ltrb[level][image, :, y, x].float()
            if outputs.quality_logits is not None:
                quality = outputs.quality_logits[level][image, 0, y, x].float().sigmoid()
            elif self.quality == "computed":
                quality = centerness(ltrb)  # NaN, and no candidate, for a box without extent
            else:
                quality = torch.ones_like(ltrb[:, 0])
            selected.append(
                _Cells(
                    image=image,
                    level=torch.full_like(image, level),
                    locations=levels.locations(level, x, y),
                    class_logits=class_logits[image, :, y, x].float(),
                    ltrb=ltrb,
                    quality=quality,
                )
            )
        return _Cells(*(torch.cat(tensors) for tensors in zip(*selected, strict=True)))

    def score(self, class_probability: Tensor, quality: Tensor) -> Tensor:
        """Scores of candidates, from tensors whose shapes broadcast."""
        if self.quality == "none":
            return class_probability
        scores = class_probability * quality
        return scores.sqrt() if self.score_fusion == "sqrt" else scores

    @property
    def logit_thresh(self) -> float:
        """What a class logit must be above for a candidate."""
        thresh = self.score_thresh
        if self.score_thresh_on == "score" and self.score_fusion == "sqrt":
            thresh = thresh * abs(thresh)  # sqrt(class * quality) > t needs class > t * t
        if not 0 < thresh < 1:
            return -math.inf if thresh <= 0 else math.inf
        return math.log(thresh / (1 - thresh))


def _instances(
    image_size: tuple[int, int], fields: dict[str, Tensor | Boxes], index: Tensor
) -> Instances:
    return Instances(image_size, **{name: values[index] for name, values in fields.items()})


def _clip(instances: Instances) -> Instances:
    """Clip the boxes of one image to it, and leave out those that are empty then."""
    boxes = instances.pred_boxes.clone()
    boxes.clip(instances.image_size)
    fields = instances.get_fields() | {"pred_boxes": boxes}
    return _instances(instances.image_size, fields, _where(boxes.nonempty()))


def _where(mask: Tensor) -> Tensor:
    """Indices of the true entries. A mask as an index would be searched for each tensor anew."""
    return mask.nonzero().squeeze(1)


def top_k_per_group(scores: Tensor, group: Tensor, num_groups: int, k: int) -> Tensor:
    """Indices of the k best scores of each group, group by group, best first.

    Args:
        scores: (C,)
        group: (C,) int64 in [0, num_groups).

    Returns:
        indices into ``scores``; of equal scores the first is the better.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    group = group[order]
    group_sizes = torch.bincount(group, minlength=num_groups)
    group_begin = group_sizes.cumsum(0) - group_sizes
    rank = torch.ones_like(order).cumsum(0) - 1 - group_begin[group]
    return order[rank < k]
