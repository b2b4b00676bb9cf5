"""From dense maps to detections.

Shapes: N images, L levels, K classes, (Hi, Wi) cells of level i, C candidates of the batch.
"""

import math
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms

from .head import check_choice
from .points import cell_locations, centerness, ltrb_to_boxes

# NMS starts with so many times the wanted detections, and goes on with so many times more.
_NMS_FIRST = 4


class FCOSPostProcessor:
    """Threshold, top-k per level, decode, class-wise NMS (1904.01355, section 3.1)."""

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
        computed_centerness: bool = False,
        location_offset: float = 0.5,
    ):
        """
        Args:
            computed_centerness: without a quality branch, take the centerness of the predicted
                distances for the quality.
            max_detections_per_image: ``TEST.DETECTIONS_PER_IMAGE``; negative for no limit.
            Others: see the keys of ``MODEL.FCOS`` in :mod:`fcos_d2.config`.
        """
        check_choice("SCORE_FUSION", score_fusion, ("sqrt", "product"))
        check_choice("SCORE_THRESH_ON", score_thresh_on, ("class", "score"))
        self.score_thresh = score_thresh
        self.score_thresh_on = score_thresh_on
        self.topk_candidates = topk_candidates
        self.nms_thresh = nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.score_fusion = score_fusion
        self.computed_centerness = computed_centerness
        self.location_offset = location_offset

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {
            "score_thresh": cfg.MODEL.FCOS.SCORE_THRESH_TEST,
            "score_thresh_on": cfg.MODEL.FCOS.SCORE_THRESH_ON,
            "topk_candidates": cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST,
            "nms_thresh": cfg.MODEL.FCOS.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "score_fusion": cfg.MODEL.FCOS.SCORE_FUSION,
            "computed_centerness": cfg.MODEL.FCOS.QUALITY == "computed",
            "location_offset": cfg.MODEL.FCOS.LOCATION_OFFSET,
        }

    def __call__(
        self,
        class_logits: Sequence[Tensor],
        ltrb: Sequence[Tensor],
        quality_logits: Sequence[Tensor] | None,
        strides: Sequence[int],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """
        Args:
            class_logits, ltrb, quality_logits: what the head returns; left as they are.
            strides: pixels per cell of each level.
            image_sizes: (height, width) of each image without padding.

        Returns:
            for each image its detections, best first: ``pred_boxes`` inside the image and not
            empty, ``scores`` float32, ``pred_classes``.
        """
        found = self.candidates(class_logits, ltrb, quality_logits, strides, image_sizes)
        return [self.suppress(x) for x in found]

    def candidates(
        self,
        class_logits: Sequence[Tensor],
        ltrb: Sequence[Tensor],
        quality_logits: Sequence[Tensor] | None,
        strides: Sequence[int],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """What goes into NMS: all steps but the last. Arguments and fields as of the call."""
        num_levels = len(class_logits)
        quality = [None] * num_levels if quality_logits is None else quality_logits
        maps = zip(range(num_levels), class_logits, ltrb, quality, strides, strict=True)
        cells = [torch.cat(x) for x in zip(*(self._cells_of_level(*x) for x in maps), strict=True)]
        image, level, locations, logits, distances, *quality = cells
        # 2. Score.
        cell, classes = (logits > self._logit_thresh).nonzero(as_tuple=True)
        scores = logits[cell, classes].sigmoid()
        if quality:
            scores = self._fuse(scores, quality[0].sigmoid()[cell])
        elif self.computed_centerness:
            # A box without extent on an axis is dropped later; its centerness is 0 / 0 till then.
            scores = self._fuse(scores, centerness(distances).nan_to_num(0.0)[cell])
        if self.score_thresh_on == "score":
            above = _where(scores > self.score_thresh)
            cell, classes, scores = cell[above], classes[above], scores[above]
        # 3. Top-k per level.
        group = (image * num_levels + level)[cell]
        keep = top_k_per_group(scores, group, len(image_sizes) * num_levels, self.topk_candidates)
        cell, classes, scores = cell[keep], classes[keep], scores[keep]
        # 4. Decode.
        boxes = ltrb_to_boxes(locations[cell], distances[cell])
        per_image = torch.bincount(image[cell], minlength=len(image_sizes)).tolist()
        parts = (t.split(per_image) for t in (boxes, scores, classes))
        return [_inside_image(*x) for x in zip(*parts, image_sizes, strict=True)]

    def _cells_of_level(
        self,
        level: int,
        class_logits: Tensor,
        ltrb: Tensor,
        quality_logits: Tensor | None,
        stride: int,
    ) -> tuple[Tensor, ...]:
        """Image and level (C,), location (C, 2) and the maps' values of cells with candidates."""
        # 1. Threshold. The sigmoid is monotone: compare logits, and take it of candidates only.
        # Few cells have a class above the threshold, so find these first. A cell with NaN has none.
        best = class_logits.amax(dim=1).float()
        found = best > self._logit_thresh
        if self.score_thresh_on == "score" and quality_logits is not None:
            quality = quality_logits[:, 0].float().sigmoid()
            found &= self._fuse(best.sigmoid(), quality) > self.score_thresh
        image, y, x = found.nonzero(as_tuple=True)
        locations = cell_locations(x, y, stride, self.location_offset)
        values = [class_logits[image, :, y, x].float(), ltrb[image, :, y, x].float()]
        if quality_logits is not None:
            values.append(quality_logits[image, 0, y, x].float())
        return image, torch.full_like(image, level), locations, *values

    def _fuse(self, scores: Tensor, quality: Tensor) -> Tensor:
        fused = scores * quality
        return fused.sqrt() if self.score_fusion == "sqrt" else fused

    @property
    def _logit_thresh(self) -> float:
        """What a class logit must be above for a candidate."""
        thresh = self.score_thresh
        if self.score_thresh_on == "score" and self.score_fusion == "sqrt":
            thresh = thresh * abs(thresh)  # sqrt(class * quality) > t needs class > t * t
        if not 0 < thresh < 1:
            return -math.inf if thresh <= 0 else math.inf
        return math.log(thresh / (1 - thresh))

    def suppress(self, candidates: Instances) -> Instances:
        """Class-wise NMS of the candidates of one image; keeps the best of what is left."""
        # In float64: batched_nms moves the classes apart, which in float32 would round boxes by up
        # to 1/128 pixel, by another amount in each part.
        boxes, scores = candidates.pred_boxes.tensor.double(), candidates.scores.double()
        classes = candidates.pred_classes
        order = scores.argsort(descending=True, stable=True)
        limit = self.max_detections_per_image
        # What NMS keeps of the best candidates does not depend on the others: where enough of a
        # part is left, the rest need not be compared.
        tried = _NMS_FIRST * limit if limit >= 0 else len(order)
        while True:
            part = order[:tried]
            keep = part[batched_nms(boxes[part], scores[part], classes[part], self.nms_thresh)]
            if len(keep) >= limit >= 0 or tried >= len(order):
                return candidates[keep[:limit] if limit >= 0 else keep]
            tried *= _NMS_FIRST


def _inside_image(
    boxes: Tensor, scores: Tensor, classes: Tensor, image_size: tuple[int, int]
) -> Instances:
    """Clip the candidates of one image, and leave out what is empty then, or NaN."""
    height, width = image_size
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))
    # NaN fails both comparisons, so a box of NaN counts as empty.
    valid = _where((boxes[:, 2:] > boxes[:, :2]).all(dim=1) & ~scores.isnan())
    return Instances(
        image_size,
        pred_boxes=Boxes(boxes[valid]),
        scores=scores[valid],
        pred_classes=classes[valid],
    )


def _where(mask: Tensor) -> Tensor:
    # A mask as an index would be searched anew for each tensor, and waited for on GPU.
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
    per_group = torch.bincount(group, minlength=num_groups)
    begin = per_group.cumsum(0) - per_group
    rank = torch.arange(len(order), device=order.device) - begin[group[order]]
    return order[rank < k]
