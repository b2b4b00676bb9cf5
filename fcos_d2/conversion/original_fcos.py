"""The authors' original code, tianzhi0549/FCOS, built on maskrcnn-benchmark."""

import torch
from detectron2.config import CfgNode
from torch import Tensor

from .source import Source, fpn_rules

# Detectron2's frozen and trained BatchNorm add this to the variance.
_EPS = 1e-5


def _adapt(tensors: dict[str, Tensor], cfg: CfgNode) -> None:
    """Scale the norms: ours divide by sqrt(variance + 1e-5), its frozen ones by sqrt(variance)."""
    for name in [n for n in tensors if n.endswith(".norm.weight")]:
        weight, variance = tensors[name], tensors.get(name.replace(".weight", ".running_var"))
        if variance is not None and variance.shape == weight.shape:  # else it is reported later
            tensors[name] = weight * torch.sqrt((variance + _EPS) / variance)


ORIGINAL_FCOS = Source(
    signature=r"rpn\.head\.(cls_tower|bbox_tower|centerness)\.",
    rules=[
        # Its FPN numbers the stages from res2, which has no lateral: 2 is res3.
        *fpn_rules(r"backbone\.fpn\.fpn_inner{}", r"backbone\.fpn\.fpn_layer{}", first=2),
        (r"backbone\.fpn\.top_blocks", "backbone.top_block"),
        (r"rpn\.head\.(cls_tower|bbox_tower|cls_logits|bbox_pred|scales)", r"head.\1"),
        (r"rpn\.head\.centerness", "head.ctrness"),
    ],
    cfg={
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "MODEL.FCOS.QUALITY": "centerness",
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
    },
    # Its own config sets these: NORM_REG_TARGETS, CENTERNESS_ON_REG and STRIDE_IN_1X1.
    not_in_file=(
        "MODEL.FCOS.BOX_ACTIVATION",
        "MODEL.FCOS.QUALITY_ON",
        "MODEL.RESNETS.STRIDE_IN_1X1",
    ),
    resnet=r"backbone\.body\.(stem\.)?",
    adapt=_adapt,
)
