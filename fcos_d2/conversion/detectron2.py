"""Detectron2's own FCOS, detectron2/modeling/meta_arch/fcos.py."""

from .source import DETECTRON2_BACKBONE, Source

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
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY": "centerness",
        "MODEL.FCOS.QUALITY_ON": "box",
        "MODEL.FCOS.CLIP_BOXES": "after_nms",
        "MODEL.FCOS.SCORE_THRESH_ON": "score",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
    },
)
