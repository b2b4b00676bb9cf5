"""Detectron2's own FCOS, detectron2/modeling/meta_arch/fcos.py."""

from .source import BATCH_COUNTER, DETECTRON2_BACKBONE, ORIGINAL_SETTINGS, Source

DETECTRON2 = Source(
    signature=r"head\.cls_subnet\..+",
    rules=[
        *DETECTRON2_BACKBONE,
        (r"head\.cls_subnet\.(.+)", r"head.cls_tower.\1"),
        (r"head\.bbox_subnet\.(.+)", r"head.bbox_tower.\1"),
        (r"head\.cls_score\.(.+)", r"head.cls_logits.\1"),
        (r"(head\.(?:bbox_pred|ctrness)\..+)", r"\1"),
    ],
    cfg={
        **ORIGINAL_SETTINGS,
        # The settings of its configs, whose data loader gives BGR.
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY": "centerness",
        "MODEL.FCOS.QUALITY_ON": "box",
        "MODEL.FCOS.CLIP_BOXES": "after_nms",
        "MODEL.FCOS.SCORE_THRESH_ON": "score",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
    },
    # Checkpoints of versions before 0.6 contain one box per level, centred on the location.
    # LOCATION_OFFSET replaces it.
    ignored=rf"{BATCH_COUNTER}|anchor_generator\.cell_anchors\.\d+",
)
