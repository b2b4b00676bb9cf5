"""AdelaiDet's FCOS, whose names are ours but for the prefix of the head."""

from .source import DETECTRON2_BACKBONE, Source

_HEAD = r"proposal_generator\.fcos_head\."
_LAYERS = "share_tower|cls_tower|bbox_tower|cls_logits|bbox_pred|ctrness|scales"

ADELAIDET = Source(
    signature=_HEAD,
    rules=[*DETECTRON2_BACKBONE, (rf"{_HEAD}({_LAYERS})", r"head.\1")],
    cfg={
        "INPUT.FORMAT": "BGR",
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY_ON": "box",
        "MODEL.FCOS.CLIP_BOXES": "after_nms",
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
    },
    # Its X-101-32x8d models divide by a standard deviation; the others do not.
    not_in_file=("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"),
)
