"""FPN on a ResNet or a model of timm, with the extra levels of FCOS: P6 and P7, P6, or none."""

import copy
from collections.abc import Sequence

import torch
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.structures import ImageList
from fvcore.nn import weight_init
from torch import Tensor, nn

from ..runtime import fold_norms
from .deform_conv import use_portable_deform_convs

_CHOOSE_TIMM = (
    "Choose a model that makes maps of the strides 8, 16 and 32 from images of any size, as "
    "mobilenetv3_large_100, resnet50, efficientnet_b0 or convnext_tiny"
)


class FoldedResNet(ResNet):
    """Detectron2's ResNet, with fixed batch norms in the weights of their convolutions on CPU.

    For LazyConfigs; :func:`build_fcos_resnet_fpn_backbone` does the same.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        fold_norms(self)


class LastLevelP6(nn.Module):
    """One extra level, P6, by a stride-2 convolution. The one-level form of LastLevelP6P7."""

    def __init__(self, in_channels: int, out_channels: int, in_feature: str):
        super().__init__()
        self.num_levels = 1
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        weight_init.c2_xavier_fill(self.p6)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.p6(x)]


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """FPN on any ResNet of Detectron2's builder, with ``MODEL.FCOS.TOP_LEVELS`` extra levels.

    Raises:
        ValueError: if TOP_LEVELS is not 0, 1 or 2, TOP_IN_FEATURE is not a map that the backbone
            makes, or a level is made for nothing: one that IN_FEATURES leaves out, unless coarser
            levels of the FPN help the finer ones.
    """
    bottom_up = build_resnet_backbone(cfg, input_shape)
    use_portable_deform_convs(bottom_up)
    fold_norms(bottom_up)
    return _build_fpn(cfg, bottom_up)


@BACKBONE_REGISTRY.register()
def build_fcos_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """FPN on the model ``MODEL.TIMM.NAME`` of timm, otherwise as on a ResNet.

    Raises:
        ImportError: if timm is not installed.
        ValueError: for a model without the maps that ``MODEL.FPN.IN_FEATURES`` names, for another
            NORM, and as for a ResNet.
        RuntimeError: of timm, for a model that it does not have.
    """
    timm_cfg = cfg.MODEL.TIMM
    bottom_up = TimmBackbone(
        timm_cfg.NAME,
        pretrained=timm_cfg.PRETRAINED and not cfg.MODEL.WEIGHTS,
        norm=timm_cfg.NORM,
        out_features=cfg.MODEL.FPN.IN_FEATURES,
        in_channels=input_shape.channels,
    )
    return _build_fpn(cfg, bottom_up)


class TimmBackbone(Backbone):
    """The maps of a timm model, named as those of Detectron2's ResNets: res3 has stride 8."""

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool,
        norm: str,
        out_features: Sequence[str],
        in_channels: int = 3,
    ):
        """
        Args:
            name: of the model in timm.
            pretrained: load timm's weights.
            norm: "BN", "SyncBN" or "FrozenBN", for the batch norms of the model.
            out_features: the maps to return, finest first.
            in_channels: of the images.
        """
        super().__init__()
        if norm not in ("BN", "SyncBN", "FrozenBN"):
            raise ValueError(
                f"MODEL.TIMM.NORM must be one of ['BN', 'SyncBN', 'FrozenBN'], got {norm!r}"
            )
        timm = _import_timm()
        strides = [_stride_of(feature) for feature in out_features]
        model = timm.create_model(
            name,
            pretrained=pretrained,
            features_only=True,
            out_indices=_timm_indices(name, strides),
            in_chans=in_channels,
        )
        if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC"):
            raise ValueError(
                f"MODEL.TIMM.NAME {name!r} makes maps of another layout, NHWC. {_CHOOSE_TIMM}"
            )
        _freeze_unread(model, name, in_channels)
        if norm == "FrozenBN":
            model = timm.layers.freeze_batch_norm_2d(model)
        elif norm == "SyncBN":
            model = timm.layers.convert_sync_batchnorm(model)
        self.model = model
        self._out_features = list(out_features)
        self._out_feature_strides = dict(zip(out_features, strides, strict=True))
        channels = model.feature_info.channels()
        self._out_feature_channels = dict(zip(out_features, channels, strict=True))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._out_features, self.model(x), strict=True))


def _import_timm():
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "MODEL.BACKBONE.NAME 'build_fcos_timm_fpn_backbone' needs timm: pip install timm"
        ) from error
    return timm


def _stride_of(feature: str) -> int:
    """8 for "res3"."""
    number = feature.removeprefix("res")
    if not number.isdigit():
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES of a timm model are named res2 to res5, got {feature!r}"
        )
    return 2 ** int(number)


