"""Geometry of locations: where the cells of a feature map lie, and boxes seen from there.

A cell (x, y) of a level with stride s sees the image at the location (s/2 + x*s, s/2 + y*s), or
with another offset than 1/2 at ((offset + x) * s, (offset + y) * s).
Seen from a location, a box is ltrb: its distances in pixels to the left, top, right and bottom
side (1904.01355, eq. 1), all positive where the location is inside the box.
"""

import torch
from torch import Tensor


def cell_locations(x: Tensor, y: Tensor, stride: float | Tensor, offset: float = 0.5) -> Tensor:
    """Locations of the cells in columns ``x`` and rows ``y`` of a level.

    Args:
        x: (...) integer column of each cell.
        y: (...) integer row of each cell.
        stride: pixels per cell, a number or a tensor of the shape of ``x``.
        offset: where in its cell a location is, in strides.

    Returns:
        (..., 2) float32 locations (x, y) in pixels.
    """
    return torch.stack([(x + offset) * stride, (y + offset) * stride], dim=-1).float()


def boxes_to_ltrb(locations: Tensor, boxes: Tensor) -> Tensor:
    """Distances from locations to the sides of boxes (1904.01355, eq. 1).

    Args:
        locations: (..., 2) in pixels.
        boxes: (..., 4) as x0, y0, x1, y1 in pixels.

    Returns:
        (..., 4) left, top, right, bottom in pixels; negative where the location is outside.
    """
    return torch.cat([locations - boxes[..., :2], boxes[..., 2:] - locations], dim=-1)


def ltrb_to_boxes(locations: Tensor, ltrb: Tensor) -> Tensor:
    """Inverse of :func:`boxes_to_ltrb`: (..., 4) boxes as x0, y0, x1, y1 in pixels."""
    return torch.cat([locations - ltrb[..., :2], locations + ltrb[..., 2:]], dim=-1)


def centerness(ltrb: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) (1904.01355, eq. 3).

    Args:
        ltrb: (P, 4) distances, none negative.

    Returns:
        (P,) in [0, 1]; 1 at the centre of the box, NaN where both distances of an axis are 0.
    """
    nearer = torch.minimum(ltrb[:, :2], ltrb[:, 2:])
    farther = torch.maximum(ltrb[:, :2], ltrb[:, 2:])
    return (nearer / farther).prod(dim=1).sqrt()
