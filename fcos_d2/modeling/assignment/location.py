"""The rule of the FCOS papers: each location looks at the boxes around it.

Shapes: L levels, M boxes in the batch, C candidates.

Every box proposes the few cells it could own, instead of every cell looking at every box. A box
can only own cells in a window: within the centre sampling radius, and near enough to its far
sides to stay under the level's upper bound. So the work grows with the number of boxes, not with
boxes times cells.
"""

import math
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from torch import Tensor

from ..points import Levels, boxes_to_ltrb
from ..validation import values_of_keys
from .assigner import Assigner, boxes_of_batch
from .candidates import Candidates

# In cells. Rounding must not lose a cell at the edge of a window; the exact test in _may_learn
# rejects those that the wider window adds.
_WINDOW_MARGIN = 0.01


class LocationAssigner(Assigner):
    """Location-based assignment (1904.01355, section 3.2; 2006.09214, section 3).

    A location may learn a box if it is strictly inside, if the largest of its distances to the
    four sides is in the regression range of its level (bounds included), and, with centre
    sampling, if it is less than ``radius * stride`` from the box centre on both axes. Of several
    boxes it learns the one with the smallest area.
    """

    @configurable
    def __init__(
        self, regression_ranges: Sequence[tuple[float, float]], center_sampling_radius: float
    ):
        """
        Args:
            regression_ranges: (lower, upper) in pixels for each level, finest first.
            center_sampling_radius: in strides; 0 for no centre sampling.

        Raises:
            ValueError: for ranges that are not pairs 0 <= lower < upper, for a bound below that of
                a finer level, and for a negative or infinite radius.
        """
        self.regression_ranges = _check_ranges(regression_ranges)
        if not 0 <= center_sampling_radius < math.inf:
            raise ValueError(f"CENTER_SAMPLING_RADIUS must be >= 0, got {center_sampling_radius}")
        self.radius = float(center_sampling_radius)

    @classmethod
    def from_config(cls, cfg) -> dict:
        return values_of_keys(cfg, "REGRESSION_RANGES", "CENTER_SAMPLING_RADIUS")

    def check_levels(self, levels: Sequence) -> None:
        """Raise a ValueError unless there are as many regression ranges as levels."""
        if len(self.regression_ranges) != len(levels):
            raise ValueError(
                f"{len(self.regression_ranges)} REGRESSION_RANGES for the {len(levels)} levels "
                f"{list(levels)}: IN_FEATURES and REGRESSION_RANGES must be as many"
            )

    @property
    def settings(self) -> dict:
        """See :class:`Assigner`; None for an infinite bound: JSON has no infinity."""
        return {
            "regression_ranges": [
                [low, None if high == math.inf else high] for low, high in self.regression_ranges
            ],
            "center_sampling_radius": self.radius,
        }

    @torch.no_grad()
    def candidates(
        self, levels: Levels, level_shapes: Sequence[tuple[int, int]], boxes: Sequence[Tensor]
    ) -> Candidates:
        """All pairs of a location and a box that it may learn; the cost is the area of the box.

        For arguments see :meth:`Assigner.candidates`.

        Raises:
            ValueError: if there are not as many levels as regression ranges, or if a box is not
                finite.
        """
        self.check_levels(levels.strides)
        self.check_levels(level_shapes)
        all_boxes, image_of_box = boxes_of_batch(boxes)
        level, gt, x, y = self._propose(levels, level_shapes, all_boxes)
        locations, boxes_there = levels.locations(level, x, y), all_boxes.index_select(0, gt)
        ltrb = boxes_to_ltrb(locations, boxes_there)
        may_learn = self._may_learn(levels, level, locations, boxes_there, ltrb)
        size = all_boxes[:, 2:] - all_boxes[:, :2]
        area = (size[:, 0] * size[:, 1])[gt]
        return Candidates(image_of_box[gt], level, x, y, gt, ltrb, area)[may_learn]

    def _propose(
        self, levels: Levels, level_shapes: Sequence[tuple[int, int]], boxes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(level, gt, x, y) of all cells in a window of each box on each level.

        All are int64 vectors, level by level. The windows hold every cell that :meth:`_may_learn`
        accepts.
        """
        device = boxes.device
        ranges = torch.tensor(self.regression_ranges, dtype=torch.float64, device=device)
        lower, upper = ranges[:, :, None].unbind(dim=1)  # (L, 1)
        stride = torch.tensor(levels.strides, dtype=torch.float64, device=device)[:, None]
        size = torch.tensor(level_shapes, device=device)[:, None].flip(2)  # (L, 1, 2) as W, H
        begin_box, end_box = boxes.double().split(2, dim=1)  # (M, 2) as x, y

        # (L, M, 2) the interval of locations inside the box and within the upper bound of the
        # opposite side.
        low = torch.maximum(begin_box, end_box - upper[..., None])
        high = torch.minimum(end_box, begin_box + upper[..., None])
        largest = (end_box - begin_box).amax(dim=1)  # (M,) no max(ltrb) is larger
        if self.radius > 0:
            reach = self.radius * stride
            center = (boxes[:, :2] + boxes[:, 2:]).double() / 2
            low = torch.maximum(low, center - reach[..., None])
            high = torch.minimum(high, center + reach[..., None])
            largest = torch.minimum(largest, largest / 2 + reach)  # (L, M)

        first = torch.ceil(low / stride[..., None] - levels.offset - _WINDOW_MARGIN).clamp(min=0)
        last = torch.floor(high / stride[..., None] - levels.offset + _WINDOW_MARGIN)
        last = torch.minimum(last, size - 1.0)
        count = (last - first + 1).clamp(min=0)  # (L, M, 2) cells per axis
        reachable = largest >= lower - _WINDOW_MARGIN * stride
        num_cells = (count.prod(dim=2) * reachable).long()  # (L, M) of each window

        return cells_of_windows(first.long(), count[..., 0].long(), num_cells)

    def _may_learn(
        self, levels: Levels, level: Tensor, locations: Tensor, boxes: Tensor, ltrb: Tensor
    ) -> Tensor:
        """(C,) bool, whether each location may learn the box beside it, in float32."""
        lower, upper = torch.tensor(self.regression_ranges, device=level.device)[level].unbind(1)
        farthest = ltrb.amax(dim=1)
        accepted = (ltrb.amin(dim=1) > 0) & (farthest >= lower) & (farthest <= upper)
        if self.radius > 0:
            stride = torch.tensor(levels.strides, device=level.device)[level]
            center = (boxes[:, :2] + boxes[:, 2:]) / 2
            off_center = (locations - center).abs().amax(dim=1)
            accepted &= off_center < self.radius * stride
        return accepted


def cells_of_windows(
    first: Tensor, columns: Tensor, num_cells: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(level, gt, x, y) of all cells of windows, level by level, box by box, row by row.

    Args:
        first: (L, M, 2) column and row of the first cell of each box's window on each level.
        columns: (L, M) of the windows.
        num_cells: (L, M) of the windows.
    """
    device = first.device
    level, gt = num_cells.nonzero(as_tuple=True)
    num_cells, first, columns = num_cells[level, gt], first[level, gt], columns[level, gt]
    window = torch.arange(len(level), device=device).repeat_interleave(num_cells)
    of_windows = level, gt, num_cells.cumsum(0) - num_cells, columns, first[:, 0], first[:, 1]
    level, gt, begin, columns, x, y = (v.index_select(0, window) for v in of_windows)
    number = torch.arange(len(window), device=device) - begin  # in its window, row by row
    row = torch.div(number, columns, rounding_mode="floor")
    return level, gt, x + number - row * columns, y + row


def _check_ranges(ranges: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    try:
        pairs = [(float(lower), float(upper)) for lower, upper in ranges]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"REGRESSION_RANGES must be [lower, upper] for each level, got {ranges}"
        ) from error
    for given, (lower, upper) in zip(ranges, pairs, strict=True):
        if not lower < upper:
            raise ValueError(f"REGRESSION_RANGES: lower must be below upper, got {list(given)}")
    for bounds in zip((0.0, 0.0), *pairs, strict=True):
        if list(bounds) != sorted(bounds):
            raise ValueError(
                "REGRESSION_RANGES are not negative, and go from small to large as the levels do, "
                f"got {list(map(list, ranges))}"
            )
    return pairs
