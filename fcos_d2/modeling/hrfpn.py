"""HRFPN (1904.04514), the feature pyramid that HRNet's authors put on its maps.

All maps are joined at the size of the finest one, and every level is pooled from that.

Shapes: N images, Ci channels of map i, (H, W) cells of the finest map, C channels of the result.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from fvcore.nn import weight_init
from torch import Tensor, nn


class HRFPN(Backbone):
    """A backbone whose maps are joined, and levels that are pooled from the whole."""

    def __init__(
        self,
        bottom_up: Backbone,
        *,
        in_features: Sequence[str],
        levels: Sequence[str],
        out_channels: int,
    ):
        """
        Args:
            in_features: the maps of ``bottom_up`` that are joined, finest first, as res2 to res5.
            levels: the names of the levels to make, finest first, as p3 to p7. The first one has
                the stride of the finest map or twice that; each other one, twice the one before.

        Raises:
            ValueError: for other levels, and for maps whose strides do not double.
        """
        super().__init__()
        shapes = [bottom_up.output_shape()[name] for name in in_features]
        strides = [shape.stride for shape in shapes]
        if any(b != 2 * a for a, b in pairwise(strides)):
            raise ValueError(
                "MODEL.FPN.IN_FEATURES of an HRFPN must be maps of which each has twice the stride "
                f"of the one before, got {list(in_features)} of the strides {strides}"
            )
        first = round(math.log2(strides[0]))
        choices = [[f"p{first + step + i}" for i in range(len(levels))] for step in (0, 1)]
        if list(levels) not in choices:
            raise ValueError(
                f"MODEL.FCOS.IN_FEATURES on an HRFPN must be levels without a gap from p{first} or "
                f"p{first + 1} on, as {choices[1]}, got {list(levels)}"
            )
        step = choices.index(list(levels))
        self.bottom_up = bottom_up
        self.in_features = list(in_features)
        self.reduction = nn.Conv2d(sum(shape.channels for shape in shapes), out_channels, 1)
        self.outputs = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, stride=1 + step, padding=1) for _ in levels
        )
        for conv in (self.reduction, *self.outputs):
            weight_init.c2_xavier_fill(conv)
        self._size_divisibility = strides[-1]
        self._shapes = {
            name: ShapeSpec(channels=out_channels, stride=strides[0] * 2 ** (step + i))
            for i, name in enumerate(levels)
        }

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.bottom_up(x)
        finest, *coarser = [features[name] for name in self.in_features]  # (N, Ci, ., .)
        size = finest.shape[-2:]
        coarser = [F.interpolate(x, size=size, mode="bilinear") for x in coarser]
        joined = self.reduction(torch.cat([finest, *coarser], dim=1))  # (N, C, H, W)
        return {
            name: output(_pool(joined, 2**i))
            for i, (name, output) in enumerate(zip(self._shapes, self.outputs, strict=True))
        }


def _pool(x: Tensor, window: int) -> Tensor:
    """The mean of each whole window; of all cells along a side that is shorter than one."""
    if window == 1:
        return x
    means = F.avg_pool2d(x, window, ceil_mode=True, count_include_pad=False)
    # max(n // window, 1), without a comparison, which a trace would freeze.
    whole = [n // window for n in x.shape[-2:]]
    height, width = (n + 1 // (n + 1) for n in whole)
    return means[..., :height, :width]
