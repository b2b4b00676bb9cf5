"""The layouts of mmdetection's checkpoints, of its versions 1 to 3: FCOS, GFL and TOOD."""

import re
from collections.abc import Collection

import torch
from detectron2.config import CfgNode
from torch import Tensor

from .source import TORCHVISION_RESNET, Rules, Source, fpn_rules, hrnet_rules

# The convolutions of a head, and what ours calls their towers.
_CONVS = r"bbox_head\.(cls|reg|inter)_convs\.(\d+)\."
_TOWERS = {"cls": "cls", "reg": "bbox", "inter": "share"}


def _mmdet_tower_rules(names: Collection[str]) -> Rules:
    """Its numbers count convolutions, ours also the norms and activations after them."""
    has_norm = any(re.match(rf"{_CONVS}(gn|bn)\.", n) for n in names)
    rules = {}
    for name in names:
        if match := re.match(_CONVS, name):
            tower = f"head.{_TOWERS[match[1]]}_tower"
            number = int(match[2]) * (3 if has_norm else 2)
            layer, conv = re.escape(match[0]), f"{tower}.{number}"
            offset = layer + r"conv[._](conv_)?offset"
            deformable = any(re.match(offset, n) for n in names)
            rules[offset] = f"{conv}.offset"
            rules[layer + "conv"] = f"{conv}.conv" if deformable else conv
            rules[layer + "(gn|bn)"] = f"{tower}.{number + 1}"
    return list(rules.items())


def _add_biases(tensors: dict[str, Tensor], cfg: CfgNode) -> None:
    """Zeros for the towers, where ``conv_bias="auto"`` leaves out the biases before a norm."""
    pattern = r"(head\.(?:cls|bbox|share)_tower\.\d+\.(?:conv\.)?)weight"
    matches = [re.fullmatch(pattern, name) for name, x in tensors.items() if x.dim() == 4]
    biases = {m[1] + "bias": torch.zeros(len(tensors[m[0]])) for m in matches if m}
    if not biases.keys() & tensors.keys():
        tensors.update(biases)


_MMDET_RULES: Rules = [
    *fpn_rules(r"neck\.lateral_convs\.{}\.conv", r"neck\.fpn_convs\.{}\.conv"),
    (r"neck\.fpn_convs\.3\.conv", "backbone.top_block.p6"),
    (r"neck\.fpn_convs\.4\.conv", "backbone.top_block.p7"),
    (r"bbox_head\.scales", "head.scales"),
    (r"data_preprocessor\.(mean|std)", r"pixel_\1"),
]

MMDET = Source(
    signature=r"bbox_head\.(conv|fcos)_(cls|reg|centerness)\.",
    rules=[
        *_MMDET_RULES,
        # Before version 2.1, the names were fcos_cls, fcos_reg and fcos_centerness.
        (r"bbox_head\.(conv|fcos)_cls", "head.cls_logits"),
        (r"bbox_head\.(conv|fcos)_reg", "head.bbox_pred"),
        (r"bbox_head\.(conv|fcos)_centerness", "head.ctrness"),
    ],
    tower_rules=_mmdet_tower_rules,
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
    hrnet=hrnet_rules(r"neck\.reduction_conv\.conv", r"neck\.fpn_convs\.(\d+)\.conv", "backbone"),
    adapt=_add_biases,
)

# What mmdetection's GFL and TOOD have in common, in all of their configs.
_JOINT = {
    **TORCHVISION_RESNET,
    "MODEL.FCOS.TOP_RELU": False,
    "MODEL.FCOS.LOCATION_OFFSET": 0.0,
    "MODEL.FCOS.QUALITY": "joint",
    "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
    # What goes with a joint quality, for a config of FCOS.
    "MODEL.FCOS.CLS_LOSS_TYPE": "quality_focal",
    "MODEL.FCOS.BOX_LOSS_WEIGHTING": "score",
}

MMDET_GFL = Source(
    signature=r"bbox_head\.gfl_(cls|reg)\.",
    rules=[
        *_MMDET_RULES,
        (r"bbox_head\.gfl_cls", "head.cls_logits"),
        (r"bbox_head\.gfl_reg", "head.bbox_pred"),
    ],
    tower_rules=_mmdet_tower_rules,
    cfg={**_JOINT, "MODEL.FCOS.BOX_ACTIVATION": "distribution"},
    resnet=r"backbone\.",
    adapt=_add_biases,
)

MMDET_TOOD = Source(
    signature=r"bbox_head\.tood_(cls|reg)\.",
    rules=[
        *_MMDET_RULES,
        (r"bbox_head\.tood_cls", "head.cls_logits"),
        (r"bbox_head\.tood_reg", "head.bbox_pred"),
        (r"bbox_head\.cls_prob_module", "head.alignment"),
        (r"bbox_head\.reg_offset_module", "head.offsets"),
        *(
            (rf"bbox_head\.{theirs}_decomp\.{layer}", f"head.{ours}_decomposition.{our_layer}")
            for theirs, ours in (("cls", "cls"), ("reg", "box"))
            for layer, our_layer in (
                ("layer_attention", "attention"),
                (r"reduction_conv\.conv", "reduction"),
                (r"reduction_conv\.(gn|bn)", "tower.0"),
            )
        ),
    ],
    tower_rules=_mmdet_tower_rules,
    cfg={
        **_JOINT,
        "MODEL.FCOS.HEAD": "task_aligned",
        "MODEL.FCOS.ASSIGNMENT": "task_aligned",
        "MODEL.FCOS.BOX_LOSS_WEIGHTING": "alignment",
        "MODEL.FCOS.NUM_SHARE_CONVS": 6,
        "MODEL.FCOS.NUM_CLS_CONVS": 0,
        "MODEL.FCOS.NUM_BOX_CONVS": 0,
        "MODEL.FCOS.BOX_ACTIVATION": "exp",
        "MODEL.FCOS.CLIP_BOXES": "after_nms",  # it clips no boxes
    },
    resnet=r"backbone\.",
    adapt=_add_biases,
)
