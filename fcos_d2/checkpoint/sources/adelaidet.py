"""AdelaiDet's FCOS, whose names are ours but for the prefix of the head."""

from .source import BATCH_COUNTER, DETECTRON2_BACKBONE, Rules, Source

_HEAD = r"proposal_generator\.fcos_head\."
_RULES: Rules = [
    *DETECTRON2_BACKBONE,
    (
        _HEAD + r"((?:share_tower|cls_tower|bbox_tower|cls_logits|bbox_pred|ctrness|scales)\..+)",
        r"head.\1",
    ),
]

ADELAIDET = Source(
    signature=r"proposal_generator\.fcos_head\..+",
    rules=lambda names: _RULES,
    cfg={
        "INPUT.FORMAT": "BGR",
        "MODEL.FCOS.LOCATION_OFFSET": 0.5,
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY_ON": "box",
        "MODEL.FCOS.SCORE_FUSION": "sqrt",
        "MODEL.FCOS.CLIP_BOXES": "after_nms",
        "MODEL.FCOS.SCORE_THRESH_ON": "class",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.05,
        "MODEL.FCOS.TOPK_CANDIDATES_TEST": 1000,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
        "TEST.DETECTIONS_PER_IMAGE": 100,
    },
    # Its X-101-32x8d models divide by a standard deviation; the others do not.
    not_in_file=("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"),
    ignored=(BATCH_COUNTER,),
)
