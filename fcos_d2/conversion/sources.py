"""The layouts of the checkpoints that :func:`fcos_d2.conversion.convert` knows."""

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor

from .mmdetection import MMDET, MMDET_GFL, MMDET_TOOD
from .source import (
    DETECTRON2_BACKBONE,
    TORCHVISION_RESNET,
    Rules,
    Source,
    fpn_rules,
    hrnet_rules,
)

# ---- AdelaiDet, whose names are ours but for the prefix of the head ----

_ADELAIDET_HEAD = r"proposal_generator\.fcos_head\."
_ADELAIDET_LAYERS = "share_tower|cls_tower|bbox_tower|cls_logits|bbox_pred|ctrness|scales"

ADELAIDET = Source(
    signature=_ADELAIDET_HEAD,
    rules=[
        # DLA-34, which is that of timm. Other backbones have Detectron2's names.
        (r"backbone\.bottom_up\.(base_layer|level\d)", r"backbone.bottom_up.model.\1"),
        # BiFPN, under which the ResNet stands beside the first of the coarser levels.
        (r"backbone\.bottom_up\.backbone", "backbone.bottom_up"),
        (r"backbone\.bottom_up\.res6\.reduction", "backbone.reduction"),
        (r"backbone\.repeated_bifpn", "backbone.repeated_bifpn"),
        *DETECTRON2_BACKBONE,
        (rf"{_ADELAIDET_HEAD}({_ADELAIDET_LAYERS})", r"head.\1"),
    ],
    cfg={
        "INPUT.FORMAT": "BGR",
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY_ON": "box",
        "MODEL.FCOS.CLIP_BOXES": "after_nms",
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
    },
    # Its X-101-32x8d models divide by a standard deviation; the others do not.
    not_in_file=("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"),
    # Of the levels of DLA-34 with two trees; only the trees' own projections are read.
    unused=r"backbone\.bottom_up\.level[34]\.project\..*",
)

# ---- The authors' original code, tianzhi0549/FCOS, built on maskrcnn-benchmark ----


def _mobilenet_v2_rules() -> Rules:
    """Its MobileNetV2 is that of timm. It counts all blocks, and timm those of each stage."""
    features, timm = r"backbone\.body\.features", "backbone.bottom_up.model"
    rules = [(rf"{features}\.0\.0", f"{timm}.conv_stem"), (rf"{features}\.0\.1", f"{timm}.bn1")]
    number = 1
    for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1)):
        layers = {0: "conv_pw", 1: "bn1", 3: "conv_dw", 4: "bn2", 6: "conv_pwl", 7: "bn3"}
        if stage == 0:  # the channels are not expanded before the depthwise convolution
            layers = {0: "conv_dw", 1: "bn1", 3: "conv_pw", 4: "bn2"}
        for block in range(blocks):
            theirs, ours = rf"{features}\.{number}\.conv", f"{timm}.blocks.{stage}.{block}"
            rules += [(rf"{theirs}\.{i}", f"{ours}.{layer}") for i, layer in layers.items()]
            number += 1
    return rules


def _scale_norms(tensors: dict[str, Tensor], cfg: CfgNode) -> None:
    """Ours divide by sqrt(variance + 1e-5), the frozen ones of its ResNets by sqrt(variance).

    Those of MobileNetV2 and HRNet, with other names, are PyTorch's, which add 1e-5, too.
    """
    for name in [n for n in tensors if n.endswith(".norm.weight")]:
        weight, variance = tensors[name], tensors.get(name.replace(".weight", ".running_var"))
        if variance is not None and variance.shape == weight.shape:  # else it is reported later
            tensors[name] = weight * torch.sqrt((variance + 1e-5) / variance)


