"""Converted models of torchvision and Detectron2 give the same detections as before."""

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from detectron2.modeling.meta_arch import fcos as detectron2_fcos
from helpers import STRIDES
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights, fcos_resnet50_fpn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7 as TorchvisionP6P7

from fcos_d2 import model_zoo
from fcos_d2.conversion import convert

SIZE = 256  # a multiple of 128: torchvision's stride is image // grid


def make_cfg(num_classes=80, name="COCO-Detection/fcos_R_18_FPN_1x.yaml"):
    """With 64 channels, and with a wrong value for each key that the two sources set."""
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.FCOS.NUM_CLASSES = num_classes
    cfg.merge_from_list(
        [
            *("INPUT.FORMAT", "none", "MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]),
            *("MODEL.PIXEL_STD", [4.0, 5.0, 6.0], "MODEL.FCOS.LOCATION_OFFSET", 0.25),
            *("MODEL.FCOS.BOX_ACTIVATION", "exp", "MODEL.FCOS.QUALITY_ON", "cls"),
            *("MODEL.FCOS.SCORE_FUSION", "product", "MODEL.FCOS.SCORE_THRESH_ON", "class"),
            *("MODEL.FCOS.SCORE_THRESH_TEST", 0.9, "MODEL.FCOS.TOPK_CANDIDATES_TEST", 7),
            *("MODEL.FCOS.NMS_THRESH_TEST", 0.1, "TEST.DETECTIONS_PER_IMAGE", 3),
            *("MODEL.FCOS.TOP_IN_FEATURE", "res5", "MODEL.FCOS.USE_SCALE", True),
            *("MODEL.FCOS.USE_DEFORMABLE", True),
        ]
    )
    return cfg


def torchvision_model(num_classes=91, top="p5", norm_layer=nn.BatchNorm2d):
    backbone = BackboneWithFPN(
        resnet18(norm_layer=norm_layer),
        {"layer2": "0", "layer3": "1", "layer4": "2"},
        [128, 256, 512],
        64,
        extra_blocks=TorchvisionP6P7({"p5": 64, "res5": 512}[top], 64),
    )
    return TorchvisionFCOS(backbone, num_classes, min_size=SIZE, max_size=SIZE)


def detectron2_model(num_classes=80, norm="GN", top="p5"):
    """The model of Detectron2's configs/common/models/fcos.py, with R-18 and 64 channels."""
    resnet = ResNet(
        BasicStem(norm="BN"),
        ResNet.make_default_stages(18, norm="BN"),
        out_features=["res3", "res4", "res5"],
    )
    backbone = FPN(
        resnet,
        ["res3", "res4", "res5"],
        64,
        top_block=LastLevelP6P7({"p5": 64, "res5": 512}[top], 64, top),
    )
    head = detectron2_fcos.FCOSHead(
        input_shape=[ShapeSpec(channels=64)] * 5,
        num_classes=num_classes,
        conv_dims=[64] * 4,
        norm=norm,
    )
    return detectron2_fcos.FCOS(
        backbone=backbone,
        head=head,
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        num_classes=num_classes,
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
    )


@torch.no_grad()
def as_if_trained(model, cls_logits, bbox_pred, ctrness):
    """Give each norm channel its own statistics, and scale the outputs for dozens of detections."""
    for m in model.modules():
        if isinstance(m, nn.GroupNorm | nn.BatchNorm2d) and m.weight is not None:
            m.weight.uniform_(0.5, 1.5)
            m.bias.uniform_(-0.3, 0.3)
        if isinstance(m, nn.BatchNorm2d | TorchvisionFrozenBN):
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    cls_logits.weight.mul_(4)
    cls_logits.bias.uniform_(-9, -4)
    bbox_pred.weight.mul_(6)
    bbox_pred.bias.fill_(1.5)
    ctrness.weight.mul_(10)
    return model.eval()


def random_image():
    """(3, 256, 256) uint8, smooth at the scale of objects."""
    image = nn.functional.interpolate(torch.rand(1, 3, 24, 24), SIZE, mode="bicubic")[0]
    return (image.clamp(0, 1) * 255).to(torch.uint8)


@torch.no_grad()
def detect(model, image):
    instances = model([{"image": image}])[0]["instances"]
    return instances.pred_boxes.tensor, instances.scores, instances.pred_classes


def converted_model(model, source, cfg):
    state_dict, cfg = convert(model.state_dict(), source, cfg)
    ours = build_model(cfg).eval()
    ours.load_state_dict(state_dict)
    return ours, cfg


def assert_same_detections(actual, expected):
    boxes, scores, classes = expected
    assert len(scores) >= 24 and len(classes.unique()) > 3
    # Otherwise rounding could change the order.
    assert (scores[:-1] - scores[1:]).min() > 1e-6
    actual_boxes, actual_scores, actual_classes = actual
    assert actual_classes.tolist() == classes.tolist()
    torch.testing.assert_close(actual_scores, scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual_boxes, boxes, rtol=1e-4, atol=1e-3)


# Seed 5 gives fewer than 100 detections: their number comes from the threshold, not the limit.
@pytest.mark.parametrize(("seed", "top"), [(0, "p5"), (5, "p5"), (6, "res5")])
def test_torchvision_detections(seed, top):
    torch.manual_seed(seed)
    source = torchvision_model(top=top)
    expected, image = torchvision_detections(source)
    ours, cfg = converted_model(source, "torchvision", make_cfg())
    assert_same_detections(detect(ours, image), expected)
    assert top == cfg.MODEL.FCOS.TOP_IN_FEATURE


def test_torchvision_detections_except_empty_boxes():
    torch.manual_seed(7)
    source = torchvision_model()
    (boxes, scores, classes), image = torchvision_detections(source)
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)  # outside the image before clipping
    assert empty.any()
    ours, _ = converted_model(source, "torchvision", make_cfg())
    assert_same_detections(detect(ours, image), (boxes[~empty], scores[~empty], classes[~empty]))


