"""IoU and box losses of predicted and true boxes, both as ltrb from the same location.

The location is inside both, so the intersection is the minimum of each distance, without clamping.

Shapes: P positives. ``predicted`` and ``target`` are (P, 4) distances, all > 0.
"""

import torch
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss


def iou_of_ltrb(predicted: Tensor, target: Tensor) -> Tensor:
    """(P,) intersection over union."""
    intersection, union = _intersection_and_union(predicted, target)
    return intersection / union


def box_losses(predicted: Tensor, target: Tensor, box_loss_type: str) -> Tensor:
    """(P,) box losses.

    Args:
        box_loss_type: "iou" is -ln IoU (arXiv 1608.01471), "linear_iou" 1 - IoU; "giou" (arXiv
            1902.09630), "diou" and "ciou" (arXiv 1911.08287).
    """
    if box_loss_type in ("diou", "ciou"):
        loss = distance_box_iou_loss if box_loss_type == "diou" else complete_box_iou_loss
        return loss(*(torch.cat([-x[:, :2], x[:, 2:]], dim=1) for x in (predicted, target)))
    intersection, union = _intersection_and_union(predicted, target)
    iou = intersection / union
    if box_loss_type == "iou":
        return -iou.log()
    if box_loss_type == "linear_iou":
        return 1 - iou
    enclosing = _area(torch.maximum(predicted, target))
    return 1 - iou + (enclosing - union) / enclosing


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    intersection = _area(torch.minimum(a, b))
    return intersection, _area(a) + _area(b) - intersection


def _area(ltrb: Tensor) -> Tensor:
    return (ltrb[:, 0] + ltrb[:, 2]) * (ltrb[:, 1] + ltrb[:, 3])
