"""AdelaiDet's FCOS, whose names are ours but for the prefix of the head."""

from .source import DETECTRON2_BACKBONE, ORIGINAL_SETTINGS, Source

_HEAD = r"proposal_generator\.fcos_head\."

ADELAIDET = Source(
    signature=r"proposal_generator\.fcos_head\..+",
    rules=[
        *DETECTRON2_BACKBONE,
        (
            _HEAD
            + r"((?:share_tower|cls_tower|bbox_tower|cls_logits|bbox_pred|ctrness|scales)\..+)",
            r"head.\1",
        ),
    ],
    cfg={
        **ORIGINAL_SETTINGS,
        "INPUT.FORMAT": "BGR",
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY_ON": "box",
        "MODEL.FCOS.CLIP_BOXES": "after_nms",
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
    },
    # Its X-101-32x8d models divide by a standard deviation; the others do not.
    not_in_file=("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"),
)