def test_torchvision_r50_detections():
    torch.manual_seed(0)
    source = fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=91, min_size=SIZE, max_size=SIZE
    )
    expected, image = torchvision_detections(source)
    cfg = make_cfg(name="COCO-Detection/fcos_R_50_FPN_1x.yaml")
    cfg.MODEL.FPN.OUT_CHANNELS = 256
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    ours, _ = converted_model(source, "torchvision", cfg)
    assert_same_detections(detect(ours, image), expected)


def torchvision_detections(source):
    """((boxes, scores, classes in Detectron2's order), image) for a random image."""
    head = source.head.classification_head
    as_if_trained(
        source,
        head.cls_logits,
        source.head.regression_head.bbox_reg,
        source.head.regression_head.bbox_ctrness,
    )
    names = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    coco = MetadataCatalog.get("coco_2017_val").thing_classes
    with torch.no_grad():
        for number, name in enumerate(names):
            if name not in coco:  # a number that COCO does not use, and no model was trained on
                head.cls_logits.weight[number] = 0
                head.cls_logits.bias[number] = -20
        image = random_image()
        detections = source([image.float() / 255])[0]
    classes = torch.tensor([coco.index(names[label]) for label in detections["labels"]])
    return (detections["boxes"], detections["scores"], classes), image


@pytest.mark.parametrize(("seed", "top"), [(0, "p5"), (2, "p5"), (4, "res5")])
def test_detectron2_detections(seed, top):
    torch.manual_seed(seed)
    source = detectron2_model(top=top)
    as_if_trained(source, source.head.cls_score, source.head.bbox_pred, source.head.ctrness)
    image = random_image()
    ours, cfg = converted_model(source, "detectron2", make_cfg())
    assert_same_detections(detect(ours, image), detect(source, image))
    assert top == cfg.MODEL.FCOS.TOP_IN_FEATURE


class ClipsBeforeNMS(detectron2_fcos.FCOS):
    def _decode_multi_level_predictions(self, *args):
        candidates = super()._decode_multi_level_predictions(*args)
        candidates.pred_boxes.clip(candidates.image_size)
        return candidates[candidates.pred_boxes.nonempty()]


@pytest.mark.parametrize("seed", [3, 6])
def test_detectron2_detections_depend_on_clipping_after_nms(seed):
    torch.manual_seed(seed)
    source = detectron2_model()
    as_if_trained(source, source.head.cls_score, source.head.bbox_pred, source.head.ctrness)
    image = random_image()
    ours, _ = converted_model(source, "detectron2", make_cfg())
    assert_same_detections(detect(ours, image), detect(source, image))
    ours.post_processor.clip_boxes = "before_nms"
    before = detect(ours, image)
    assert before[2].tolist() != detect(source, image)[2].tolist()
    source.__class__ = ClipsBeforeNMS
    assert_same_detections(before, detect(source, image))


@pytest.mark.parametrize("norm", ["GN", "BN", ""])
def test_detectron2_head(norm):
    """With BN, Detectron2's levels have their own statistics, but share the weight and bias."""
    source = detectron2_model(norm=norm)
    as_if_trained(source, source.head.cls_score, source.head.bbox_pred, source.head.ctrness)
    if norm == "BN":
        assert source.head.cls_subnet[1][0].affine is False
        nn.init.uniform_(source.head.cls_subnet[1].weight)
        nn.init.uniform_(source.head.bbox_subnet[4].bias)
    ours, cfg = converted_model(source, "detectron2", make_cfg())
    features = [torch.randn(1, 64, 128 // s, 128 // s) * s for s in STRIDES]
    with torch.no_grad():
        logits, ltrb, quality, *_ = ours.head(features)
        expected_logits, deltas, expected_quality = source.head(features)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(quality, expected_quality)
    expected_ltrb = [x.relu() * s for x, s in zip(deltas, STRIDES, strict=True)]
    torch.testing.assert_close(ltrb, expected_ltrb)
    assert norm == cfg.MODEL.FCOS.NORM


def test_torchvision_frozen_bn():
    """As in the published model; this class has no batch counters."""
    torch.manual_seed(5)
    source = torchvision_model(norm_layer=TorchvisionFrozenBN)
    expected, image = torchvision_detections(source)
    ours, _ = converted_model(source, "torchvision", make_cfg())
    assert_same_detections(detect(ours, image), expected)


def test_torchvision_without_background():
    source = torchvision_model(num_classes=4)
    state_dict, _ = convert(source.state_dict(), "torchvision", make_cfg(num_classes=3))
    expected = source.head.classification_head.cls_logits
    torch.testing.assert_close(state_dict["head.cls_logits.weight"], expected.weight[1:])
    torch.testing.assert_close(state_dict["head.cls_logits.bias"], expected.bias[1:])
    # As many classes as channels: the classes were numbered from 0, without a background.
    state_dict, _ = convert(source.state_dict(), "torchvision", make_cfg(num_classes=4))
    torch.testing.assert_close(state_dict["head.cls_logits.weight"], expected.weight)
