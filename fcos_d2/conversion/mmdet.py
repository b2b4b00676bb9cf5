"""mmdetection's FCOS, versions 1 to 3."""

import re
from collections.abc import Collection

import torch
from detectron2.config import CfgNode
from torch import Tensor

from .source import Rules, Source, fpn_rules


def _tower_rules(names: Collection[str]) -> Rules:
    """Their numbers count convolutions only."""
    convs = [re.match(r"bbox_head\.(?:cls|reg)_convs\.(\d+)\.", name) for name in names]
    depth = 1 + max((int(match[1]) for match in convs if match), default=-1)
    has_norm = any(re.match(r"bbox_head\.(cls|reg)_convs\.\d+\.(gn|bn)\.", name) for name in names)
    step = 3 if has_norm else 2
    rules = []
    for i in range(depth):
        for theirs, ours in (("cls_convs", "cls_tower"), ("reg_convs", "bbox_tower")):
            layer, conv = rf"bbox_head\.{theirs}\.{i}\.", f"head.{ours}.{i * step}"
            deformable = any(re.match(layer + r"conv[._](conv_)?offset\.", n) for n in names)
            rules += [
                (layer + r"conv[._](conv_)?offset", f"{conv}.offset"),
                (layer + "conv", f"{conv}.conv" if deformable else conv),
                (layer + "(gn|bn)", f"head.{ours}.{i * step + 1}"),
            ]
    return rules


def _adapt(tensors: dict[str, Tensor], cfg: CfgNode) -> None:
    """Add zero biases to the towers where ``conv_bias="auto"`` left them out before a norm."""
    pattern = r"(head\.(?:cls|bbox)_tower\.\d+\.(?:conv\.)?)weight"
    matches = [re.fullmatch(pattern, name) for name, x in tensors.items() if x.dim() == 4]
    biases = {m[1] + "bias": torch.zeros(len(tensors[m[0]])) for m in matches if m}
    if not biases.keys() & tensors.keys():
        tensors.update(biases)


MMDET = Source(
    signature=r"bbox_head\.((conv|fcos)_(cls|centerness)|cls_convs)\.",
    rules=[
        *fpn_rules(r"neck\.lateral_convs\.{}\.conv", r"neck\.fpn_convs\.{}\.conv"),
        (r"neck\.fpn_convs\.3\.conv", "backbone.top_block.p6"),
        (r"neck\.fpn_convs\.4\.conv", "backbone.top_block.p7"),
        # Before version 2.1, the names were fcos_cls, fcos_reg and fcos_centerness.
        (r"bbox_head\.(conv|fcos)_cls", "head.cls_logits"),
        (r"bbox_head\.(conv|fcos)_reg", "head.bbox_pred"),
        (r"bbox_head\.(conv|fcos)_centerness", "head.ctrness"),
        (r"bbox_head\.scales", "head.scales"),
        (r"data_preprocessor\.(mean|std)", r"pixel_\1"),
    ],
    tower_rules=_tower_rules,
    cfg={"MODEL.FCOS.QUALITY": "centerness", "MODEL.FCOS.SCORE_FUSION": "product"},
    # Its own config sets these: norm_on_bbox, centerness_on_reg, nms, the data preprocessor and
    # the backbone's style.
    not_in_file=(
        "MODEL.FCOS.BOX_ACTIVATION",
        "MODEL.FCOS.QUALITY_ON",
        "MODEL.FCOS.NMS_THRESH_TEST",
        "INPUT.FORMAT",
        "MODEL.PIXEL_MEAN",
        "MODEL.PIXEL_STD",
        "MODEL.RESNETS.STRIDE_IN_1X1",
    ),
    resnet=r"backbone\.",
    adapt=_adapt,
)
