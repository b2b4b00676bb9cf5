import pytest
import torch
from detectron2.layers import DeformConv, ModulatedDeformConv, ShapeSpec
from detectron2.modeling import build_backbone
from helpers import tiny_cfg

from fcos_d2.modeling.deform_conv import PortableDeformConv


@pytest.mark.parametrize("keys", [
    {"IN_FEATURES": ["p3"], "TOP_LEVELS": 0},
    {"IN_FEATURES": ["p3", "p6"], "TOP_LEVELS": 1, "TOP_IN_FEATURE": "p5"},
    {"IN_FEATURES": ["p3", "p6"], "TOP_LEVELS": 1, "TOP_IN_FEATURE": "res5"},
])  # fmt: skip
def test_every_trained_parameter_gets_a_gradient(keys):
    """Distributed training refuses parameters without one."""
    backbone = build_backbone(tiny_cfg(**keys))
    maps = backbone(torch.randn(1, 3, 64, 64))
    sum(maps[f].sum() for f in keys["IN_FEATURES"]).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_levels_strides_and_channels():
    backbone = build_backbone(tiny_cfg())
    shapes = backbone.output_shape()
    assert {k: v.stride for k, v in shapes.items()} == {
        "p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128,
    }  # fmt: skip
    assert all(v.channels == 64 for v in shapes.values())
    maps = backbone(torch.zeros(1, 3, 64, 96))
    assert {k: tuple(v.shape[2:]) for k, v in maps.items()} == {
        "p3": (8, 12), "p4": (4, 6), "p5": (2, 3), "p6": (1, 2), "p7": (1, 1),
    }  # fmt: skip


@pytest.mark.parametrize("levels, names", [(2, 5), (1, 4), (0, 3)])
def test_top_levels(levels, names):
    features = [f"p{i}" for i in range(3, 6 + levels)]
    backbone = build_backbone(tiny_cfg(TOP_LEVELS=levels, IN_FEATURES=features))
    assert list(backbone(torch.zeros(1, 3, 64, 64))) == [f"p{i}" for i in range(3, 3 + names)]


@pytest.mark.parametrize("source, channels", [("p5", 64), ("res5", 512)])
def test_p6_starts_from_p5_or_res5(source, channels):
    backbone = build_backbone(tiny_cfg(TOP_IN_FEATURE=source))
    assert backbone.top_block.p6.in_channels == channels
    backbone(torch.randn(1, 3, 64, 64))["p7"].sum().backward()
    # P6 is made from P5 through its output convolution, or straight from C5.
    assert (backbone.fpn_output5.weight.grad is not None) == (source == "p5")


@pytest.mark.parametrize("relu", [True, False])
def test_relu_before_p7(relu):
    backbone = build_backbone(tiny_cfg(TOP_RELU=relu))
    maps = backbone(torch.randn(1, 3, 64, 64))
    p6 = maps["p6"].relu() if relu else maps["p6"]
    assert (maps["p6"] < 0).any()
    torch.testing.assert_close(maps["p7"], backbone.top_block.p7(p6))


def test_one_level_alone():
    cfg = tiny_cfg(TOP_LEVELS=0, IN_FEATURES=["p4"])
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res4"]
    assert build_backbone(cfg).output_shape() == {"p4": ShapeSpec(channels=64, stride=16)}


def test_errors_say_what_to_set():
    with pytest.raises(
        ValueError, match=r"TOP_RELU False .* TOP_LEVELS 1 .*: set TOP_LEVELS 2, or"
    ):
        build_backbone(tiny_cfg(TOP_LEVELS=1, TOP_RELU=False))
    with pytest.raises(ValueError, match="TOP_LEVELS must be 0, 1 or 2, got 3"):
        build_backbone(tiny_cfg(TOP_LEVELS=3))
    with pytest.raises(ValueError, match=r"TOP_LEVELS makes the level p[67], but .* leaves"):
        build_backbone(tiny_cfg(IN_FEATURES=["p3", "p4", "p5"]))
    with pytest.raises(ValueError, match=r"FPN\.IN_FEATURES makes the level p3, but .* leaves"):
        build_backbone(tiny_cfg(IN_FEATURES=["p4", "p5"], TOP_LEVELS=0))
    with pytest.raises(ValueError, match="TOP_IN_FEATURE must be 'p5' or 'res5'"):
        build_backbone(tiny_cfg(TOP_IN_FEATURE="p4"))


@pytest.mark.gpu
@pytest.mark.parametrize("modulated", [True, False])
def test_deformable_convolution_equals_detectron2s_operator(modulated):
    kwargs = {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2, "bias": False}
    conv = (ModulatedDeformConv if modulated else DeformConv)(8, 12, **kwargs).cuda()
    x = torch.randn(2, 8, 9, 11, device="cuda")
    offset = torch.randn(2, 18, 5, 6, device="cuda") * 2
    rest = (torch.rand(2, 9, 5, 6, device="cuda"),) if modulated else ()
    expected = conv(x, offset, *rest)
    actual = PortableDeformConv(conv)(x, offset, *rest)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modulated", [True, False])
def test_deformable_convolution_by_loops(modulated):
    """Bilinear samples at the shifted taps (1703.06211, eq. 2; 1811.11168, eq. 1)."""
    conv = (ModulatedDeformConv if modulated else DeformConv)(
        4, 2, kernel_size=3, padding=1, bias=False
    )
    x, offset, mask = torch.randn(1, 4, 5, 6), torch.randn(1, 18, 5, 6), torch.rand(1, 9, 5, 6)
    out = PortableDeformConv(conv)(x, offset, *((mask,) if modulated else ()))

    def sample(y, x_):
        total = torch.zeros(4)
        y0, x0 = int(y // 1), int(x_ // 1)
        for yy, xx in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
            if 0 <= yy < 5 and 0 <= xx < 6:
                total += (1 - abs(y - yy)) * (1 - abs(x_ - xx)) * x[0, :, yy, xx]
        return total

    for i, j in ((0, 0), (2, 3), (4, 5)):
        expected = torch.zeros(2)
        for tap in range(9):
            y = i - 1 + tap // 3 + offset[0, 2 * tap, i, j].item()
            x_ = j - 1 + tap % 3 + offset[0, 2 * tap + 1, i, j].item()
            weight = mask[0, tap, i, j] if modulated else 1
            expected += weight * conv.weight[:, :, tap // 3, tap % 3] @ sample(y, x_)
        torch.testing.assert_close(out[0, :, i, j], expected, rtol=1e-4, atol=1e-4)
