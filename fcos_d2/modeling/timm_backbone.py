"""Backbones of timm (https://huggingface.co/docs/timm), which is imported only to build one."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn

_CHOOSE = (
    "Choose a model that makes maps of the strides 8, 16 and 32 from images of any size, as "
    "mobilenetv3_large_100, resnet50, efficientnet_b0 or convnext_tiny"
)


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
        model_options: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            name: of the model in timm.
            pretrained: load timm's weights.
            norm: "BN", "SyncBN" or "FrozenBN", for the batch norms of the model.
            out_features: the maps to return, finest first.
            in_channels: of the images.
            model_options: further arguments of the model in timm.

        Raises:
            ImportError: if timm is not installed.
            ValueError: for another norm, and for a model without these maps.
            RuntimeError: of timm, for a model that it does not have.
        """
        super().__init__()
        norms = ["BN", "SyncBN", "FrozenBN"]
        if norm not in norms:
            raise ValueError(f"MODEL.TIMM.NORM must be one of {norms}, got {norm!r}")
        try:
            import timm
        except ImportError as error:
            raise ImportError(
                f"The backbone of MODEL.TIMM.NAME {name!r} needs timm: pip install timm"
            ) from error
        strides = [_stride_of(feature) for feature in out_features]
        options = {"features_only": True, **(model_options or {})}
        model = timm.create_model(
            name,
            pretrained=pretrained,
            out_indices=_numbers_of_maps(name, strides, options),
            in_chans=in_channels,
            **options,
        )
        if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC"):
            raise ValueError(
                f"MODEL.TIMM.NAME {name!r} makes maps of another layout, NHWC. {_CHOOSE}"
            )
        _freeze_unused(model, name, in_channels)
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


def _stride_of(feature: str) -> int:
    """8 for "res3"."""
    number = feature.removeprefix("res")
    if not number.isdigit():
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES of a timm model are named res2 to res5, got {feature!r}"
        )
    return 2 ** int(number)


def _numbers_of_maps(name: str, strides: list[int], options: Mapping[str, Any]) -> list[int]:
    """The numbers of the maps with these strides among all maps of the timm model ``name``."""
    import timm

    with torch.device("meta"):  # without memory for weights, which are not needed here
        info = timm.create_model(name, **options).feature_info
    # If several maps have one stride, the last and deepest one.
    numbers = {s: i for i, s in zip(info.out_indices, info.reduction(), strict=True)}
    if not set(strides) <= numbers.keys():
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r} makes maps of the strides {sorted(numbers)}, and "
            f"MODEL.FPN.IN_FEATURES names those of {strides}. {_CHOOSE}"
        )
    return [numbers[s] for s in strides]


@torch.enable_grad()
def _freeze_unused(model: nn.Module, name: str, in_channels: int) -> None:
    """Freeze what no map is made from: the later stages of some models.

    They never get a gradient, and distributed training refuses such parameters.
    """
    probe = copy.deepcopy(model).to("meta")  # tensors without values show what is read
    try:
        maps = probe(torch.empty(2, in_channels, 64, 64, device="meta"))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r} refuses images of 64x64 pixels: {error}. {_CHOOSE}"
        ) from error
    read = _parameters_behind(maps)
    for parameter, probed in zip(model.parameters(), probe.parameters(), strict=True):
        parameter.requires_grad_(probed in read)


def _parameters_behind(outputs: Sequence[Tensor]) -> set[Tensor]:
    """The parameters that the outputs depend on: a backward pass would take seconds for HRNets."""
    nodes = [x.grad_fn for x in outputs]
    seen = set(nodes)
    for node in nodes:  # which grows
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                nodes.append(before)
    return {node.variable for node in nodes if hasattr(node, "variable")}
