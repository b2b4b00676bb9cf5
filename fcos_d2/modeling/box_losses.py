"""IoU and box losses of predicted and true boxes, both as ltrb from the same location.

The location need not be inside. Distances beyond a side are negative, but no width or height is.

Shapes: P positives. ``predicted`` and ``target`` are (P, 4) distances.
"""

import torch
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss

_MIN_IOU = torch.finfo(torch.float32).tiny
# Pixels. So far from a location as images reach, float32 tells boxes of this size from empty ones.
_MIN_EXTENT = 0.01


def with_extent(ltrb: Tensor) -> Tensor:
    """(P, 4) distances to boxes that are 0.01 pixels wide and high at the least.

    The aspect ratio of "ciou" is then finite, and so is its gradient.
    """
    missing = (_MIN_EXTENT - (ltrb[:, :2] + ltrb[:, 2:])).clamp(min=0)
    return torch.cat([ltrb[:, :2], ltrb[:, 2:] + missing], dim=1)


def iou_of_ltrb(predicted: Tensor, target: Tensor) -> Tensor:
    """(P,) intersection over union."""
    intersection, union = _intersection_and_union(predicted, target)
    return intersection / union


def box_losses(predicted: Tensor, target: Tensor, box_loss_type: str) -> Tensor:
    """(P,) box losses.

    Args:
        box_loss_type: "iou" is -ln IoU (arXiv 1608.01471), "linear_iou" 1 - IoU; "giou" (arXiv
            1902.09630), "diou" and "ciou" (arXiv 1911.08287). For boxes apart from each other the
            first two are constant, 87.3 and 1.
    """
    if box_loss_type in ("diou", "ciou"):
        loss = distance_box_iou_loss if box_loss_type == "diou" else complete_box_iou_loss
        return loss(*(torch.cat([-x[:, :2], x[:, 2:]], dim=1) for x in (predicted, target)))
    intersection, union = _intersection_and_union(predicted, target)
    iou = intersection / union
    if box_loss_type == "iou":
        return -iou.clamp(min=_MIN_IOU).log()
    if box_loss_type == "linear_iou":
        return 1 - iou
    enclosing = _area(torch.maximum(predicted, target))
    return 1 - iou + (enclosing - union) / enclosing


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    # Of boxes apart, a side of what they have in common is beyond the opposite one.
    intersection = _product(_sides(torch.minimum(a, b)).clamp(min=0))
    return intersection, _area(a) + _area(b) - intersection


def _area(ltrb: Tensor) -> Tensor:
    return _product(_sides(ltrb))


def _sides(ltrb: Tensor) -> Tensor:
    """(P, 2) width and height."""
    return ltrb[:, :2] + ltrb[:, 2:]


def _product(sides: Tensor) -> Tensor:
    return sides[:, 0] * sides[:, 1]
