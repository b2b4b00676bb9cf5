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

    @property
    def settings(self) -> dict:
        names = "center_radius", "candidate_topk", "iou_weight"
        return {name: getattr(self, name) for name in names}

    def choose(self, pairs: Pairs, outputs: HeadOutputs) -> Tensor:
        """(C,) 1 for what is chosen, else -1; see :meth:`DynamicAssigner.choose`."""
        cost = _cross_entropy(pairs, outputs)
        cost = cost - self.iou_weight * pairs.iou.clamp(min=_LEAST_IOU).log()
        chosen = pairs.rank(cost) < self._dynamic_k(pairs)[pairs.gt]
        return torch.where(pairs.wins(chosen, cost), 1.0, -1.0)

    def _dynamic_k(self, pairs: Pairs) -> Tensor:
        """(M,) how many locations each box takes."""
        k, rank = self.candidate_topk, pairs.rank(-pairs.iou)
        # Into a table, and not added up in place, which a GPU does in no fixed order. What is not
        # among the highest goes to an entry of its own.
        highest = pairs.iou.new_zeros(pairs.num_boxes * k + 1)
        highest[torch.where(rank < k, pairs.gt * k + rank, pairs.num_boxes * k)] = pairs.iou
        return highest[:-1].view(-1, k).sum(dim=1).floor().clamp(min=1)


def _cross_entropy(pairs: Pairs, outputs: HeadOutputs) -> Tensor:
    """(C,) binary cross entropy with the class of the box: -ln(1 - p) is ln(1 + e^x)."""
    by_level = zip(outputs.class_logits, pairs.targets.by_level(), strict=True)
    absent = [
        F.softplus(logits[image, :, y, x].float()).sum(dim=1)
        for logits, (image, y, x, _) in by_level
    ]
    # For the class of the box, -ln p is ln(1 + e^x) - x.
    return torch.cat(absent) - pairs.logit
