"""From the head's maps to detections: threshold, score, top-k, decode, clip, NMS, scale.

Shapes: N images, L levels, K classes, (Hi, Wi) cells of level i, S selected cells of the batch,
C candidates of the batch.

Candidate: a location and a class whose probability is above the threshold. A cell with several
such classes makes several candidates with the same box.

Every step is safe to trace: sizes that depend on the data stay in tensors. For a batch on GPU, the
CPU waits once a level and three times more, and then three times for each image.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from detectron2.config import configurable
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms

from .head import QUALITIES, WITH_BRANCH, WITHOUT_FACTOR, HeadOutputs
from .points import Levels, centerness, clip, has_area, ltrb_to_boxes
from .validation import check_between, check_choice, check_count, values_of_keys


class _Cells(NamedTuple):
    """Cells with at least one candidate, and the head's maps there."""

    image: Tensor  # (S,) int64
    level: Tensor  # (S,) int64
    locations: Tensor  # (S, 2) pixels
    class_logits: Tensor  # (S, K)
    ltrb: Tensor  # (S, 4) pixels
    quality: Tensor  # (S,) in [0, 1], or NaN; all 1 without a factor of quality


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
        keys = "SCORE_THRESH_ON", "SCORE_FUSION", "QUALITY", "CLIP_BOXES"
        return values_of_keys(cfg, *keys) | {
            "score_thresh": cfg.MODEL.FCOS.SCORE_THRESH_TEST,
            "topk_candidates": cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST,
            "nms_thresh": cfg.MODEL.FCOS.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
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

    @torch.no_grad()
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
            ``with_cells`` also ``level`` (C,) int64, ``rank`` (C,) int64 in its level from 0,
            ``locations`` (C, 2) and ``ltrb`` (C, 4) in pixels, ``class_probability`` (C,), and
            ``quality`` (C,), 1 with QUALITY "none" and "joint".
        """
        if (outputs.quality_logits is not None) != (self.quality in WITH_BRANCH):
            raise ValueError(f"The head's outputs do not fit the quality {self.quality!r}")
        # 1. Threshold.
        cells = self._select_cells(outputs, levels)
        cell, classes = (cells.class_logits > self.logit_thresh).nonzero(as_tuple=True)

        # 2. Score; -1 for what is not above the threshold, as NaN.
        scores = self.score(cells.class_logits[cell, classes].sigmoid(), cells.quality[cell])
        threshold = self.score_thresh if self.score_thresh_on == "score" else -math.inf
        scores = torch.where(scores > threshold, scores, -1.0)

        # 3. Top-k of each image and level.
        order, rank = rank_in_groups(scores, (cells.image * len(levels) + cells.level)[cell])
        cell, classes, scores = cell[order], classes[order], scores[order]

        # 4. Decode.
        boxes = ltrb_to_boxes(cells.locations[cell], cells.ltrb[cell])
        is_kept = (scores >= 0) & (rank < (self.topk_candidates if topk is None else topk))
        kept = (is_kept & boxes.isfinite().all(dim=1)).nonzero().squeeze(1)
        cell, classes = cell[kept], classes[kept]
        fields = {"pred_boxes": Boxes(boxes[kept]), "scores": scores[kept], "pred_classes": classes}
        if with_cells:
            names = ("level", "locations", "ltrb", "quality")
            fields |= {name: getattr(cells, name)[cell] for name in names}
            fields["rank"] = rank[kept]
            fields["class_probability"] = cells.class_logits[cell, classes].sigmoid()
        entries = _entries_of_images(cells.image[cell], len(image_sizes))
        return [_instances(*x, fields) for x in zip(image_sizes, entries, strict=True)]

    @torch.no_grad()
    def suppress(
        self, candidates: Instances, output_size: tuple[int, int] | None = None
    ) -> Instances:
        """Clipping and NMS of the candidates of one image; keeps the best of what is left.

        Args:
            output_size: (height, width) that the image is scaled to, as by Detectron2's
                ``detector_postprocess``; by default the size of the candidates.
        """
        # 5. Clip. An empty box suppresses no other; its score of -1 puts it behind the others.
        fields, size = candidates.get_fields(), candidates.image_size
        boxes, scores = fields["pred_boxes"].tensor, fields["scores"]
        clipped = clip(boxes, size)
        nonempty = has_area(clipped)
        if self.clip_boxes == "before_nms":
            boxes, scores = clipped, torch.where(nonempty, scores, -1.0)

        # 6. Class-wise NMS, in float64: to keep the classes apart batched_nms may move their boxes
        # by several image sizes, which in float32 would round them by up to 1/128 pixel.
        classes = fields["pred_classes"]
        keep = batched_nms(boxes.double(), scores.double(), classes, self.nms_thresh)
        # Best first, of equal scores the first: batched_nms leaves the order of these open.
        keep = keep.sort().values
        keep = keep[scores[keep].argsort(descending=True, stable=True)]
        if self.max_detections_per_image >= 0:
            keep = keep[: self.max_detections_per_image]

        # 7. Scale, and leave out what is empty.
        if output_size is not None:
            Boxes(clipped).scale(output_size[1] / size[1], output_size[0] / size[0])
            clipped, size = clip(clipped, output_size), output_size
            nonempty &= has_area(clipped)
            if isinstance(size[1], Tensor):  # in a trace
                size = torch.stack(size)
        return _instances(size, keep[nonempty[keep]], fields | {"pred_boxes": Boxes(clipped)})

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
            cells = [image, torch.full_like(image, level), x, y]
            cells += [class_logits[image, :, y, x], outputs.ltrb[level][image, :, y, x]]
            if outputs.quality_logits is not None:
                cells.append(outputs.quality_logits[level][image, 0, y, x].float().sigmoid())
            selected.append(cells)
        # From here on all levels at once.
        image, level, x, y, logits, ltrb, *quality = map(torch.cat, zip(*selected, strict=True))
        if self.quality == "computed":
            quality = [centerness(ltrb)]  # NaN, and no candidate, for a box without extent
        elif self.quality in WITHOUT_FACTOR:
            quality = [torch.ones_like(ltrb[:, 0])]
        return _Cells(image, level, levels.locations(level, x, y), logits.float(), ltrb, *quality)

    def score(self, class_probability: Tensor, quality: Tensor) -> Tensor:
        """Scores of candidates, from tensors whose shapes broadcast."""
        if self.quality in WITHOUT_FACTOR:
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


def _instances(size: tuple[int, int], index: Tensor | slice, fields: dict) -> Instances:
    return Instances(size, **{name: values[index] for name, values in fields.items()})


def _entries_of_images(image: Tensor, num_images: int) -> list[slice]:
    """Where the entries of each image are, sorted by image. For one image no GPU is waited for."""
    if num_images == 1:
        return [slice(None)]
    # Bounds on CPU: a slice with a bound on GPU waits for it.
    bounds = torch.searchsorted(image, torch.arange(num_images + 1, device=image.device)).cpu()
    return [slice(begin, end) for begin, end in pairwise(bounds)]


def rank_in_groups(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) indices of the scores by group and best first, and the rank of each there, from 0.

    Of equal scores the first is the better.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    group = group[order]
    begin = torch.searchsorted(group, group)  # where the group of each entry begins
    return order, torch.arange(group.shape[0], device=group.device) - begin
