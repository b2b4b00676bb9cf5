"""What is exported: an FCOS from pixels to detections, in operations that ONNX has.

Shapes: N images, (H, W) pixels, L levels, K classes, C candidates of an image (at most
``TOPK_CANDIDATES_TEST`` of each level), D ``TEST.DETECTIONS_PER_IMAGE``.

The steps are as in :mod:`fcos_d2.modeling.post_processing`, but what is no candidate stays, with a
score of 0: a graph that knows its sizes runs everywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from ..modeling import FCOS
from ..modeling.head import HeadOutputs
from ..modeling.points import centerness, ltrb_to_boxes

_LEAST_SCORE = 1e-30  # of a candidate, in place of 0, which marks what is no candidate


class RawGraph(nn.Module):
    """Images to the maps of the head. The model is in evaluation mode."""

    def __init__(self, model: FCOS):
        super().__init__()
        self.model = model

    @property
    def output_names(self) -> list[str]:
        """Such as ``class_logits_p3``: the kind of map and its level."""
        kinds = ["class_logits", "ltrb"]
        if self.model.head.ctrness is not None:
            kinds.append("quality_logits")
        return [f"{kind}_{level}" for kind in kinds for level in self.model.head_in_features]

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs = self.head_outputs(images)
        return [*outputs.class_logits, *outputs.ltrb, *(outputs.quality_logits or [])]

    def head_outputs(self, images: Tensor) -> HeadOutputs:
        """Normalise, pad to the stride of the backbone, run backbone and head."""
        model = self.model
        height, width = images.shape[-2:]
        stride = max(model.backbone.size_divisibility, 1)
        # Not -n // stride: ONNX rounds towards zero.
        right, below = ((n + stride - 1) // stride * stride - n for n in (width, height))
        pixels = (images.float() - model.pixel_mean) / model.pixel_std
        pixels = F.pad(pixels, (0, right, 0, below))
        features = model.backbone(pixels)
        return model.head([features[f] for f in model.head_in_features])


class DetectionGraph(RawGraph):
    """Images to detections."""

    def __init__(self, model: FCOS):
        super().__init__(model)
        post = model.post_processor
        score_thresh = post.score_thresh if post.score_thresh_on == "score" else -1.0
        # The check of the file replaces them by name. No other tensor has their shape: the exporter
        # merges equal tensors.
        self.register_buffer("logit_thresh", torch.full((1, 1, 1), post.logit_thresh))
        self.register_buffer("score_thresh", torch.full((1, 1, 1), score_thresh))

    @property
    def output_names(self) -> list[str]:
        return ["boxes", "scores", "classes", "num_detections"]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            images: (N, 3, H, W) of one size, in [0, 255].

        Returns:
            boxes (N, D, 4) as x0, y0, x1, y1 in pixels, scores (N, D), classes (N, D) int64, best
            first, and the number of detections (N,) int64; zeros where there are fewer than D.
        """
        post = self.model.post_processor
        clip_first = post.clip_boxes == "before_nms"
        outputs = self.head_outputs(images)
        levels = [self._candidates(outputs, level) for level in range(len(self.model.levels))]
        boxes, scores, classes = (torch.cat(x, dim=1) for x in zip(*levels, strict=True))
        valid = boxes.isfinite().all(dim=2)
        if clip_first:
            boxes = clip_boxes_to_image(boxes, images.shape[-2:])
            valid &= _nonempty(boxes)
        scores = self._suppress(boxes, torch.where(valid, scores, 0.0), classes)
        limit = post.max_detections_per_image
        boxes, scores, classes = _best(boxes, scores, classes, limit)
        if not clip_first:
            boxes = clip_boxes_to_image(boxes, images.shape[-2:])
            scores = torch.where(_nonempty(boxes), scores, 0.0)
            boxes, scores, classes = _best(boxes, scores, classes, limit)
        found = scores > 0
        boxes, classes = torch.where(found[..., None], boxes, 0.0), torch.where(found, classes, 0)
        return boxes, scores, classes, found.sum(dim=1)

    def _candidates(self, outputs: HeadOutputs, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best candidates of a level: boxes (N, k, 4), scores (N, k), classes (N, k)."""
        post, levels = self.model.post_processor, self.model.levels
        logits, ltrb = outputs.class_logits[level], outputs.ltrb[level]
        num_classes, width = logits.shape[1], logits.shape[3]
        k = post.topk_candidates
        if outputs.quality_logits is not None:
            quality = outputs.quality_logits[level].sigmoid()
        elif post.quality == "computed":
            quality = centerness(ltrb)[:, None]
        else:
            quality = torch.ones_like(ltrb[:, :1])
        scores = post.score(logits.sigmoid(), quality)
        # A score of NaN is not above the threshold.
        valid = (logits > self.logit_thresh) & (scores > self.score_thresh)
        scores = torch.where(valid, scores.clamp(min=_LEAST_SCORE), 0.0)
        scores = scores.permute(0, 2, 3, 1).flatten(1)  # of equal scores the first is the better
        # Always k of each level, for there may be fewer: sizes from here on are constants.
        scores, index = F.pad(scores, (0, k)).topk(k, dim=1)
        index = torch.where(scores > 0, index, 0)
        cell, classes = index // num_classes, index % num_classes
        row = cell // width
        locations = levels.locations(level, cell - row * width, row)  # % width has no translation
        ltrb = _take(ltrb.flatten(2).transpose(1, 2), cell)
        return ltrb_to_boxes(locations, ltrb), scores, classes

    def _suppress(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> Tensor:
        """Class-wise NMS: the scores (N, C), with 0 for what is suppressed."""
        post = self.model.post_processor
        of_class = classes[:, None] == torch.arange(self.model.num_classes)[:, None]  # (N, K, C)
        by_class = torch.where(of_class, scores[:, None], 0.0)
        limit = post.max_detections_per_image
        image, _, box = class_wise_nms(boxes, by_class, limit, post.nms_thresh).unbind(dim=1)
        kept = torch.ones_like(image, dtype=scores.dtype)
        return scores * torch.zeros_like(scores).index_put((image, box), kept)


def _nonempty(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=2)


def _take(boxes: Tensor, index: Tensor) -> Tensor:
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


def _best(boxes: Tensor, scores: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of each image; where there are fewer, what fills up has a score of 0."""
    scores, index = F.pad(scores, (0, k)).topk(k, dim=1)
    return _take(F.pad(boxes, (0, 0, 0, k)), index), scores, F.pad(classes, (0, k)).gather(1, index)


@torch.library.custom_op("fcos_d2::class_wise_nms", mutates_args=())
def class_wise_nms(boxes: Tensor, scores: Tensor, limit: int, iou: float) -> Tensor:
    """ONNX's NonMaxSuppression as an operator of PyTorch.

    Args:
        boxes: (N, C, 4).
        scores: (N, K, C); 0 for what is no candidate.
        limit: of boxes for each image and class. Used by ONNX only.
        iou: a box is suppressed by a better one with an IoU above this.

    Returns:
        (D, 3) int64 numbers of image, class and box of each that is kept.
    """
    image, class_number, box = (scores > 0).nonzero(as_tuple=True)
    group = image * scores.shape[1] + class_number
    scores = scores[image, class_number, box].double()
    keep = batched_nms(boxes[image, box].double(), scores, group, iou)
    return torch.stack([image, class_number, box], dim=1)[keep]


@class_wise_nms.register_fake
def _(boxes: Tensor, scores: Tensor, limit: int, iou: float) -> Tensor:
    num_kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(num_kept, 3, dtype=torch.int64)
