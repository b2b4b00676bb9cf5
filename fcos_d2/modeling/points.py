"""Geometry: the locations of the cells of feature maps, and boxes as ltrb from there.

ltrb are the distances in pixels from a location to the left, top, right and bottom side of a box
(1904.01355, eq. 1), all positive if the location is inside the box.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime import to_device
from .validation import check_between


@dataclass(frozen=True)
class Levels:
    """Where the cells of each feature level lie in the image.

    The cell in column x and row y of a level with stride s has the location
    ((offset + x) * s, (offset + y) * s). With the default offset this is the middle of the cell
    (1904.01355, section 3.1).

    Attributes:
        strides: pixels per cell of each level, finest first.
        offset: where in its cell a location is, in strides, from 0 to 1.
    """

    strides: tuple[int, ...]
    offset: float = 0.5

    def __post_init__(self):
        check_between("LOCATION_OFFSET", self.offset, 0, 1)

    def __len__(self) -> int:
        return len(self.strides)

    def shapes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(Hi, Wi) in cells of each level, for images padded to (height, width) in pixels."""
        return [(math.ceil(height / s), math.ceil(width / s)) for s in self.strides]

    def locations(self, level: int | Tensor, x: Tensor, y: Tensor) -> Tensor:
        """(..., 2) float32 locations (x, y) in pixels of cells.

        Args:
            level: the level of all cells, or (...) int64 level of each.
            x, y: (...) integer column and row of each cell.
        """
        if isinstance(level, int):
            stride = self.strides[level]
        else:
            stride = to_device(torch.tensor(self.strides), level.device)[level]
        return torch.stack([(x + self.offset) * stride, (y + self.offset) * stride], dim=-1).float()

    def all_locations(self, level: int, height: int, width: int, device: torch.device) -> Tensor:
        """(height * width, 2) locations of all cells of a level, row by row."""
        y, x = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        return self.locations(level, x.flatten(), y.flatten())


def boxes_to_ltrb(locations: Tensor, boxes: Tensor) -> Tensor:
    """Distances from locations to the sides of boxes (1904.01355, eq. 1).

    Args:
        locations: (..., 2) in pixels.
        boxes: (..., 4) as x0, y0, x1, y1 in pixels.

    Returns:
        (..., 4) left, top, right, bottom in pixels; negative beyond a side.
    """
    return torch.cat([locations - boxes[..., :2], boxes[..., 2:] - locations], dim=-1)


def ltrb_to_boxes(locations: Tensor, ltrb: Tensor) -> Tensor:
    """Inverse of :func:`boxes_to_ltrb`: (..., 4) boxes as x0, y0, x1, y1 in pixels."""
    return torch.cat([locations - ltrb[..., :2], locations + ltrb[..., 2:]], dim=-1)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, 4) boxes inside an image of (height, width). Unlike Boxes.clip, waits for no GPU."""
    x = boxes[:, 0::2].clamp(min=0, max=size[1])
    y = boxes[:, 1::2].clamp(min=0, max=size[0])
    return torch.stack([x, y], dim=2).flatten(1)


def has_area(boxes: Tensor) -> Tensor:
    """(C,) whether boxes are wider and higher than 0."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def centerness(ltrb: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) (1904.01355, eq. 3).

    Args:
        ltrb: (P, 4, ...) distances, none negative.

    Returns:
        (P, ...) in [0, 1]; 1 at the centre of the box, NaN where both distances of an axis are 0.
    """
    nearer = torch.minimum(ltrb[:, :2], ltrb[:, 2:])
    farther = torch.maximum(ltrb[:, :2], ltrb[:, 2:])
    return (nearer / farther).prod(dim=1).sqrt()
