"""Task-aligned assignment: a box takes the locations good at its class and at its box (2108.07755).

Shapes: C candidates.
"""

import torch
from detectron2.config import configurable
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from ..head import HeadOutputs
from ..validation import check_between, check_count
from .assigner import Assigner
from .atss import ATSSAssigner
from .dynamic import DynamicAssigner, Pairs

_LARGE = 1e6


class TaskAlignedAssigner(DynamicAssigner):
    """Task alignment learning (TOOD, 2108.07755, section 3.2).

    The candidates of a box are the locations strictly inside of it and less than ``center_radius``
    strides from its centre, on both axes, on all levels. The alignment of one is
    t = s^alpha * u^beta, with the probability s of the class of the box and the IoU u of the
    predicted box. A box takes the ``top_k`` candidates of highest alignment, if it is not 0. Of
    several boxes that take a location, it learns the one of highest IoU. The score that the class
    is to have is t / (largest t of the box) * (largest u of the box), over what the box has won.

    Unlike in the paper, boxes larger than 16 strides leave out their far ends on such a level, with
    thousands of locations: FCOS's ranges let no location learn a box whose centre is more than 4
    strides away, but on the last level. ``center_radius`` 0 is the rule of the paper.

    Decided where the paper leaves it open: of equal alignments the first candidate is taken (finest
    level, then upper row, then left), and of boxes with equal IoUs the first wins. A box without
    candidates of an alignment above 0, or whose locations are all won by others, is not learnt in
    this step.

    The first ``atss_iters`` iterations of a training go by ATSS, as in the paper. The iteration is
    that of Detectron2's event storage: a checkpoint restores it, it is the same in all processes,
    and reading it waits for no GPU. Outside of a training there is none, and the rule is its own.
    """

    name = "task_aligned"
    makes_alignments = True

    @configurable
    def __init__(
        self,
        *,
        top_k: int = 13,
        alpha: float = 1.0,
        beta: float = 6.0,
        center_radius: float = 8.0,
        atss_iters: int = 0,
    ):
        """
        Args:
            top_k, alpha, beta: 13, 1 and 6 in the paper.
            center_radius: see :class:`DynamicAssigner`.
            atss_iters: SOLVER.ATSS_ITERS.
        """
        super().__init__(center_radius)
        check_count("ASSIGNMENT 'task_aligned', top_k", top_k, 1)
        check_between("ASSIGNMENT 'task_aligned', alpha", alpha, 0, _LARGE)
        check_between("ASSIGNMENT 'task_aligned', beta", beta, 0, _LARGE)
        self.top_k = top_k
        self.alpha = alpha
        self.beta = beta
        self.atss_iters = atss_iters
        self.first = ATSSAssigner()

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {"atss_iters": cfg.SOLVER.ATSS_ITERS}

    def now(self, is_training: bool) -> Assigner:
        """ATSS in the first iterations of a training, else this rule."""
        if is_training and has_event_storage() and get_event_storage().iter < self.atss_iters:
            return self.first
        return self

    def choose(self, pairs: Pairs, outputs: HeadOutputs) -> tuple[Tensor, Tensor]:
        """See :meth:`DynamicAssigner.choose`."""
        # In float64 first: in float32, what is equal may differ by the place in memory.
        probability = pairs.logit.double().sigmoid()
        alignment = (probability**self.alpha * pairs.iou.double() ** self.beta).float()
        chosen, exists = pairs.lowest(-alignment, self.top_k)
        is_chosen = exists & (alignment[chosen] > 0)
        wins = pairs.wins(chosen, is_chosen, -pairs.iou)
        won, iou = (torch.where(wins, x[chosen], 0.0) for x in (alignment, pairs.iou))
        score = won / won.amax(dim=1, keepdim=True) * iou.amax(dim=1, keepdim=True)
        return chosen, torch.where(wins, score, -1.0)
