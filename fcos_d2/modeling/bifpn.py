"""BiFPN (EfficientDet, 1911.09070, section 3) as AdelaiDet publishes it, with full convolutions.

Each of its layers makes new maps of all levels, first from the coarsest to the finest (top-down),
then back (bottom-up). A node is a weighted sum of maps, brought to its size, and a convolution.

Shapes: N images, L levels, Ci channels of level i, (Hi, Wi) its cells, C channels of the result.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from torch import Tensor, nn

from .validation import check_count

_EPSILON = 1e-4  # added to the sum of the weights of a node (1911.09070, section 3.3)


def bifpn_nodes(num_levels: int) -> list[tuple[int, list[int]]]:
    """(level, numbers of the inputs) of each node, in the order in which they are computed.

    The maps 0 to L - 1 are the inputs of the layer, finest first, and those from L on its nodes.
    """
    newest = list(range(num_levels))  # the number of the newest map of each level
    nodes = []

    def add(level: int, inputs: list[int]) -> None:
        newest[level] = num_levels + len(nodes)
        nodes.append((level, inputs))

    for level in reversed(range(num_levels - 1)):
        add(level, [level, newest[level + 1]])
    for level in range(1, num_levels):
        own = sorted({level, newest[level]})  # the coarsest level has no node of the way down
        add(level, [*own, newest[level - 1]])
    return nodes


class BiFPNLayer(nn.Module):
    """One pass down and up. The names of its parts have the level and the inputs of their node."""

    def __init__(self, in_channels: Sequence[int], out_channels: int, norm: str):
        super().__init__()
        self.nodes = bifpn_nodes(len(in_channels))
        self.levels = [*range(len(in_channels)), *(level for level, _ in self.nodes)]  # of all maps
        # Both nodes of a level read its input through the same lateral.
        for i, level in sorted({(i, level) for level, inputs in self.nodes for i in inputs}):
            if i < len(in_channels) and in_channels[i] != out_channels:
                lateral = _conv_norm(in_channels[i], out_channels, 1, norm, bias=True)
                self.add_module(f"lateral_{i}_f{level}", lateral)
        for level, inputs in self.nodes:
            name = _name(level, inputs)
            self.register_parameter(f"weights_{name}", nn.Parameter(torch.ones(len(inputs))))
            output = _conv_norm(out_channels, out_channels, 3, norm, bias=not norm)
            self.add_module(f"outputs_{name}", output)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """(N, Ci, Hi, Wi) of each level, finest first, to (N, C, Hi, Wi)."""
        maps = list(maps)
        for level, inputs in self.nodes:
            name = _name(level, inputs)
            weights = getattr(self, f"weights_{name}").relu()
            weights = weights / (weights.sum() + _EPSILON)
            total = 0
            for i, weight in zip(inputs, weights.unbind(), strict=True):
                lateral = getattr(self, f"lateral_{i}_f{level}", None)
                x = maps[i] if lateral is None else lateral(maps[i])
                if self.levels[i] < level:
                    x = _halve(x)
                elif self.levels[i] > level:
                    x = F.interpolate(x, size=maps[level].shape[-2:], mode="nearest")
                total = total + weight * x
            maps.append(getattr(self, f"outputs_{name}")(F.silu(total)))
        newest = dict(zip(self.levels, maps, strict=True))  # a later map takes the earlier's place
        return list(newest.values())


class BiFPN(Backbone):
    """A backbone, coarser levels made from its last map, and BiFPN layers on all of them."""

    def __init__(
        self,
        bottom_up: Backbone,
        *,
        in_features: Sequence[str],
        out_channels: int,
        num_top_levels: int = 2,
        num_repeats: int = 6,
        norm: str = "",
    ):
        """
        Args:
            in_features: the maps of ``bottom_up`` that are used, finest first, as res3, res4, res5.
            num_top_levels: how many coarser levels are made from the last of them.
            num_repeats: the number of layers.
            norm: of all convolutions, as Detectron2 names it.

        Raises:
            ValueError: for less than two levels, strides that do not double, and no layer.
        """
        super().__init__()
        check_count("TOP_LEVELS", num_top_levels, 0)
        check_count("BIFPN_REPEATS", num_repeats, 1)
        shapes = [bottom_up.output_shape()[name] for name in in_features]
        strides = [shape.stride for shape in shapes]
        self._size_divisibility = strides[-1]
        strides += [strides[-1] * 2 ** (i + 1) for i in range(num_top_levels)]
        if len(strides) < 2 or any(b != 2 * a for a, b in pairwise(strides)):
            raise ValueError(
                "MODEL.FPN.IN_FEATURES and MODEL.FCOS.TOP_LEVELS must make two levels or more for "
                f"a BiFPN, each with twice the stride of the one before, got {strides}"
            )
        self.bottom_up = bottom_up
        self.in_features = list(in_features)
        self.num_top_levels = num_top_levels
        channels = [shape.channels for shape in shapes]
        self.reduction = None
        if num_top_levels > 0 and channels[-1] != out_channels:
            self.reduction = _conv_norm(channels[-1], out_channels, 1, norm, bias=not norm)
        channels += [out_channels] * num_top_levels
        self.repeated_bifpn = nn.ModuleList(
            BiFPNLayer([out_channels] * len(channels) if i else channels, out_channels, norm)
            for i in range(num_repeats)
        )
        self._shapes = {
            f"p{int(math.log2(stride))}": ShapeSpec(channels=out_channels, stride=stride)
            for stride in strides
        }

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.bottom_up(x)
        maps = [features[name] for name in self.in_features]
        top = maps[-1] if self.reduction is None else self.reduction(maps[-1])
        for _ in range(self.num_top_levels):
            top = _halve(top)
            maps.append(top)
        for layer in self.repeated_bifpn:
            maps = layer(maps)
        return dict(zip(self._shapes, maps, strict=True))


def _name(level: int, inputs: Sequence[int]) -> str:
    return f"f{level}_" + "_".join(map(str, inputs))


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def _conv_norm(in_channels: int, out_channels: int, size: int, norm: str, bias: bool) -> Conv2d:
    norm_layer = get_norm(norm, out_channels)
    return Conv2d(in_channels, out_channels, size, padding=size // 2, bias=bias, norm=norm_layer)