ORIGINAL_FCOS = Source(
    signature=r"rpn\.head\.(cls_tower|bbox_tower|centerness)\.",
    rules=[
        # Its FPN numbers the stages from res2, which has no lateral: 2 is res3.
        *fpn_rules(r"backbone\.fpn\.fpn_inner{}", r"backbone\.fpn\.fpn_layer{}", first=2),
        (r"backbone\.fpn\.top_blocks", "backbone.top_block"),
        *_mobilenet_v2_rules(),
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
    # Of HRNet/HRNet-FCOS, a fork.
    hrnet=hrnet_rules(
        r"backbone\.fpn\.reduction_conv\.0", r"backbone\.fpn\.fpn_conv\.(\d+)", r"backbone\.body"
    ),
    adapt=_scale_norms,
)

# ---- Detectron2's own FCOS, detectron2/modeling/meta_arch/fcos.py ----

DETECTRON2 = Source(
    signature=r"head\.cls_subnet\.",
    rules=[
        *DETECTRON2_BACKBONE,
        (r"head\.(cls|bbox)_subnet", r"head.\1_tower"),
        (r"head\.cls_score", "head.cls_logits"),
        (r"head\.(bbox_pred|ctrness)", r"head.\1"),
    ],
    cfg={
        # The settings of its configs, whose data loader gives BGR.
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
        "MODEL.FCOS.USE_SCALE": False,
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY": "centerness",
        "MODEL.FCOS.QUALITY_ON": "box",
        "MODEL.FCOS.CLIP_BOXES": "after_nms",
        "MODEL.FCOS.SCORE_THRESH_ON": "score",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
    },
)

# ---- torchvision.models.detection: fcos_resnet50_fpn, and FCOS on other ResNets ----


def _select_classes(tensors: dict[str, Tensor], cfg: CfgNode) -> None:
    """Leave out the background; or keep the 80 of COCO's category numbers 0 to 90 that are used."""
    num_classes = cfg.MODEL.FCOS.NUM_CLASSES
    for name in ("head.cls_logits.weight", "head.cls_logits.bias"):
        channels = tensors[name].shape[:1] if name in tensors else ()
        if num_classes == 80 and channels == (91,):
            class_of = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
            tensors[name] = tensors[name][sorted(class_of, key=class_of.get)]
        elif channels == (num_classes + 1,):
            tensors[name] = tensors[name][1:]


TORCHVISION = Source(
    signature=r"head\.(classification|regression)_head\.",
    rules=[
        # "inner_blocks.0.0.weight"; before version 0.13, "inner_blocks.0.weight".
        *fpn_rules(
            r"backbone\.fpn\.inner_blocks\.{}(\.0)?", r"backbone\.fpn\.layer_blocks\.{}(\.0)?"
        ),
        (r"backbone\.fpn\.extra_blocks", "backbone.top_block"),
        (r"head\.classification_head\.conv", "head.cls_tower"),
        (r"head\.classification_head\.cls_logits", "head.cls_logits"),
        (r"head\.regression_head\.conv", "head.bbox_tower"),
        (r"head\.regression_head\.bbox_reg", "head.bbox_pred"),
        (r"head\.regression_head\.bbox_ctrness", "head.ctrness"),
    ],
    cfg={
        **TORCHVISION_RESNET,
        "MODEL.FCOS.LOCATION_OFFSET": 0.0,
        "MODEL.FCOS.USE_SCALE": False,
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY": "centerness",
        "MODEL.FCOS.QUALITY_ON": "box",
        "MODEL.FCOS.SCORE_THRESH_ON": "score",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
    },
    resnet=r"backbone\.body\.",
    adapt=_select_classes,
)

SOURCES: dict[str, Source] = {
    "adelaidet": ADELAIDET,
    "fcos": ORIGINAL_FCOS,
    "detectron2": DETECTRON2,
    "torchvision": TORCHVISION,
    "mmdet": MMDET,
    "mmdet-gfl": MMDET_GFL,
    "mmdet-tood": MMDET_TOOD,
}

# Patterns of names that only models have which we cannot express, of any source, with the reason.
REFUSED: dict[str, str] = {
    r"backbone\.bottom_up\.stage\d\.OSA": (
        "AdelaiDet's VoVNets have an attention (eSE) in every block, and timm's in the last block "
        "of each stage only: the checkpoint has weights that no model here has"
    ),
    r"bbox_head\.atss_": (
        "This is a checkpoint of ATSS of mmdetection, which predicts offsets from anchors in place "
        "of the distances from a location to the sides of a box: it cannot be converted"
    ),
    r"bbox_head\.vfnet_": (
        "This is a checkpoint of VFNet of mmdetection, which refines its boxes and scores with "
        "star-shaped convolutions: it cannot be converted"
    ),
}

# Patterns of a checkpoint's own config, where it has one, that only models have which we cannot
# express and whose names and shapes do not show it, with the reason.
REFUSED_CONFIGS: dict[str, str] = {
    r"anchor_type\W+anchor_based": (
        "This is a checkpoint of TOOD of mmdetection with anchor_type 'anchor_based', which "
        "predicts offsets from anchors in place of the distances from a location to the sides of a "
        "box: it cannot be converted. Those with 'anchor_free' can"
    ),
}
