"""The layers that heads are made of, which all levels share.

Shapes: N images, C channels, (Hi, Wi) cells of level i. A list has an entry for each level.
"""

from collections.abc import Container, Sequence

import torch
from detectron2.layers import ShapeSpec, get_norm
from torch import Tensor, nn

from .deform_conv import SelfModulatedDeformConv
from .validation import check_choice


class PerLevelNorm(nn.ModuleList):
    """One norm for each level, for norms that keep statistics (BN, SyncBN)."""


class Tower(nn.Sequential):
    """Convolutions that all levels share."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        for layer in self:
            features = run_on_levels(layer, features)
        return features


def run_on_levels(layer: nn.Module, features: list[Tensor]) -> list[Tensor]:
    """What a layer makes of the features of each level."""
    of_levels = layer if isinstance(layer, PerLevelNorm) else [layer] * len(features)
    return [module(x) for module, x in zip(of_levels, features, strict=True)]


class Scale(nn.Module):
    """A learned scalar: s_i of exp(s_i x) (1904.01355, section 3.2)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def conv_layers(
    num_convs: int,
    channels: int,
    norm: str,
    num_levels: int,
    deformable: Container[int] = (),
    deform_groups: int = 1,
) -> list[nn.Module]:
    """Convolutions, each with its norm and ReLU.

    Args:
        deformable: the numbers, from 0, of those that are deformable.
        deform_groups: groups of channels of these that share their offsets.
    """
    layers: list[nn.Module] = []
    for i in range(num_convs):
        if i in deformable:
            layers.append(SelfModulatedDeformConv(channels, deform_groups))
        else:
            layers.append(conv3x3(channels, channels))
        layers += norm_layers(norm, channels, num_levels)
        layers.append(nn.ReLU(inplace=True))
    return layers


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def norm_layers(name: str, channels: int, num_levels: int) -> list[nn.Module]:
    """The norm that NORM names; none for ""."""
    return [_norm(name, channels, num_levels)] if name else []


def _norm(name: str, channels: int, num_levels: int) -> nn.Module:
    if name == "GN":
        return get_norm(name, channels)
    if name == "SyncBN" and not torch.cuda.is_available():
        name = "naiveSyncBN"  # same parameters; nn.SyncBatchNorm runs on GPU only
    return PerLevelNorm(get_norm(name, channels) for _ in range(num_levels))


def common_channels(input_shape: Sequence[ShapeSpec], norm: str) -> int:
    """The channels of all levels; raise a ValueError for levels, or a norm, that no head takes."""
    check_choice("NORM", norm, ("GN", "BN", "SyncBN", ""))
    channels = {shape.channels for shape in input_shape}
    strides = [shape.stride for shape in input_shape]
    if len(channels) != 1:
        raise ValueError(f"IN_FEATURES must have the same channels on all levels: {channels}")
    if strides != sorted(set(strides)):
        raise ValueError(
            "MODEL.FCOS.IN_FEATURES must go from the finest to the coarsest level, got levels with "
            f"the strides {strides}"
        )
    channels = channels.pop()
    if norm == "GN" and channels % 32:
        raise ValueError(f"NORM 'GN' has 32 groups, which do not divide {channels} channels")
    if norm == "GN" and channels == 32:
        raise ValueError(
            "NORM 'GN' has 32 groups, of one channel each with 32 channels: on a level of one cell "
            "a group is a single value, which cannot be normalised. Take 64 channels or more "
            "(MODEL.FPN.OUT_CHANNELS), or another NORM"
        )
    return channels