def _timm_indices(name: str, strides: Sequence[int]) -> list[int]:
    """The numbers of the maps with these strides among those of the timm model ``name``."""
    with torch.device("meta"):  # without memory: only to know its maps
        info = _import_timm().create_model(name, features_only=True).feature_info
    # Of several maps with one stride the last, which has seen most.
    maps = {s: i for i, s in zip(info.out_indices, info.reduction(), strict=True)}
    if not set(strides) <= maps.keys():
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r} makes maps of the strides {sorted(maps)}, and "
            f"MODEL.FPN.IN_FEATURES names those of {list(strides)}. {_CHOOSE_TIMM}"
        )
    return [maps[s] for s in strides]


def _freeze_unread(model: nn.Module, name: str, in_channels: int) -> None:
    """Take what no map is made from, as later stages of some models, from training.

    It would never get a gradient, which distributed training refuses.
    """
    # On tensors without values: which parameters get a gradient is all that counts.
    probe = copy.deepcopy(model).to("meta")
    try:
        maps = probe(torch.empty(2, in_channels, 64, 64, device="meta"))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r} refuses images of 64x64 pixels: {error}. {_CHOOSE_TIMM}"
        ) from error
    sum(x.sum() for x in maps).backward()
    for parameter, probed in zip(model.parameters(), probe.parameters(), strict=True):
        parameter.requires_grad_(probed.grad is not None)


def _build_fpn(cfg, bottom_up: Backbone) -> FPN:
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    in_features = cfg.MODEL.FPN.IN_FEATURES

    top_levels, top_in_feature = cfg.MODEL.FCOS.TOP_LEVELS, cfg.MODEL.FCOS.TOP_IN_FEATURE
    if top_levels not in (0, 1, 2):
        raise ValueError(f"MODEL.FCOS.TOP_LEVELS must be 0, 1 or 2, got {top_levels}")
    top_block = None
    if top_levels > 0:
        if in_features[-1] != "res5" or top_in_feature not in ("p5", "res5"):
            raise ValueError(
                "MODEL.FCOS.TOP_IN_FEATURE must be 'p5' or 'res5', and MODEL.FPN.IN_FEATURES must "
                f"end with 'res5', for TOP_LEVELS {top_levels}; got {top_in_feature!r} and "
                f"{in_features}. Set TOP_LEVELS 0 for an FPN without extra levels"
            )
        from_res5 = top_in_feature == "res5"
        in_channels = bottom_up.output_shape()["res5"].channels if from_res5 else out_channels
        top_class = LastLevelP6P7 if top_levels == 2 else LastLevelP6
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
        _freeze_unused_outputs(fpn, cfg.MODEL.FCOS.IN_FEATURES)
    return fpn


def padded_size(backbone: Backbone, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels that the detector pads an image to, by Detectron2's own code."""
    images = ImageList.from_tensors(
        [torch.empty(1, height, width, device="meta")],
        backbone.size_divisibility,
        padding_constraints=backbone.padding_constraints,
    )
    return tuple(images.tensor.shape[-2:])


def check_random_start(model: nn.Module) -> None:
    """Raise a ValueError if a model without weights has parts that keep their random values."""
    blocks = [m for m in model.modules() if isinstance(m, CNNBlockBase)]
    frozen = sum(p.numel() for b in blocks for p in b.parameters() if not p.requires_grad)
    # Fixed norms are no BatchNorm; as long as nothing was loaded into them their means are 0.
    unestimated = sum(
        getattr(m, "running_mean", None) is not None
        and not isinstance(m, nn.modules.batchnorm._BatchNorm)
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


def _freeze_unused_outputs(fpn: FPN, used: Sequence[str]) -> None:
    """Take the convolutions of levels that nobody reads from training.

    They would never get a gradient, which distributed training refuses.
    """
    made_from = None if fpn.top_block is None else fpn.top_block.in_feature
    strides = {name: shape.stride for name, shape in fpn.output_shape().items()}
    finest = min((strides[name] for name in used if name in strides), default=0)
    for name in strides.keys() - {*used, made_from}:
        output = getattr(fpn, f"fpn_output{name[1:]}", None)
        if output is None or strides[name] < finest:
            key = "MODEL.FCOS.TOP_LEVELS" if output is None else "MODEL.FPN.IN_FEATURES"
            raise ValueError(
                f"{key} makes the level {name}, but MODEL.FCOS.IN_FEATURES {list(used)} leaves it "
                f"out: change {key}, or add the level"
            )
        output.requires_grad_(False)
