"""SimOTA: each box takes as many of the cheapest locations as predict it well (arXiv 2107.08430).

Shapes: M boxes in the batch, C candidates, K classes.
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from ..head import HeadOutputs
from ..validation import check_between, check_count
from .dynamic import DynamicAssigner, Pairs

_LARGE = 1e6
_LEAST_IOU = 1e-7  # keeps -ln IoU finite, as in mmdetection


class SimOTAAssigner(DynamicAssigner):
    """Simplified optimal transport (2107.08430, section 2.1, "SimOTA").

    The candidates of a box are the locations strictly inside of it and less than ``center_radius``
    strides from its centre, on both axes. The cost of one is the binary cross entropy of its class
    probabilities, summed over the classes, with 1 for the class of the box and 0 for the others,
    plus ``iou_weight`` times -ln IoU of the predicted box. A box takes the k candidates of lowest
    cost, k being the sum of its ``candidate_topk`` highest IoUs, rounded down, and at least 1. Of
    several boxes that take a location, it learns the one of lowest cost.

    Decided where the paper leaves it open: of equal costs the first candidate is taken (finest
    level, then upper row, then left), and of several boxes the first wins; an IoU below 1e-7 counts
    as 1e-7; probabilities are those of the classes alone, without a factor of quality. A box whose
    k locations are all won by others is not learnt in this step, nor is one without a candidate.
    """

    name = "simota"

    @configurable
    def __init__(
        self, *, center_radius: float = 2.5, candidate_topk: int = 10, iou_weight: float = 3.0
    ):
        """
        Args:
            center_radius: see :class:`DynamicAssigner`. 2.5, 10 and 3 are the values of the
                authors' code.
        """
        super().__init__(center_radius)
        check_count("ASSIGNMENT 'simota', candidate_topk", candidate_topk, 1)
        check_between("ASSIGNMENT 'simota', iou_weight", iou_weight, 0, _LARGE)
        self.candidate_topk = candidate_topk
        self.iou_weight = iou_weight

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {}

    def choose(self, pairs: Pairs, outputs: HeadOutputs) -> tuple[Tensor, Tensor]:
        """See :meth:`DynamicAssigner.choose`; the scores are 1."""
        best, exists = pairs.lowest(-pairs.iou, self.candidate_topk)
        k = torch.where(exists, pairs.iou[best], 0.0).sum(dim=1).floor().clamp(min=1)
        # In float64 first: in float32, what is equal may differ by the place in memory.
        log_iou = pairs.iou.double().clamp(min=_LEAST_IOU).log()
        cost = (_cross_entropy(pairs, outputs) - self.iou_weight * log_iou).float()
        chosen, exists = pairs.lowest(cost, self.candidate_topk)  # k is at most as many
        place = torch.arange(self.candidate_topk, device=chosen.device)
        is_chosen = exists & (place < k[:, None])
        return chosen, torch.where(pairs.wins(chosen, is_chosen, cost), 1.0, -1.0)


def _cross_entropy(pairs: Pairs, outputs: HeadOutputs) -> Tensor:
    """(C,) float64 binary cross entropy with the class of the box."""
    absent = []
    for logits, (image, y, x, _) in zip(
        outputs.class_logits, pairs.targets.by_level(), strict=True
    ):
        # At the candidates, or where there are fewer cells, at all cells of the level.
        if len(image) < logits[:, 0].numel():
            absent.append(_of_absent(logits[image, :, y, x]))
        else:
            absent.append(_of_absent(logits)[image, y, x])
    # For the class of the box, -ln p is ln(1 + e^x) - x.
    return torch.cat(absent) - pairs.logit


def _of_absent(logits: Tensor) -> Tensor:
    """The sum over the classes, in the second dimension, of -ln(1 - p) = ln(1 + e^x)."""
    return F.softplus(logits.double()).sum(dim=1)
