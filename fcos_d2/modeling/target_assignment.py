"""Which location learns which box.

Shapes: N images, L levels, M boxes in the batch, P positives, R cells of all levels of an image.

Every box proposes the few cells it could own, instead of every cell looking at every box. A box
can only own cells in a window: within the centre sampling radius, and near enough to its far
sides to stay under the level's upper bound. So the work grows with the number of boxes times a
few cells, never with R * M.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import configurable
from torch import Tensor

from .points import boxes_to_ltrb, cell_locations
from .transfer import to_device

# Widens each window by a hundredth of a cell, so that float rounding cannot lose a cell that the
# exact test would accept. What the wider window proposes in excess, the exact test rejects.
_WINDOW_MARGIN = 0.01


@dataclass(frozen=True)
class Positives:
    """The positive locations of a batch. Background is everything that is not listed.

    Ordered by level; no cell of an image is listed twice.

    Attributes:
        image: (P,) int64 index of the image in the batch.
        level: (P,) int64 index of the level, 0 is the finest.
        cell: (P,) int64 y * width + x of the cell on its level.
        gt: (P,) int64 index of the box that the location learns, into the boxes of all images
            concatenated.
        per_level: how many there are on each level; on the host, so that a GPU need not be asked.
    """

    image: Tensor
    level: Tensor
    cell: Tensor
    gt: Tensor
    per_level: list[int]

    def __len__(self) -> int:
        return len(self.gt)

    def to(self, device: torch.device) -> "Positives":
        tensors = (self.image, self.level, self.cell, self.gt)
        return Positives(*(to_device(x, device) for x in tensors), self.per_level)


class LocationAssigner:
    """Location-based target assignment (1904.01355, section 3.2; 2006.09214, section 3).

    A location may learn a box if it is strictly inside it, if the largest of its four distances
    to the box's sides is in the regression range of the location's level (bounds included), and,
    with centre sampling, if it is strictly within ``radius * stride`` of the box centre on both
    axes. Of several such boxes the one with the smallest area (in float32) wins, of equal ones
    the first.
    """

    @configurable
    def __init__(
        self,
        regression_ranges: Sequence[tuple[float, float]],
        center_sampling_radius: float,
        location_offset: float = 0.5,
    ):
        """
        Args:
            regression_ranges: (lower, upper) in pixels for each level, finest first.
            center_sampling_radius: in strides; 0 takes all locations in the box.
            location_offset: where in its cell a location is, in strides.

        Raises:
            ValueError: for a range with lower >= upper, or a negative radius.
        """
        for lower, upper in regression_ranges:
            if not lower < upper:
                raise ValueError(
                    f"REGRESSION_RANGES: lower must be below upper, got [{lower}, {upper}]"
                )
        if not center_sampling_radius >= 0:
            raise ValueError(f"CENTER_SAMPLING_RADIUS must be >= 0, got {center_sampling_radius}")
        self.regression_ranges = [(float(low), float(high)) for low, high in regression_ranges]
        self.radius = float(center_sampling_radius)
        self.location_offset = float(location_offset)

    @classmethod
    def from_config(cls, cfg) -> dict:
        fcos = cfg.MODEL.FCOS
        return {
            "regression_ranges": fcos.REGRESSION_RANGES,
            "center_sampling_radius": fcos.CENTER_SAMPLING_RADIUS,
            "location_offset": fcos.LOCATION_OFFSET,
        }

    def check_levels(self, in_features: Sequence[str]) -> None:
        """Raise a ValueError unless there are as many regression ranges as levels."""
        if len(self.regression_ranges) != len(in_features):
            raise ValueError(
                f"{len(self.regression_ranges)} REGRESSION_RANGES for the {len(in_features)} "
                f"levels {list(in_features)}: they must be as many"
            )

    @torch.no_grad()
    def __call__(
        self,
        level_shapes: Sequence[tuple[int, int]],
        strides: Sequence[int],
        boxes: Sequence[Tensor],
    ) -> Positives:
        """Assign the boxes of a batch. Runs on the device of the boxes; on CPU no GPU waits.

        Arguments and errors are those of :meth:`candidates`.
        """
        return self.resolve(self.candidates(level_shapes, strides, boxes), level_shapes, boxes)

    @torch.no_grad()
    def resolve(
        self, found: Positives, level_shapes: Sequence[tuple[int, int]], boxes: Sequence[Tensor]
    ) -> Positives:
        """Give each location that :meth:`candidates` lists to one of its boxes.

        Args:
            found: the candidates of the same levels and boxes.
        """
        place = self.place(found, level_shapes, len(boxes))
        # The smallest area wins, then the lowest box number. The bits of a non-negative float32,
        # read as an integer, are ordered like the float: area and number make one exact key.
        all_boxes = torch.cat(list(boxes)).float()
        size = all_boxes[:, 2:] - all_boxes[:, :2]
        area = (size[:, 0] * size[:, 1])[found.gt]
        key = (area.view(torch.int32).long() << 32) | found.gt
        num_places = len(boxes) * sum(height * width for height, width in level_shapes)
        smallest = torch.full((num_places,), torch.iinfo(torch.int64).max, device=place.device)
        smallest.scatter_reduce_(0, place, key, reduce="amin")
        won = smallest[place] == key
        level = found.level[won]
        per_level = torch.bincount(level, minlength=len(level_shapes)).tolist()
        return Positives(found.image[won], level, found.cell[won], found.gt[won], per_level)

    @torch.no_grad()
    def candidates(
        self,
        level_shapes: Sequence[tuple[int, int]],
        strides: Sequence[int],
        boxes: Sequence[Tensor],
    ) -> Positives:
        """All pairs of a location and a box that it may learn.

        An ambiguous location is listed once for each of its boxes; the assignment keeps one.

        Args:
            level_shapes: (height, width) in cells of each level.
            strides: pixels per cell of each level.
            boxes: for each image (Mi, 4) as x0, y0, x1, y1 in pixels of the network input.

        Raises:
            ValueError: if the number of levels is not that of the regression ranges, or if a box
                is not finite.
        """
        if not len(level_shapes) == len(strides) == len(self.regression_ranges):
            raise ValueError(
                f"{len(self.regression_ranges)} REGRESSION_RANGES for {len(level_shapes)} levels "
                f"with {len(strides)} strides: IN_FEATURES and REGRESSION_RANGES must be as many"
            )
        all_boxes = torch.cat(list(boxes)).float()
        device = all_boxes.device
        per_image = torch.tensor([len(b) for b in boxes], device=device)
        image_of_box = torch.arange(len(boxes), device=device).repeat_interleave(per_image)
        bad = ~torch.isfinite(all_boxes).all(dim=1)
        if bad.any():
            raise ValueError(
                "Ground-truth boxes must be finite; not so in the image(s) number "
                f"{image_of_box[bad].unique().tolist()} of the batch: {all_boxes[bad].tolist()}"
            )

        level, box, x, y = self._propose(level_shapes, strides, all_boxes)
        keep = self._is_candidate(all_boxes[box], strides, level, x, y)
        level, box, x, y = level[keep], box[keep], x[keep], y[keep]

        widths = torch.tensor([width for _, width in level_shapes], device=device)
        per_level = torch.bincount(level, minlength=len(level_shapes)).tolist()
        return Positives(image_of_box[box], level, y * widths[level] + x, box, per_level)

    @staticmethod
    def place(
        positives: Positives, level_shapes: Sequence[tuple[int, int]], num_images: int
    ) -> Tensor:
        """(P,) int64 number of each cell among those of all levels and images of the batch."""
        sizes = [height * width for height, width in level_shapes]
        cells = torch.tensor(sizes, device=positives.cell.device)
        level_begin = num_images * (cells.cumsum(0) - cells)
        level = positives.level
        return level_begin[level] + positives.image * cells[level] + positives.cell

    def _propose(
        self, level_shapes: Sequence[tuple[int, int]], strides: Sequence[int], boxes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """List (level, box, x, y) for a window of cells of every box, level by level.

        Each is (C,) int64. The windows hold every cell that :meth:`_is_candidate` accepts.
        """
        device = boxes.device
        ranges = torch.tensor(self.regression_ranges, dtype=torch.float64, device=device)
        lower, upper = ranges[:, :, None].unbind(dim=1)  # (L, 1)
        stride = torch.tensor(strides, dtype=torch.float64, device=device)[:, None]
        num_cells = torch.tensor(level_shapes, device=device)[:, None].flip(2)  # (L, 1, 2) as W, H
        begin_box, end_box = boxes.double().split(2, dim=1)  # (M, 2) as x, y

        # The open interval of locations (L, M, 2) that are inside the box, and not so far from
        # the opposite side that they exceed the upper bound.
        low = torch.maximum(begin_box, end_box - upper[..., None])
        high = torch.minimum(end_box, begin_box + upper[..., None])
        largest = (end_box - begin_box).amax(dim=1)  # (M,) at least max(ltrb) of any location
        if self.radius > 0:
            reach = self.radius * stride
            center = (boxes[:, :2] + boxes[:, 2:]).double() / 2
            low = torch.maximum(low, center - reach[..., None])
            high = torch.minimum(high, center + reach[..., None])
            largest = torch.minimum(largest, largest / 2 + reach)  # (L, M)

        offset = self.location_offset
        first = torch.ceil(low / stride[..., None] - offset - _WINDOW_MARGIN).clamp(min=0)
        last = torch.floor(high / stride[..., None] - offset + _WINDOW_MARGIN)
        last = torch.minimum(last, num_cells - 1.0)
        count = (last - first + 1).clamp(min=0)  # (L, M, 2) cells per axis
        reachable = largest >= lower - _WINDOW_MARGIN * stride
        per_pair = (count.prod(dim=2) * reachable).long()

        level, box = per_pair.nonzero(as_tuple=True)
        per_pair = per_pair[level, box]
        pair = torch.arange(len(level), device=device).repeat_interleave(per_pair)
        number = torch.arange(len(pair), device=device) - (per_pair.cumsum(0) - per_pair)[pair]
        first, columns = first[level, box].long()[pair], count[level, box, 0].long()[pair]
        row = torch.div(number, columns, rounding_mode="floor")
        x, y = first[:, 0] + number - row * columns, first[:, 1] + row
        return level[pair], box[pair], x, y

    def _is_candidate(
        self, boxes: Tensor, strides: Sequence[int], level: Tensor, x: Tensor, y: Tensor
    ) -> Tensor:
        """(C,) bool: may the cell (x, y) of the level learn the box beside it? In float32."""
        stride = torch.tensor(strides, dtype=torch.float32, device=boxes.device)[level]
        ranges = torch.tensor(self.regression_ranges, device=boxes.device)[level]
        locations = cell_locations(x, y, stride, self.location_offset)
        ltrb = boxes_to_ltrb(locations, boxes)
        farthest = ltrb.amax(dim=1)
        accepted = (ltrb.amin(dim=1) > 0) & (farthest >= ranges[:, 0]) & (farthest <= ranges[:, 1])
        if self.radius > 0:
            center = (boxes[:, :2] + boxes[:, 2:]) / 2
            off_center = (locations - center).abs().amax(dim=1)
            accepted &= off_center < self.radius * stride
        return accepted
