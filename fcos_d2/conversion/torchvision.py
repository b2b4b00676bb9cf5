"""torchvision.models.detection: fcos_resnet50_fpn and FCOS on other ResNets."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor

from .source import Source, fpn_rules

# Its classes are the category numbers of COCO's files, 0 to 90, of which 80 are used.
_COCO_NUMBERS = 91


def _adapt(tensors: dict[str, Tensor], cfg: CfgNode) -> None:
    """Select our classes: the 80 used numbers of COCO, or all but the background."""
    num_classes = cfg.MODEL.FCOS.NUM_CLASSES
    for name in ("head.cls_logits.weight", "head.cls_logits.bias"):
        channels = tensors[name].shape[:1] if name in tensors else ()
        if num_classes == 80 and channels == (_COCO_NUMBERS,):
            metadata = MetadataCatalog.get("coco_2017_val")
            class_of_number = metadata.thing_dataset_id_to_contiguous_id
            numbers = sorted(class_of_number, key=class_of_number.get)
            tensors[name] = tensors[name][numbers]
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
        "INPUT.FORMAT": "RGB",
        # 255 times its 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225 for images in [0, 1].
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.FCOS.LOCATION_OFFSET": 0.0,
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY": "centerness",
        "MODEL.FCOS.QUALITY_ON": "box",
        "MODEL.FCOS.SCORE_THRESH_ON": "score",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
    },
    resnet=r"backbone\.body\.",
    adapt=_adapt,
)
