"""FPN on a ResNet or a timm model, with the extra levels of FCOS: P6 and P7, P6, or none.

Or BiFPN on a ResNet, or HRFPN on an HRNet of timm.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.structures import ImageList
from fvcore.nn import weight_init
from fvcore.nn.precise_bn import BN_MODULE_TYPES
from torch import Tensor, nn

from ..runtime import fold_norms
from .bifpn import BiFPN
from .deform_conv import use_portable_deform_convs
from .hrfpn import HRFPN
from .timm_backbone import TimmBackbone


class FoldedResNet(ResNet):
    """Detectron2's ResNet with :func:`fold_norms`, for LazyConfigs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        fold_norms(self)


class LastLevelP6(nn.Module):
    """P6 alone, where Detectron2's LastLevelP6P7 makes P6 and P7."""

    def __init__(self, in_channels: int, out_channels: int, in_feature: str):
        super().__init__()
        self.num_levels = 1
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        weight_init.c2_xavier_fill(self.p6)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.p6(x)]


class LinearP6P7(LastLevelP6P7):
    """P6 and P7 without the ReLU that Detectron2's LastLevelP6P7 has between them."""

    def forward(self, c5: Tensor) -> list[Tensor]:
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """FPN on a ResNet of Detectron2's builder, with ``MODEL.FCOS.TOP_LEVELS`` extra levels.

    Raises:
        ValueError: if TOP_LEVELS is not 0, 1 or 2, if TOP_RELU is False without a P7, if the
            backbone does not make TOP_IN_FEATURE, or if it makes a level that neither IN_FEATURES
            names nor a finer level needs.
    """
    return _build_fpn(cfg, _build_resnet(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_fcos_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """FPN on the timm model ``MODEL.TIMM.NAME``, with the same extra levels and errors."""
    return _build_fpn(cfg, _build_timm(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_fcos_timm_hrfpn_backbone(cfg, input_shape: ShapeSpec) -> HRFPN:
    """HRFPN on the timm model ``MODEL.TIMM.NAME``, with the levels of ``MODEL.FCOS.IN_FEATURES``.

    For errors see :class:`HRFPN` and :class:`TimmBackbone`.
    """
    # Without the layers for classification, which timm puts on the maps of its HRNets otherwise.
    options = {"feature_location": ""} if "hrnet" in cfg.MODEL.TIMM.NAME else {}
    return HRFPN(
        _build_timm(cfg, input_shape, options),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        levels=cfg.MODEL.FCOS.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
    )


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_bifpn_backbone(cfg, input_shape: ShapeSpec) -> BiFPN:
    """BiFPN on a ResNet of Detectron2's builder, with ``MODEL.FCOS.TOP_LEVELS`` extra levels.

    Raises:
        ValueError: if IN_FEATURES of FCOS leaves out a level; for other errors see :class:`BiFPN`.
    """
    backbone = BiFPN(
        _build_resnet(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        num_top_levels=cfg.MODEL.FCOS.TOP_LEVELS,
        num_repeats=cfg.MODEL.FCOS.BIFPN_REPEATS,
        norm=cfg.MODEL.FPN.NORM,
    )
    levels, used = list(backbone.output_shape()), list(cfg.MODEL.FCOS.IN_FEATURES)
    if cfg.MODEL.META_ARCHITECTURE == "FCOS" and not set(levels) <= set(used):
        raise ValueError(
            f"The BiFPN makes the levels {levels}, but MODEL.FCOS.IN_FEATURES {used} leaves some "
            "out, which would not be trained: change MODEL.FPN.IN_FEATURES or "
            "MODEL.FCOS.TOP_LEVELS, or add the levels"
        )
    return backbone


def _build_resnet(cfg, input_shape: ShapeSpec) -> ResNet:
    bottom_up = build_resnet_backbone(cfg, input_shape)
    use_portable_deform_convs(bottom_up)
    fold_norms(bottom_up)
    return bottom_up


def _build_timm(
    cfg, input_shape: ShapeSpec, model_options: Mapping[str, Any] | None = None
) -> TimmBackbone:
    timm = cfg.MODEL.TIMM
    return TimmBackbone(
        timm.NAME,
        pretrained=timm.PRETRAINED and not cfg.MODEL.WEIGHTS,
        norm=timm.NORM,
        out_features=cfg.MODEL.FPN.IN_FEATURES,
        in_channels=input_shape.channels,
        model_options=model_options,
    )


def _build_fpn(cfg, bottom_up: Backbone) -> FPN:
    out_channels, in_features = cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.IN_FEATURES
    top_levels, top_in_feature = cfg.MODEL.FCOS.TOP_LEVELS, cfg.MODEL.FCOS.TOP_IN_FEATURE
    if top_levels not in (0, 1, 2):
        raise ValueError(f"MODEL.FCOS.TOP_LEVELS must be 0, 1 or 2, got {top_levels}")
    if top_levels != 2 and not cfg.MODEL.FCOS.TOP_RELU:
        raise ValueError(
            f"MODEL.FCOS.TOP_RELU False leaves out the ReLU before P7, which TOP_LEVELS "
            f"{top_levels} does not make: set TOP_LEVELS 2, or TOP_RELU True"
        )
    top_block = None
    if top_levels > 0:
        if in_features[-1] != "res5" or top_in_feature not in ("p5", "res5"):
            raise ValueError(
                "MODEL.FCOS.TOP_IN_FEATURE must be 'p5' or 'res5', and MODEL.FPN.IN_FEATURES must "
                f"end with 'res5', for TOP_LEVELS {top_levels}; got {top_in_feature!r} and "
                f"{in_features}. Set TOP_LEVELS 0 for an FPN without extra levels"
            )
        in_channels = out_channels
        if top_in_feature == "res5":
            in_channels = bottom_up.output_shape()["res5"].channels
        p6_p7 = LastLevelP6P7 if cfg.MODEL.FCOS.TOP_RELU else LinearP6P7
        top_class = p6_p7 if top_levels == 2 else LastLevelP6
        top_block = top_class(in_channels, out_channels, top_in_feature)
    fpn = FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=out_channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    if cfg.MODEL.META_ARCHITECTURE == "FCOS":
        _freeze_unused_levels(fpn, cfg.MODEL.FCOS.IN_FEATURES)
    return fpn


def _freeze_unused_levels(fpn: FPN, used: Sequence[str]) -> None:
    """Freeze the output convolutions of levels that are made but not used.

    They never get a gradient, and distributed training refuses such parameters.
    """
    made_from = None if fpn.top_block is None else fpn.top_block.in_feature
    strides = {name: shape.stride for name, shape in fpn.output_shape().items()}
    finest = min((strides[name] for name in used if name in strides), default=0)
    # An unused level of the FPN still helps finer ones, to which its features are added.
    for name in strides.keys() - {*used, made_from}:
        output = getattr(fpn, f"fpn_output{name[1:]}", None)
        if output is None or strides[name] < finest:
            key = "MODEL.FCOS.TOP_LEVELS" if output is None else "MODEL.FPN.IN_FEATURES"
            raise ValueError(
                f"{key} makes the level {name}, but MODEL.FCOS.IN_FEATURES {list(used)} leaves it "
                f"out: change {key}, or add the level"
            )
        output.requires_grad_(False)


def padded_size(backbone: Backbone, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels to which Detectron2 pads an image for this backbone."""
    images = ImageList.from_tensors(
        [torch.empty(1, height, width, device="meta")],
        backbone.size_divisibility,
        padding_constraints=backbone.padding_constraints,
    )
    return tuple(images.tensor.shape[-2:])


def check_random_start(model: nn.Module) -> None:
    """Raise a ValueError if a model that starts at random has parts that never learn."""
    blocks = [m for m in model.modules() if isinstance(m, CNNBlockBase)]
    frozen = sum(p.numel() for b in blocks for p in b.parameters() if not p.requires_grad)
    # FrozenBatchNorm2d and timm's are no BatchNorm; without weights their means are 0.
    unestimated = sum(
        getattr(m, "running_mean", None) is not None
        and not isinstance(m, BN_MODULE_TYPES)
        and not m.running_mean.any()
        for m in model.modules()
    )
    if frozen or unestimated:
        raise ValueError(
            f"MODEL.WEIGHTS is '', so the model starts at random, but it has {frozen:,} frozen "
            f"values and {unestimated} fixed batch norms in its backbone, which never learn. Set "
            "MODEL.WEIGHTS (docs/results.md says where ImageNet weights are), or train the whole "
            "backbone: MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN (of timm: MODEL.TIMM.NORM)"
        )
