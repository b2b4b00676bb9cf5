"""The model of COCO-Detection/fcos_R_50_FPN_1x.yaml as a LazyConfig."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config

from fcos_d2.modeling import FCOS, FCOSHead, FCOSLoss, FCOSPostProcessor, LocationAssigner
from fcos_d2.modeling.backbone import FoldedResNet

model = L(FCOS)(
    backbone=get_config("common/models/fcos.py").model.backbone,
    head=L(FCOSHead)(
        input_shape=[ShapeSpec(channels=256, stride=s) for s in (8, 16, 32, 64, 128)],
        num_classes="${..num_classes}",
    ),
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    assigner=L(LocationAssigner)(
        regression_ranges=[[0, 64], [64, 128], [128, 256], [256, 512], [512, float("inf")]],
        center_sampling_radius=1.5,
    ),
    loss=L(FCOSLoss)(),
    post_processor=L(FCOSPostProcessor)(),
    num_classes=80,
    pixel_mean=[103.530, 116.280, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
)
model.backbone.bottom_up._target_ = FoldedResNet
model.backbone.bottom_up.freeze_at = 2
