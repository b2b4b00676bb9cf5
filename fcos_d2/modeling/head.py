"""The head that all levels share: features in, class logits, distances and quality out.

Shapes: N images, C channels, K classes, (Hi, Wi) cells of level i. A list has an entry for each
level.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from .distributions import (
    DistributionQuality,
    Distributions,
    expected_distances,
    logit_of_product,
)
from .head_layers import Scale, Tower, common_channels, conv3x3, conv_layers
from .validation import check_between, check_choice, check_count, values_of_keys

# exp(20) is 5e8 pixels: no image is so large, and float32 still holds its square.
MAX_EXPONENT = 20.0

# The values of QUALITY. The head has a branch for the first two. With the last two, the scores have
# no factor of quality.
QUALITIES = ("centerness", "iou", "computed", "none", "joint")
WITH_BRANCH, WITHOUT_FACTOR = QUALITIES[:2], QUALITIES[3:]


class HeadOutputs(NamedTuple):
    """What the head predicts for a batch, a map for each level."""

    class_logits: list[Tensor]  # (N, K, Hi, Wi)
    ltrb: list[Tensor]  # (N, 4, Hi, Wi) float32 pixels, never negative but if may_be_outside
    quality_logits: list[Tensor] | None  # (N, 1, Hi, Wi); None without a quality branch
    distributions: Distributions | None = None  # what ltrb are the expected values of
    # Whether a location may be outside of its box. Some of its ltrb are then negative, but never
    # left + right or top + bottom.
    may_be_outside: bool = False


class FCOSHead(nn.Module):
    """Towers and predictors of FCOS (1904.01355, figure 2).

    Distances leave the head in pixels, with every BOX_ACTIVATION, in training as in inference.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        num_cls_convs: int = 4,
        num_box_convs: int = 4,
        num_share_convs: int = 0,
        norm: str = "GN",
        use_deformable: bool = False,
        use_scale: bool = True,
        prior_prob: float = 0.01,
        box_activation: str = "relu",
        reg_max: int = 16,
        distribution_quality: bool = False,
        quality: str = "centerness",
        quality_on: str = "box",
    ):
        """
        Args:
            input_shape: stride and channels of each level, finest first; the channels are the same.
            Others: see the keys of ``MODEL.FCOS`` in :mod:`fcos_d2.config`.

        Raises:
            ValueError: for a value that its key does not offer, for levels with different channels
                or out of order, and for channels that GN cannot group.
        """
        super().__init__()
        check_choice("BOX_ACTIVATION", box_activation, ("relu", "exp", "distribution"))
        check_choice("QUALITY", quality, QUALITIES)
        check_choice("QUALITY_ON", quality_on, ("box", "cls"))
        check_count("REG_MAX", reg_max, 1)
        if distribution_quality and (box_activation, quality) != ("distribution", "joint"):
            raise ValueError(
                "MODEL.FCOS.DISTRIBUTION_QUALITY reads the distributions, and is part of the class "
                f"score: it needs BOX_ACTIVATION 'distribution', not {box_activation!r}, and "
                f"QUALITY 'joint', not {quality!r}"
            )
        if distribution_quality:
            check_count("REG_MAX", reg_max, 3)  # four bins at least
        check_count("NUM_CLASSES", num_classes, 1)
        check_count("NUM_CLS_CONVS", num_cls_convs, 0)
        check_count("NUM_BOX_CONVS", num_box_convs, 0)
        check_count("NUM_SHARE_CONVS", num_share_convs, 0)
        check_between("PRIOR_PROB", prior_prob, 1e-9, 1 - 1e-9)
        self.strides = tuple(shape.stride for shape in input_shape)
        channels = common_channels(input_shape, norm)
        self.num_classes = num_classes
        self.box_activation = box_activation
        self.quality = quality
        self.quality_on = quality_on

        def tower(num_convs: int, deformable: bool = False) -> Tower:
            last = [num_convs - 1] if deformable else []
            return Tower(*conv_layers(num_convs, channels, norm, len(input_shape), last))

        self.share_tower = tower(num_share_convs)
        self.cls_tower = tower(num_cls_convs, use_deformable)
        self.bbox_tower = tower(num_box_convs, use_deformable)
        self.cls_logits = conv3x3(channels, num_classes)
        bins = reg_max + 1 if box_activation == "distribution" else 1
        self.bbox_pred = conv3x3(channels, 4 * bins)
        self.ctrness = conv3x3(channels, 1) if quality in WITH_BRANCH else None
        self.scales = nn.ModuleList(Scale() for _ in input_shape) if use_scale else None
        units = self.strides if box_activation == "relu" else [1] * len(self.strides)
        self.register_buffer("units", torch.tensor(units, dtype=torch.float32), persistent=False)
        self.box_quality = DistributionQuality() if distribution_quality else None
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg, input_shape: Sequence[ShapeSpec]) -> dict:
        values = values_of_keys(
            cfg, "NUM_CLASSES", "NUM_CLS_CONVS", "NUM_BOX_CONVS", "NUM_SHARE_CONVS", "NORM",
            "USE_DEFORMABLE", "USE_SCALE", "PRIOR_PROB", "BOX_ACTIVATION", "REG_MAX",
            "DISTRIBUTION_QUALITY", "QUALITY", "QUALITY_ON",
        )  # fmt: skip
        return values | {"input_shape": input_shape}

    def forward(self, features: list[Tensor]) -> HeadOutputs:
        """Run on the (N, C, Hi, Wi) features of each level."""
        features = self.share_tower(features)
        cls_features = self.cls_tower(features)
        box_features = self.bbox_tower(features)
        class_logits = [self.cls_logits(x) for x in cls_features]
        pairs = zip(box_features, self._factors(), strict=True)
        predicted = [self.bbox_pred(x).float() * factor for x, factor in pairs]
        ltrb = [self._to_pixels(*x) for x in zip(predicted, self.strides, strict=True)]
        distributions = quality_logits = None
        if self.box_activation == "distribution":
            distributions = Distributions(predicted, self.strides)
        if self.box_quality is not None:
            of_boxes = [self.box_quality(x).float() for x in predicted]
            pairs = zip(class_logits, of_boxes, strict=True)
            class_logits = [logit_of_product(x.float(), quality) for x, quality in pairs]
        if self.ctrness is not None:
            quality_features = box_features if self.quality_on == "box" else cls_features
            quality_logits = [self.ctrness(x) for x in quality_features]
        return HeadOutputs(class_logits, ltrb, quality_logits, distributions)

    def _factors(self) -> Sequence[Tensor]:
        """(1,) what the output of the box predictor is multiplied by, for each level."""
        if self.scales is None:
            return self.units.split(1)
        # For all levels at once, and with the stride: a GPU launches fewer kernels.
        return (torch.cat([s.scale for s in self.scales]) * self.units).split(1)

    def _to_pixels(self, x: Tensor, stride: int) -> Tensor:
        if self.box_activation == "exp":
            return x.clamp(max=MAX_EXPONENT).exp()
        if self.box_activation == "distribution":
            return expected_distances(x) * stride
        return x.relu()  # the stride is in the factor


def select_levels(shapes: dict[str, ShapeSpec], in_features: Sequence[str]) -> list[ShapeSpec]:
    """The shapes of the maps that the head takes; a ValueError names those that do not exist."""
    missing = [f for f in in_features if f not in shapes]
    if missing:
        raise ValueError(
            f"MODEL.FCOS.IN_FEATURES names {missing}, but the backbone makes {list(shapes)}"
        )
    return [shapes[f] for f in in_features]
