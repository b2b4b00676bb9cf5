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
from ..box_losses import iou_of_ltrb
from ..head import HeadOutputs
from ..points import Levels, boxes_to_ltrb
from ..validation import check_between
from .assigner import Assigner, boxes_of_batch
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
from .location import cells_of_windows

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

    def lowest(self, cost: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k candidates of lowest cost of each box, in order.

        Of equal costs the first candidate comes first: on the finest level, then in the upper row,
        then on the left.

        Returns:
            (M, k) int64 numbers of candidates, and (M, k) bool, false where a box has no more.
        """
        order = ((self.gt << 32) + in_order_of(cost)).sort(stable=True).indices
        count = torch.zeros(self.num_boxes, dtype=torch.int64, device=self.gt.device)
        count.scatter_add_(0, self.gt, torch.ones_like(self.gt))
        place = torch.arange(k, device=self.gt.device)
        exists = place < count[:, None]
        begin = (count.cumsum(0) - count)[:, None]
        return order[torch.where(exists, begin + place, 0)], exists

    def wins(self, chosen: Tensor, is_chosen: Tensor, cost: Tensor) -> Tensor:
        """(M, k) bool, whether a box has the lowest cost of those that chose the same location.

        Of equal costs the first box wins.

        Args:
            chosen: (M, k) numbers of the candidates that each box chose.
            is_chosen: (M, k) bool, false for what does not count.
            cost: (C,) of all candidates.
        """
        chosen_cost = torch.where(is_chosen, cost[chosen], math.inf).flatten()
        gt, cell = (values[chosen].flatten() for values in (self.gt, self.cell))
        return is_chosen & wins_cell(chosen_cost, gt, cell, self.num_cells).view_as(is_chosen)


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
        all_boxes, image_of_box = boxes_of_batch(boxes)
        first, count = self._windows(levels, level_shapes, all_boxes)
        level, gt, x, y = cells_of_windows(first, count[..., 0], count.prod(dim=2))
        ltrb = boxes_to_ltrb(levels.locations(level, x, y), all_boxes.index_select(0, gt))
        image = image_of_box.index_select(0, gt)
        return Candidates(image, level, x, y, gt, ltrb, cost=ltrb.new_zeros(len(gt)))

    def _windows(
        self, levels: Levels, level_shapes: Sequence[tuple[int, int]], boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(L, M, 2) first column and row, and number of columns and rows, of the candidates."""
        first, count = [], []
        for stride, shape in zip(levels.strides, level_shapes, strict=True):
            for begin, end, size in zip(*boxes.T.split(2), reversed(shape), strict=True):
                lines = (torch.arange(size, device=boxes.device) + levels.offset) * stride
                is_in = (lines > begin[:, None]) & (lines < end[:, None])  # (M, size)
                if self.center_radius > 0:
                    off_center = (lines - ((begin + end) / 2)[:, None]).abs()
                    is_in &= off_center < self.center_radius * stride
                first.append(is_in.byte().argmax(dim=1))
                count.append(is_in.sum(dim=1))
        of_axes = (torch.stack(x).view(len(levels), 2, -1) for x in (first, count))
        return tuple(x.transpose(1, 2) for x in of_axes)

    def choose(self, pairs: Pairs, outputs: HeadOutputs) -> tuple[Tensor, Tensor]:
        """What each box takes. Must not wait for a GPU.

        Args:
            pairs: at least one.

        Returns:
            (M, k) int64 numbers of candidates, no location twice, and (M, k) float32 scores that
            the class is to have, negative for what is not taken after all.
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
        if len(candidates) == 0:
            return Positives(**vars(candidates), score=candidates.cost)
        targets = targets_of(candidates, classes, candidates.cost, len(levels))
        targets, num_images = targets.to(outputs.class_logits[0].device), len(boxes)
        cell = cell_numbers(candidates, level_shapes, num_images)
        pairs = Pairs(
            targets=targets,
            gt=to_device(candidates.gt, targets.x.device),
            cell=to_device(cell, targets.x.device),
            logit=_logits_of_classes(outputs.class_logits, targets),
            iou=iou_of_ltrb(gather(outputs.ltrb, targets), targets.ltrb),
            num_boxes=sum(map(len, boxes)),
            num_cells=num_images * sum(height * width for height, width in level_shapes),
        )
        # In one copy, for which the host waits. float64 holds both exactly.
        taken = torch.stack([x.double().flatten() for x in self.choose(pairs, outputs)])
        number, score = taken.to(candidates.gt.device)
        order = torch.where(score < 0, math.inf, number).argsort()[: (score >= 0).sum()]
        number, score = number[order].long(), score[order].float()
        fields = {name: x.index_select(0, number) for name, x in vars(candidates).items()}
        return Positives(**fields, score=score)


def _logits_of_classes(logits: Sequence[Tensor], targets: Targets) -> Tensor:
    """(C,) float32 logits of the classes that the candidates would learn."""
    by_level = zip(logits, targets.by_level(), strict=True)
    of_levels = [level_map[image, classes, y, x] for level_map, (image, y, x, classes) in by_level]
    return torch.cat(of_levels).float()
