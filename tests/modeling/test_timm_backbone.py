import sys

import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from helpers import tiny_cfg

from fcos_d2 import model_zoo
from fcos_d2.modeling import TimmBackbone
from fcos_d2.modeling.backbone import check_random_start

YAMLS = [
    "COCO-Detection/fcos_timm_mobilenetv3_FPN_1x.yaml",
    "COCO-Detection/fcos_timm_convnext_tiny_FPN_1x.yaml",
    "COCO-Detection/fcos_timm_vovnet39_FPN_3x.yaml",
    "COCO-Detection/fcos_timm_vovnet57_FPN_3x.yaml",
]
# Their pixels are those of the published models.
PUBLISHED = [
    "COCO-Detection/fcos_RT_DLA_34_FPN_4x.yaml",
    "Ablations/iccv_bn_bs16_MNV2_FPN_1x.yaml",
]
FEATURES = ["res3", "res4", "res5"]


def timm_cfg(name="mobilenetv3_small_050", norm="BN", **fcos_keys):
    cfg = tiny_cfg(**fcos_keys)
    cfg.MODEL.BACKBONE.NAME = "build_fcos_timm_fpn_backbone"
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.NORM = name, norm
    return cfg


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "resnet18"])
def test_maps_are_timms(name):
    backbone = TimmBackbone(name, pretrained=False, norm="BN", out_features=FEATURES).eval()
    whole = timm.create_model(name, features_only=True).eval()
    whole.load_state_dict(backbone.model.state_dict())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps, expected = backbone(x), whole(x)[-3:]
    assert list(maps) == FEATURES
    for stride, feature, value in zip((8, 16, 32), FEATURES, expected, strict=True):
        assert torch.equal(maps[feature], value)
        shape = ShapeSpec(channels=value.shape[1], stride=stride)
        assert backbone.output_shape()[feature] == shape
        assert maps[feature].shape[2:] == (64 // stride, 96 // stride)


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("source", ["p5", "res5"])
def test_levels_are_those_of_the_resnet(levels, source):
    features = [f"p{i}" for i in range(3, 6 + levels)]
    keys = {"TOP_LEVELS": levels, "TOP_IN_FEATURE": source, "IN_FEATURES": features}
    backbone = build_backbone(timm_cfg(**keys))
    assert backbone.output_shape() == build_backbone(tiny_cfg(**keys)).output_shape()
    assert list(backbone(torch.zeros(1, 3, 64, 64))) == features


@pytest.mark.parametrize("name", YAMLS)
def test_configs_have_the_pixels_of_timms_weights(name):
    cfg = model_zoo.get_config(name)
    weights = timm.get_pretrained_cfg(cfg.MODEL.TIMM.NAME)
    assert cfg.MODEL.TIMM.PRETRAINED and cfg.INPUT.FORMAT == "RGB"
    assert pytest.approx([255 * x for x in weights.mean]) == cfg.MODEL.PIXEL_MEAN
    assert pytest.approx([255 * x for x in weights.std]) == cfg.MODEL.PIXEL_STD


@pytest.mark.parametrize("name", YAMLS + PUBLISHED)
def test_every_trained_parameter_gets_a_gradient(name):
    """Distributed training refuses parameters without one."""
    cfg = model_zoo.get_config(name)
    cfg.MODEL.TIMM.PRETRAINED = False
    backbone = build_backbone(cfg)
    sum(x.sum() for x in backbone(torch.randn(1, 3, 64, 64)).values()).backward()
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), parameter_name


@pytest.mark.parametrize("name, frozen", [
    ("mobilenetv3_small_050", "model.blocks.4"), ("resnet18", None),
])  # fmt: skip
def test_stages_that_nobody_reads_are_not_trained(name, frozen):
    backbone = TimmBackbone(name, pretrained=False, norm="BN", out_features=["res3", "res4"])
    sum(x.sum() for x in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), parameter_name
    unread = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert any(n.startswith(frozen) for n in unread) if frozen else not unread


def test_a_model_is_built_where_no_gradients_are_recorded():
    with torch.no_grad():
        backbone = TimmBackbone("resnet18", pretrained=False, norm="BN", out_features=["res3"])
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert "model.layer2.0.conv1.weight" in trained


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN"])
def test_norms(norm):
    x = torch.randn(2, 3, 64, 64)
    backbone = build_backbone(timm_cfg(norm=norm)).bottom_up
    kinds = {type(m).__name__ for m in backbone.modules() if hasattr(m, "running_mean")}
    assert (
        kinds
        == {
            "BN": {"BatchNorm2d", "BatchNormAct2d"},
            "SyncBN": {"SyncBatchNorm", "SyncBatchNormAct"},
            "FrozenBN": {"FrozenBatchNorm2d", "FrozenBatchNormAct2d"},
        }[norm]
    )
    if norm == "FrozenBN":
        before = backbone.train()(x)["res5"]
        assert torch.equal(before, backbone.eval()(x)["res5"])
        with pytest.raises(ValueError, match=r" 0 frozen values and 34 fixed batch norms"):
            check_random_start(backbone)
    else:
        check_random_start(backbone)


@pytest.mark.parametrize("weights, loads", [("", True), ("detector.pth", False)])
def test_timms_weights_are_loaded_unless_the_detectors_are(weights, loads, monkeypatch):
    asked = []
    create = timm.create_model

    def recording(name, *, pretrained=False, **kwargs):
        asked.append(pretrained)
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", recording)
    cfg = timm_cfg()
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.WEIGHTS = True, weights
    build_backbone(cfg)
    assert asked == [False, loads]


def test_the_zoo_loads_no_weights_when_told(monkeypatch):
    monkeypatch.setattr(
        "fcos_d2.modeling.backbone.TimmBackbone.__init__",
        lambda self, name, *, pretrained, **kwargs: pytest.fail() if pretrained else _stop(),
    )
    with pytest.raises(StopIteration):
        model_zoo.get(YAMLS[0], weights="", device="cpu")


def _stop():
    raise StopIteration


@pytest.mark.parametrize("name, message", [
    ("vit_tiny_patch16_224", r"strides \[16\], .* those of \[8, 16, 32\]\. Choose a model"),
    ("maxvit_tiny_tf_224", r"refuses images of 64x64 pixels: .*7.*\. Choose a model"),
    ("swin_tiny_patch4_window7_224", r"layout, NHWC\. Choose a model that makes maps of the"),
])  # fmt: skip
def test_unfit_models_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(timm_cfg(name))


def test_errors_say_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match=r"NORM must be one of \['BN', 'SyncBN', 'FrozenBN'\]"):
        build_backbone(timm_cfg(norm="GN"))
    cfg = timm_cfg()
    cfg.MODEL.FPN.IN_FEATURES = ["c3", "c4"]
    with pytest.raises(ValueError, match="are named res2 to res5, got 'c3'"):
        build_backbone(cfg)
    with pytest.raises(RuntimeError, match="no_such_model"):
        build_backbone(timm_cfg("no_such_model"))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="needs timm: pip install timm"):
        build_backbone(timm_cfg())
