"""The model of COCO-Detection/fcos_R_50_FPN_1x.yaml as a LazyConfig."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, BasicStem
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from fcos_d2.modeling import FCOS, FCOSHead, FCOSLoss, FCOSPostProcessor, LocationAssigner
from fcos_d2.modeling.backbone import FoldedResNet

model = L(FCOS)(
    backbone=L(FPN)(
        bottom_up=L(FoldedResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(FoldedResNet.make_default_stages)(
                depth=50, stride_in_1x1=True, norm="FrozenBN"
            ),
            out_features=["res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=256,
        top_block=L(LastLevelP6P7)(in_channels=256, out_channels=256, in_feature="p5"),
    ),
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
