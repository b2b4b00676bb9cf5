"""Bilinear sampling of maps, in operators that can be exported."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_channels(maps: Tensor, offsets: Tensor) -> Tensor:
    """Each channel at places of its own, bilinear, and 0 beyond the border.

    As a deformable convolution of one cell, with a weight of 1 for each channel alone.

    Args:
        maps: (N, M, H, W).
        offsets: (N, 2 * M, H, W) in cells; for each channel down, then right.

    Returns:
        (N, M, H, W).
    """
    height, width = maps.shape[-2:]
    down, right = offsets.unflatten(1, (-1, 2)).unbind(dim=2)
    # A cell beyond the border all is 0, and what is farther away is the same.
    row = (torch.arange(height, device=maps.device)[:, None] + down).clamp(-1, height)
    column = (torch.arange(width, device=maps.device) + right).clamp(-1, width)
    first_row, first_column = row.floor(), column.floor()
    padded = F.pad(maps, (1, 2, 1, 2)).flatten(2)
    line = width + 3
    index = (first_row.long() + 1) * line + first_column.long() + 1
    # No index for NaN, which is a result of its own, may be outside of the memory.
    index = index.clamp(0, (height + 2) * line - 2).flatten(2)
    corners = [padded.gather(2, index + shift) for shift in (0, 1, line, line + 1)]
    top_left, top_right, bottom_left, bottom_right = (x.view_as(row) for x in corners)
    share = column - first_column
    top, bottom = (
        torch.lerp(top_left, top_right, share),
        torch.lerp(bottom_left, bottom_right, share),
    )
    return torch.lerp(top, bottom, row - first_row)
