"""TOOD's head: class and box from the same features, and aligned (arXiv 2108.07755, section 3.1).

Shapes: N images, S convolutions, C channels, K classes, (Hi, Wi) cells of level i. A list has an
entry for each level.
"""

import math
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from .distributions import logit_of_geometric_mean
from .head import MAX_EXPONENT, HeadOutputs
from .head_layers import (
    Scale,
    Tower,
    common_channels,
    conv3x3,
    conv_layers,
    norm_layers,
    run_on_levels,
)
from .points import Levels
from .sampling import sample_channels
from .validation import check_between, check_count, values_of_keys

# Of mmdetection's models with deformable convolutions: how many, the first ones, and their groups.
_DEFORMABLE, _DEFORM_GROUPS = 2, 4

# What the keys must say that FCOS's head reads and this one has no choice of.
_FIXED = {
    "NUM_CLS_CONVS": 0,
    "NUM_BOX_CONVS": 0,
    "BOX_ACTIVATION": "exp",
    "DISTRIBUTION_QUALITY": False,
    "QUALITY": "joint",
}


class TaskAlignedHead(nn.Module):
    """Task-aligned head (2108.07755, section 3.1), with the layers of mmdetection 3.3.

    One stack of convolutions serves both tasks. Each task weighs the layers of the stack as suits
    the image. Two small branches on the whole stack then align the tasks: a map, which the class
    scores are averaged with, and offsets, which say where each side of a box is read off the boxes
    nearby.

    Distances leave the head in pixels, in training as in inference. As a side may come from
    another place, a location may be outside of its box.
    """

    quality = "joint"  # the score is that of class and box at once
    ctrness = None  # no branch of its own

    @configurable
    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        num_share_convs: int = 6,
        norm: str = "GN",
        use_deformable: bool = False,
        use_scale: bool = True,
        prior_prob: float = 0.01,
        location_offset: float = 0.5,
    ):
        """
        Args:
            input_shape: stride and channels of each level, finest first; the channels are the same.
            Others: see the keys of ``MODEL.FCOS`` in :mod:`fcos_d2.config`.

        Raises:
            ValueError: as :class:`FCOSHead`.
        """
        super().__init__()
        check_count("NUM_CLASSES", num_classes, 1)
        check_count("NUM_SHARE_CONVS (HEAD 'task_aligned')", num_share_convs, 1)
        check_between("PRIOR_PROB", prior_prob, 1e-9, 1 - 1e-9)
        channels, num_levels = common_channels(input_shape, norm), len(input_shape)
        self.num_classes = num_classes
        self.strides = tuple(shape.stride for shape in input_shape)
        self.levels = Levels(self.strides, location_offset)
        deformable = range(_DEFORMABLE if use_deformable else 0)
        self.share_tower = _Stack(
            *conv_layers(num_share_convs, channels, norm, num_levels, deformable, _DEFORM_GROUPS)
        )
        self.cls_decomposition = _Decomposition(channels, num_share_convs, norm, num_levels)
        self.box_decomposition = _Decomposition(channels, num_share_convs, norm, num_levels)
        self.cls_logits = conv3x3(channels, num_classes)
        self.bbox_pred = conv3x3(channels, 4)
        self.alignment = _small_branch(num_share_convs * channels, channels // 4, 1)
        self.offsets = _small_branch(num_share_convs * channels, channels // 4, 8)
        self.scales = nn.ModuleList(Scale() for _ in input_shape) if use_scale else None
        # Boxes start where they were predicted, nearly.
        for layer in self.offsets[::2]:
            nn.init.normal_(layer.weight, std=0.001)
        # Both factors of the score, so that their geometric mean is the prior.
        for layer in (self.cls_logits, self.alignment[2]):
            nn.init.constant_(layer.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg, input_shape: Sequence[ShapeSpec]) -> dict:
        wrong = [
            f"{key} {right!r} in place of {cfg.MODEL.FCOS[key]!r}"
            for key, right in _FIXED.items()
            if cfg.MODEL.FCOS[key] != right
        ]
        if wrong:
            raise ValueError(
                "MODEL.FCOS.HEAD 'task_aligned' has one stack of convolutions for both tasks, of "
                "NUM_SHARE_CONVS, distances that are powers of e, and one score of class and box: "
                f"set {', '.join(wrong)}, or HEAD 'fcos'"
            )
        values = values_of_keys(
            cfg, "NUM_CLASSES", "NUM_SHARE_CONVS", "NORM", "USE_DEFORMABLE", "USE_SCALE",
            "PRIOR_PROB", "LOCATION_OFFSET",
        )  # fmt: skip
        return values | {"input_shape": input_shape}

    def forward(self, features: list[Tensor]) -> HeadOutputs:
        """Run on the (N, C, Hi, Wi) features of each level."""
        stacks = self.share_tower(features)
        means = [x.mean(dim=(2, 3), keepdim=True) for x in stacks]
        cls_features = self.cls_decomposition(stacks, means)
        box_features = self.box_decomposition(stacks, means)
        class_logits = [
            logit_of_geometric_mean(self.cls_logits(x).float(), self.alignment(stack).float())
            for x, stack in zip(cls_features, stacks, strict=True)
        ]
        ltrb = []
        for level, (x, stack) in enumerate(zip(box_features, stacks, strict=True)):
            strides = self.bbox_pred(x).float().clamp(max=MAX_EXPONENT).exp()
            if self.scales is not None:
                strides = strides * self.scales[level].scale
            height, width = x.shape[-2:]
            locations = self.levels.all_locations(level, height, width, x.device)
            locations = locations.T.unflatten(1, (height, width))
            offsets = self.offsets(stack).float()
            ltrb.append(aligned_distances(strides * self.strides[level], offsets, locations))
        return HeadOutputs(class_logits, ltrb, None, may_be_outside=True)


class _Stack(Tower):
    """Convolutions one after the other, and what all of them make, side by side."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """(N, S * C, Hi, Wi) of the (N, C, Hi, Wi) features of each level."""
        outputs = []
        for layer in self:
            features = run_on_levels(layer, features)
            if isinstance(layer, nn.ReLU):
                outputs.append(features)
        return [torch.cat(x, dim=1) for x in zip(*outputs, strict=True)]


class _Decomposition(nn.Module):
    """The features of one task: a 1x1 convolution of the stack, whose layers have weights.

    The weights of an image, in (0, 1), follow from the mean of the stack on the level.
    """

    def __init__(self, channels: int, num_convs: int, norm: str, num_levels: int):
        super().__init__()
        self.attention = nn.Sequential(
            nn.Conv2d(num_convs * channels, channels // 8, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 8, num_convs, 1),
            nn.Sigmoid(),
        )
        self.reduction = nn.Conv2d(num_convs * channels, channels, 1, bias=False)
        self.tower = Tower(*norm_layers(norm, channels, num_levels), nn.ReLU(inplace=True))
        for layer in self.attention[::2]:
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.reduction.weight, std=0.01)

    def forward(self, stacks: list[Tensor], means: list[Tensor]) -> list[Tensor]:
        """(N, C, Hi, Wi) of (N, S * C, Hi, Wi) stacks and their (N, S * C, 1, 1) means."""
        pairs = zip(stacks, means, strict=True)
        return self.tower([self._reduce(stack, mean) for stack, mean in pairs])

    def _reduce(self, stack: Tensor, mean: Tensor) -> Tensor:
        weights = self.attention(mean).flatten(1)  # (N, S)
        # In place of the features, which are many more, the convolution is multiplied.
        kernel = self.reduction.weight.unflatten(1, (weights.shape[1], -1)).flatten(2)  # (C, S, C)
        kernel = (kernel * weights[:, None, :, None]).flatten(2)  # (N, C, S * C)
        return (kernel @ stack.flatten(2)).unflatten(2, stack.shape[-2:])


def _small_branch(in_channels: int, channels: int, out_channels: int) -> nn.Sequential:
    reduction = nn.Conv2d(in_channels, channels, 1)
    nn.init.normal_(reduction.weight, std=0.01)
    nn.init.zeros_(reduction.bias)
    return nn.Sequential(reduction, nn.ReLU(inplace=True), conv3x3(channels, out_channels))


def aligned_distances(ltrb: Tensor, offsets: Tensor, locations: Tensor) -> Tensor:
    """Distances to boxes whose sides are those of boxes nearby.

    Args:
        ltrb: (N, 4, H, W) distances of the predicted boxes, in pixels.
        offsets: (N, 8, H, W) from where to read each side; see :func:`sample_channels`.
        locations: (2, H, W) x and y in pixels.

    Returns:
        (N, 4, H, W) in pixels. Where the right side would be left of the left one, or the lower
        above the upper one, the box is the one predicted there.
    """
    boxes = torch.cat([locations - ltrb[:, :2], locations + ltrb[:, 2:]], dim=1)
    sampled = sample_channels(boxes, offsets)
    is_box = (sampled[:, :2] <= sampled[:, 2:]).all(dim=1, keepdim=True)
    boxes = torch.where(is_box, sampled, boxes)
    return torch.cat([locations - boxes[:, :2], boxes[:, 2:] - locations], dim=1)
