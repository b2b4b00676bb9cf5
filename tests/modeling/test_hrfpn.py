import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from helpers import make_detector, make_input, tiny_cfg
from test_bifpn import FixedMaps
from test_tracing import assert_same_detections, trace

from fcos_d2.modeling import HRFPN

CHANNELS = {"res2": 3, "res3": 4, "res4": 5, "res5": 6}
LEVELS = {1: ["p2", "p3", "p4", "p5", "p6", "p7"], 2: ["p3", "p4", "p5", "p6", "p7"]}  # by stride


def make_maps(height, width):
    """Maps of random values, the finest of (height, width) cells."""
    return {
        name: torch.randn(2, channels, height // 2**i, width // 2**i, dtype=torch.float64)
        for i, (name, channels) in enumerate(CHANNELS.items())
    }


def enlarge(x, factor):
    """Between the middles of the four nearest cells, or at the edge of those that there are."""
    height, width = x.shape[-2:]
    result = x.new_zeros(*x.shape[:2], height * factor, width * factor)
    for row in range(height * factor):
        for column in range(width * factor):
            y = min(max((row + 0.5) / factor - 0.5, 0), height - 1)
            c = min(max((column + 0.5) / factor - 0.5, 0), width - 1)
            for near_y in {math.floor(y), math.ceil(y)}:
                for near_c in {math.floor(c), math.ceil(c)}:
                    share = (1 - abs(y - near_y)) * (1 - abs(c - near_c))
                    result[..., row, column] += share * x[..., near_y, near_c]
    return result


def mean_of_windows(x, window):
    """Of whole windows alone, or of all cells along a side that is shorter than one."""
    tall, wide = (min(window, n) for n in x.shape[-2:])
    rows = [
        [
            x[..., y : y + tall, c : c + wide].mean(dim=(2, 3))
            for c in range(0, x.shape[-1] - wide + 1, window)
        ]
        for y in range(0, x.shape[-2] - tall + 1, window)
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


@pytest.mark.parametrize("size", [(32, 40), (56, 88), (8, 24)])  # the last is less than a window
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_maps_are_those_of_the_published_pyramid(stride, size):
    maps = make_maps(*size)
    levels = LEVELS[stride]
    backbone = HRFPN(
        FixedMaps(maps), in_features=list(CHANNELS), levels=levels, out_channels=7
    ).double()
    tensors = backbone.state_dict()
    for x in tensors.values():
        x.normal_(std=0.5)
    joined = torch.cat([enlarge(x, 2**i) for i, x in enumerate(maps.values())], dim=1)
    joined = F.conv2d(joined, tensors["reduction.weight"], tensors["reduction.bias"])
    actual = backbone(None)
    assert list(actual) == levels
    for i, (name, x) in enumerate(actual.items()):
        weight, bias = tensors[f"outputs.{i}.weight"], tensors[f"outputs.{i}.bias"]
        pooled = mean_of_windows(joined, 2**i)
        expected = F.conv2d(pooled, weight, bias, stride=stride, padding=1)
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)
        assert backbone.output_shape()[name] == ShapeSpec(channels=7, stride=2 ** int(name[1]))
    assert len(tensors) == 2 + 2 * len(levels)


def hrnet_cfg(name="hrnet_w18_small", **fcos_keys):
    cfg = tiny_cfg(**fcos_keys)
    cfg.MODEL.BACKBONE.NAME = "build_fcos_timm_hrfpn_backbone"
    cfg.MODEL.TIMM.NAME = name
    cfg.MODEL.FPN.IN_FEATURES = list(CHANNELS)
    return cfg


def test_the_hrnet_is_without_its_layers_for_classification():
    """Of 1904.04514: branches of C, 2 C, 4 C and 8 C channels, all of which are trained."""
    backbone = build_backbone(hrnet_cfg())
    shapes = backbone.bottom_up.output_shape()
    assert {n: (s.channels, s.stride) for n, s in shapes.items()} == {
        "res2": (16, 4), "res3": (32, 8), "res4": (64, 16), "res5": (128, 32),
    }  # fmt: skip
    assert backbone.size_divisibility == 32
    names = {n.split(".")[0] for n, _ in backbone.bottom_up.model.named_children()}
    assert not names & {"incre_modules", "downsamp_modules", "final_layer"}
    sum(x.sum() for x in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
    assert all(p.requires_grad for p in backbone.parameters())


def test_any_model_of_timm_with_these_maps_will_do():
    backbone = build_backbone(hrnet_cfg("mobilenetv3_small_050"))
    assert list(backbone(torch.zeros(1, 3, 64, 96))) == LEVELS[2]


@pytest.mark.parametrize("levels", [
    ["p4", "p5"], ["p3", "p5"], ["p1", "p2"], ["p4", "p3"], ["res3", "res4"],
])  # fmt: skip
def test_other_levels_are_refused(levels):
    with pytest.raises(ValueError, match=r"levels without a gap from p2 or p3 on, .* got \['"):
        build_backbone(hrnet_cfg(IN_FEATURES=levels))


def test_maps_with_a_gap_are_refused():
    cfg = hrnet_cfg()
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res4"]
    with pytest.raises(ValueError, match=r"twice the stride of the one before, got .*\[4, 16\]"):
        build_backbone(cfg)


def test_traced_on_one_image_right_on_others():
    model = make_detector(hrnet_cfg(SCORE_THRESH_TEST=0.02))
    traced = trace(model, make_input(size=(64, 96))["image"])
    counts = []
    for seed, size in enumerate([(64, 64), (96, 200), (150, 100), (250, 330)]):
        image = make_input(size=size, seed=seed)["image"]
        counts.append(assert_same_detections(model, traced, image))
    assert max(counts) > 10
