"""What the rules share that choose by what the head predicts at the candidates.

Shapes: L levels, M boxes in the batch, C candidates.

The candidates follow from the boxes, on the host. The rule chooses among them where the outputs of
the head are, with operations of a size that the host knows, and the choice comes back: the one time
that the host waits for a GPU. From there on all is as with the rules that see boxes alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime import to_device
from ..head import HeadOutputs
from ..points import Levels
from ..validation import check_between
from .assigner import Assigner
from .candidates import (
    Candidates,
    Positives,
    Targets,
    cell_numbers,
    gather,
    in_order_of,
    targets_of,
    wins_cell,
)
from .location import LocationAssigner

_LARGE = 1e6


@dataclass(frozen=True)
class Pairs:
    """Candidates beside what the head predicts at them, on its device. No method waits for a GPU.

    Attributes:
        targets: what each candidate would learn, in the order of the candidates.
        gt: (C,) int64 index of the box.
        cell: (C,) int64 number of the cell among those of all levels and images.
        logit: (C,) float32 predicted for the class of the box.
        iou: (C,) float32 of the predicted box with the box, 0 if they do not meet.
        num_boxes: M.
        num_cells: of all levels and images.
    """

    targets: Targets
    gt: Tensor
    cell: Tensor
    logit: Tensor
    iou: Tensor
    num_boxes: int
    num_cells: int

    def rank(self, cost: Tensor) -> Tensor:
        """(C,) int64 place of each candidate among those of its box: 0 for the lowest cost.

        Of equal costs the first candidate comes first: on the finest level, then in the upper row,
        then on the left.
        """
        order = ((self.gt << 32) + in_order_of(cost)).sort(stable=True).indices
        count = torch.zeros(self.num_boxes, dtype=torch.int64, device=self.gt.device)
        count.scatter_add_(0, self.gt, torch.ones_like(self.gt))
        begin = count.cumsum(0) - count
        place = torch.arange(len(self.gt), device=self.gt.device) - begin[self.gt[order]]
        return torch.empty_like(order).scatter_(0, order, place)

    def wins(self, chosen: Tensor, cost: Tensor) -> Tensor:
        """(C,) bool, whether a box chose the location and has the lowest cost of those that did.

        Of equal costs the first box wins.
        """
        cost = torch.where(chosen, cost, math.inf)
        return chosen & wins_cell(cost, self.gt, self.cell, self.num_cells)

    def largest(self, values: Tensor) -> Tensor:
        """(C,) largest of the (C,) values, none negative, of all candidates of the same box."""
        largest = values.new_zeros(self.num_boxes)
        return largest.scatter_reduce_(0, self.gt, values, reduce="amax")[self.gt]


class DynamicAssigner(Assigner):
    """A rule that chooses by what the head predicts.

    The candidates of a box are the locations strictly inside of it, on all levels, and less than
    ``center_radius`` strides from its centre, on both axes. So a box has a few on each level,
    however large it is. A box without any is not learnt. One larger than the image has those in the
    image.

    Attributes:
        name: the value of ASSIGNMENT.
    """

    sees_predictions = True
    name: str

    def __init__(self, center_radius: float):
        """
        Args:
            center_radius: in strides; 0 for all locations inside the box.
        """
        check_between(f"ASSIGNMENT {self.name!r}, center_radius", center_radius, 0, _LARGE)
        self.center_radius = float(center_radius)

    def check_without_model(self) -> None:
        raise ValueError(
            f"MODEL.FCOS.ASSIGNMENT {self.name!r} chooses by what a model predicts: without a "
            "model there are no positives to count or to draw"
        )

    def check_parts(self, parts: int) -> None:
        if parts > 1:
            raise ValueError(
                f"SOLVER.ACCUMULATE {parts} needs the divisors of the losses before the first part "
                f"runs, and with MODEL.FCOS.ASSIGNMENT {self.name!r} they depend on what all parts "
                "predict: set SOLVER.ACCUMULATE 1, or ASSIGNMENT 'location' or 'atss'"
            )

    @torch.no_grad()
    def candidates(
        self, levels: Levels, level_shapes: Sequence[tuple[int, int]], boxes: Sequence[Tensor]
    ) -> Candidates:
        """See the class: level by level, box by box, row by row. The cost is not the rule's.

        For arguments and errors see :meth:`Assigner.candidates`.
        """
        everywhere = LocationAssigner([(0.0, math.inf)] * len(levels), self.center_radius)
        return everywhere.candidates(levels, level_shapes, boxes)

    def choose(self, pairs: Pairs, outputs: HeadOutputs) -> Tensor:
        """(C,) float32 score that the class is to have, negative for what is not chosen.

        A location is chosen for one box at most. Must not wait for a GPU.
        """
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        levels: Levels,
        level_shapes: Sequence[tuple[int, int]],
        boxes: Sequence[Tensor],
        classes: Tensor | None = None,
        outputs: HeadOutputs | None = None,
    ) -> Positives:
        """Assign the boxes of a batch; see :class:`Assigner`.

        Raises:
            ValueError: without ``outputs``, and if a box is not finite.
        """
        if outputs is None:
            self.check_without_model()
        candidates = self.candidates(levels, level_shapes, boxes)
        targets = targets_of(candidates, classes, candidates.cost, len(levels))
        device = outputs.class_logits[0].device
        on_device, num_images = targets.to(device), len(boxes)
        pairs = Pairs(
            targets=on_device,
            gt=to_device(candidates.gt, device),
            cell=to_device(cell_numbers(candidates, level_shapes, num_images), device),
            logit=_logits_of_classes(outputs.class_logits, on_device),
            iou=_iou(gather(outputs.ltrb, on_device), on_device.ltrb),
            num_boxes=sum(map(len, boxes)),
            num_cells=num_images * sum(height * width for height, width in level_shapes),
        )
        score = self.choose(pairs, outputs).to(candidates.gt.device)
        is_positive = score >= 0
        return Positives(**vars(candidates[is_positive]), score=score[is_positive])


def _logits_of_classes(logits: Sequence[Tensor], targets: Targets) -> Tensor:
    """(C,) float32 logits of the classes that the candidates would learn."""
    by_level = zip(logits, targets.by_level(), strict=True)
    of_levels = [level_map[image, classes, y, x] for level_map, (image, y, x, classes) in by_level]
    return torch.cat(of_levels).float()


def _iou(predicted: Tensor, target: Tensor) -> Tensor:
    """(C,) IoU of boxes as ltrb from the same locations, which need not be inside the predicted."""

    def area(ltrb: Tensor) -> Tensor:
        return (ltrb[:, :2] + ltrb[:, 2:]).clamp(min=0).prod(dim=1)

    common = area(torch.minimum(predicted, target))
    return common / (area(predicted) + area(target) - common)
