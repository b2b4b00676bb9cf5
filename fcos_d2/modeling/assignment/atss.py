"""Adaptive training sample selection: each box sets its own IoU threshold (arXiv 1912.02424).

Shapes: L levels, M boxes in the batch, k nearest cells, C candidates.

Each box looks for the k cells around its centre on each level. Only the k nearest columns and the k
nearest rows can have them, so the work grows with the number of boxes, not with boxes times cells.
"""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from torch import Tensor

from ..points import Levels, boxes_to_ltrb
from ..validation import check_count
from .assigner import Assigner, boxes_of_batch
from .candidates import Candidates

# Of the square around each location that a box is compared with, in strides (section 4.3).
_SIDE = 8


class ATSSAssigner(Assigner):
    """Adaptive training sample selection (1912.02424, section 4.1, algorithm 1).

    On each level a box considers the ``top_k`` locations nearest to its centre, on small levels all
    that there are. It takes those that are strictly inside, and where its IoU with a square of 8
    strides around the location is at least the mean plus the standard deviation of these IoUs on
    all levels. Of several boxes, a location learns the one with the highest IoU.

    Decided where the paper leaves it open: of equally near locations those in the nearest row
    count, of equally near rows the upper one, and in a row the left one; the deviation is that of a
    sample (of n values it divides by n - 1), and 0 of a single value; of equal IoUs, in float32,
    the first box wins. A box without a location, because none of the nearest is inside or all are
    other boxes', is not learnt. One larger than the image is treated as any other: its nearest
    locations are those around its centre, or at the border. Cells in the padding count, too.
    """

    @configurable
    def __init__(self, *, top_k: int = 9):
        """
        Args:
            top_k: 9 in the paper, which finds that 7 to 17 do alike.
        """
        check_count("ASSIGNMENT 'atss', top_k", top_k, 1)
        self.top_k = top_k
        # Pairs of a rank among columns and one among rows, for cells that can be among the nearest:
        # (a + 1) (b + 1) cells are at most as far as that of the ranks a and b. By row, for ties.
        ranks = [(a, b) for b in range(top_k) for a in range(top_k) if (a + 1) * (b + 1) <= top_k]
        self._ranks = list(map(list, zip(*ranks, strict=True)))  # not on the device of the model

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {}

    @property
    def settings(self) -> dict:
        return {"top_k": self.top_k}

    @torch.no_grad()
    def candidates(
        self, levels: Levels, level_shapes: Sequence[tuple[int, int]], boxes: Sequence[Tensor]
    ) -> Candidates:
        """All pairs of a location and a box that it may learn; the cost is -IoU.

        For arguments and errors see :meth:`Assigner.candidates`.
        """
        all_boxes, image_of_box = boxes_of_batch(boxes)
        x, y, exists = self._nearest(levels, level_shapes, all_boxes)
        level = torch.arange(len(levels), device=x.device)[:, None, None].expand_as(x)
        locations = levels.locations(level, x, y)
        ltrb = boxes_to_ltrb(locations.double(), all_boxes.double()[:, None])
        stride = torch.tensor(levels.strides, device=x.device)[:, None, None]
        # In float64 first, so that IoUs are equal in float32 where they are equal.
        iou = _iou_with_squares(ltrb, _SIDE / 2 * stride).float()
        ltrb = ltrb.float()
        is_high = iou >= _mean_plus_deviation(iou.double(), exists)[:, None]
        may_learn = (exists & is_high & (ltrb.amin(dim=3) > 0)).nonzero(as_tuple=True)
        level, gt, _ = may_learn
        return Candidates(
            image_of_box[gt], level, x[may_learn], y[may_learn], gt, ltrb[may_learn],
            -iou[may_learn],
        )  # fmt: skip

    def _nearest(
        self, levels: Levels, level_shapes: Sequence[tuple[int, int]], boxes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(L, M, k) columns and rows of the cells nearest to the centres, and whether they exist.

        On a level with fewer than k cells, some do not.
        """
        k, device = self.top_k, boxes.device
        stride = torch.tensor(levels.strides, dtype=torch.float64, device=device)[:, None, None]
        size = torch.tensor(level_shapes, device=device)[:, None].flip(2)  # (L, 1, 2) as W, H
        center = (boxes[:, :2].double() + boxes[:, 2:].double()) / 2  # (M, 2)
        # Of columns, and of rows, the k nearest follow one another.
        first = torch.ceil(center / stride - levels.offset - k / 2)
        first = torch.minimum(first, (size - k).double()).clamp(min=0)
        line = first.long()[..., None] + torch.arange(k, device=device)  # (L, M, 2, k)
        far = ((line + levels.offset) * stride[..., None] - center[..., None]).abs()
        far = torch.where(line < size[..., None], far.square(), torch.inf)
        far, order = far.sort(dim=3, stable=True)
        line = line.gather(3, order)

        ranks = torch.tensor(self._ranks, device=device)
        (x, y), (far_x, far_y) = (
            [values[:, :, axis].index_select(2, ranks[axis]) for axis in (0, 1)]
            for values in (line, far)
        )
        square, order = (far_x + far_y).sort(dim=2, stable=True)
        square, order = square[..., :k], order[..., :k]
        return x.gather(2, order), y.gather(2, order), square.isfinite()


def _iou_with_squares(ltrb: Tensor, half: Tensor) -> Tensor:
    """(...) IoU of boxes with squares around the locations.

    Args:
        ltrb: (..., 4) distances from the locations to the sides of the boxes.
        half: (...) half of a side of the squares.
    """
    common = torch.minimum(ltrb[..., :2], half[..., None])
    common = (common + torch.minimum(ltrb[..., 2:], half[..., None])).clamp(min=0).prod(dim=-1)
    return common / ((ltrb[..., :2] + ltrb[..., 2:]).prod(dim=-1) + (2 * half) ** 2 - common)


def _mean_plus_deviation(iou: Tensor, exists: Tensor) -> Tensor:
    """(M,) threshold of each box, from its (L, M, k) IoUs that exist."""
    count = exists.sum(dim=(0, 2))
    mean = torch.where(exists, iou, 0.0).sum(dim=(0, 2)) / count
    squares = torch.where(exists, (iou - mean[:, None]) ** 2, 0.0).sum(dim=(0, 2))
    return mean + (squares / (count - 1).clamp(min=1)).sqrt()
