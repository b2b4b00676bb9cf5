import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from fcos_d2.modeling import FCOSHead

SHAPES = [ShapeSpec(channels=64, stride=s) for s in (8, 16)]


def make_head(**kwargs):
    defaults = {"num_classes": 5, "num_cls_convs": 2, "num_box_convs": 1}
    return FCOSHead(input_shape=SHAPES, **(defaults | kwargs))


def features(images=2):
    return [torch.randn(images, 64, 6, 8), torch.randn(images, 64, 3, 4)]


def test_shapes_and_units():
    class_logits, ltrb, quality_logits, *_ = make_head()(features())
    assert [tuple(x.shape) for x in class_logits] == [(2, 5, 6, 8), (2, 5, 3, 4)]
    assert [tuple(x.shape) for x in ltrb] == [(2, 4, 6, 8), (2, 4, 3, 4)]
    assert [tuple(x.shape) for x in quality_logits] == [(2, 1, 6, 8), (2, 1, 3, 4)]
    assert all((x >= 0).all() and x.dtype == torch.float32 for x in ltrb)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_scale", [True, False])
def test_distances_in_pixels(use_scale, training):
    # The predictor's weights are 0 and its bias is 2, so x = 2 everywhere. With scales 3 and 5:
    # relu: 3 * 2 * stride 8 = 48 and 5 * 2 * 16 = 160; exp: e^6 and e^10. Without: 2 * stride, e^2.
    for activation, expected in (
        ("relu", (48, 160) if use_scale else (16, 32)),
        ("exp", (math.exp(6), math.exp(10)) if use_scale else (math.exp(2),) * 2),
    ):
        head = make_head(box_activation=activation, use_scale=use_scale).train(training)
        nn.init.zeros_(head.bbox_pred.weight)
        nn.init.constant_(head.bbox_pred.bias, 2.0)
        if use_scale:
            for scale, value in zip(head.scales, (3.0, 5.0), strict=True):
                nn.init.constant_(scale.scale, value)
        for x, value in zip(head(features())[1], expected, strict=True):
            torch.testing.assert_close(x, torch.full_like(x, value))


@pytest.mark.parametrize("training", [True, False])
def test_distances_as_distributions(training):
    # The bins stand at 0, 1 and 2 strides. The predictor's bias is ln 2 for the second bin of left
    # and top; with a scale of 3 the logits are 0, 3 ln 2, 0, and the probabilities 0.1, 0.8, 0.1:
    # the expected value is 1 stride. For the third bin, of right and bottom, it is 0.1 + 2 * 0.8.
    head = make_head(box_activation="distribution", reg_max=2).train(training)
    assert head.bbox_pred.out_channels == 12
    nn.init.zeros_(head.bbox_pred.weight)
    nn.init.zeros_(head.bbox_pred.bias)
    for scale in head.scales:
        nn.init.constant_(scale.scale, 3.0)
    with torch.no_grad():
        head.bbox_pred.bias[[1, 4, 8, 11]] = math.log(2)  # left and top, right and bottom
    outputs = head(features())
    for x, stride, (height, width) in zip(outputs.ltrb, (8, 16), ((6, 8), (3, 4)), strict=True):
        expected = torch.tensor([1.0, 1.0, 1.7, 1.7])[:, None, None] * stride
        torch.testing.assert_close(x, expected.expand(2, 4, height, width))
    assert outputs.distributions.bin_widths == (8, 16)
    logits = 3 * math.log(2) * torch.tensor([0.0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1])
    for x in outputs.distributions.logits:
        torch.testing.assert_close(x, logits[:, None, None].expand_as(x))
    assert make_head()(features()).distributions is None


def test_quality_from_distributions_by_hand():
    torch.manual_seed(0)
    kinds = {"box_activation": "distribution", "quality": "joint", "reg_max": 5}
    head = make_head(**kinds, distribution_quality=True)
    nn.init.normal_(head.bbox_pred.weight, std=0.3)
    for layer in head.box_quality.layers[::2]:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    plain = make_head(**kinds)
    plain.load_state_dict(head.state_dict(), strict=False)
    maps = features()
    outputs, without = head(maps), plain(maps)
    for level, (image, y, x) in enumerate([(1, 2, 3), (0, 1, 2)]):
        place = image, slice(None), y, x
        statistics = []
        for of_side in outputs.distributions.logits[level][place].split(6):
            probabilities = sorted(of_side.softmax(0).tolist())[::-1][:4]
            statistics += [*probabilities, sum(probabilities) / 4]
        first, _, second = head.box_quality.layers
        hidden = (first.weight[:, :, 0, 0] @ torch.tensor(statistics) + first.bias).relu()
        quality = (second.weight[0, :, 0, 0] @ hidden + second.bias).sigmoid()
        expected = without.class_logits[level][place].sigmoid() * quality
        torch.testing.assert_close(outputs.class_logits[level][place].sigmoid(), expected)
    assert all(map(torch.equal, outputs.ltrb, without.ltrb))
    # Classes teach the boxes how sure to be.
    sum(x.sum() for x in outputs.class_logits).backward()
    assert all(
        p.grad is not None for p in (*head.bbox_tower.parameters(), *head.scales.parameters())
    )


def test_quality_from_distributions_needs_both_keys():
    for kinds in ({"quality": "joint"}, {"box_activation": "distribution"}):
        with pytest.raises(
            ValueError, match=r"needs BOX_ACTIVATION 'distribution', .* QUALITY 'joint'"
        ):
            make_head(distribution_quality=True, **kinds)
    kinds = {"box_activation": "distribution", "quality": "joint", "distribution_quality": True}
    with pytest.raises(ValueError, match="REG_MAX must be a whole number >= 3, got 2"):
        make_head(reg_max=2, **kinds)
    assert make_head(reg_max=3, **kinds)(features()).class_logits[0].isfinite().all()


def test_exp_of_a_huge_prediction_is_finite():
    head = make_head(box_activation="exp")
    nn.init.constant_(head.bbox_pred.bias, 1e6)
    assert all(x.isfinite().all() and (x * x).isfinite().all() for x in head(features())[1])


def test_prior_probability():
    head = make_head(prior_prob=0.03)
    nn.init.zeros_(head.cls_logits.weight)
    torch.testing.assert_close(
        head(features())[0][0].sigmoid(), torch.full((2, 5, 6, 8), 0.03), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("tower, other", [("box", "cls"), ("cls", "box")])
def test_quality_stands_on_the_tower_it_is_told(tower, other):
    head = make_head(quality_on=tower)
    sum(x.sum() for x in head(features())[2]).backward()
    towers = {"box": head.bbox_tower, "cls": head.cls_tower}
    assert all(p.grad is not None for p in towers[tower].parameters())
    assert all(p.grad is None for p in towers[other].parameters())


def test_no_quality_branch():
    head = make_head(quality="none")
    assert head(features())[2] is None
    assert not any("ctrness" in name for name in head.state_dict())


def test_shared_tower_feeds_both():
    head = make_head(num_share_convs=1)
    sum(x.sum() for x in head(features())[0]).backward()
    first = [p.grad.clone() for p in head.share_tower.parameters()]
    sum(x.sum() for x in head(features())[1]).backward()
    assert len(first) == 4  # weight and bias of a convolution and of its norm
    assert all(
        not torch.equal(a, p.grad)
        for a, p in zip(first, head.share_tower.parameters(), strict=True)
    )


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_batch_norm_keeps_statistics_per_level(norm):
    head = make_head(norm=norm).train()
    low, high = features()
    head([low, high + 100])
    norms = head.cls_tower[1]
    assert len(norms) == 2
    assert not torch.allclose(norms[0].running_mean, norms[1].running_mean, atol=0.1)
    before = norms[0].running_mean.clone()
    head.eval()
    head([low, high])
    assert torch.equal(before, norms[0].running_mean)


def test_norm_kinds():
    kinds = {n: type(make_head(norm=n).cls_tower[1]).__name__ for n in ("GN", "BN", "")}
    assert kinds == {"GN": "GroupNorm", "BN": "PerLevelNorm", "": "ReLU"}


def test_deformable_layer_is_the_last_of_both_towers_and_starts_as_a_convolution():
    head = make_head(num_cls_convs=2, use_deformable=True)
    names = [type(m).__name__ for m in head.cls_tower]
    assert names == ["Conv2d", "GroupNorm", "ReLU", "SelfModulatedDeformConv", "GroupNorm", "ReLU"]
    layer = head.bbox_tower[0]
    x = torch.randn(1, 64, 5, 7)
    # Offsets are 0 and the mask is sigmoid(0) = 1/2 at the start.
    plain = nn.functional.conv2d(x, layer.conv.weight, padding=1) / 2
    torch.testing.assert_close(
        layer(x), plain + layer.conv.bias[:, None, None], rtol=1e-4, atol=1e-5
    )
    sum(x.sum() for m in head(features())[:3] for x in m).backward()
    assert all(p.grad is not None for p in head.parameters())


def test_errors_name_key_and_choices():
    with pytest.raises(ValueError, match=r"QUALITY must be one of .*'iou'.* got 'ctr'"):
        make_head(quality="ctr")
    with pytest.raises(ValueError, match="same channels"):
        FCOSHead(input_shape=[ShapeSpec(channels=c, stride=8) for c in (32, 64)], num_classes=1)
    with pytest.raises(ValueError, match="32 groups, which do not divide 48"):
        FCOSHead(input_shape=[ShapeSpec(channels=48, stride=8)], num_classes=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_deformable_head_in_half_precision(dtype):
    head = make_head(use_deformable=True, norm="").to(dtype)
    outputs = head([x.to(dtype) for x in features()])
    assert outputs.class_logits[0].dtype == dtype
    assert all(x.isfinite().all() for x in outputs.class_logits + outputs.ltrb)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prior_prob": 0}, r"PRIOR_PROB must be a number from .*, got 0"),
        ({"prior_prob": 1.0}, r"PRIOR_PROB must be a number"),
        ({"num_cls_convs": -1}, r"NUM_CLS_CONVS must be a whole number >= 0, got -1"),
        ({"num_box_convs": 1.5}, r"NUM_BOX_CONVS must be a whole number >= 0, got 1\.5"),
        ({"num_share_convs": "2"}, r"NUM_SHARE_CONVS must be a whole number >= 0, got '2'"),
        ({"reg_max": 0}, r"REG_MAX must be a whole number >= 1, got 0"),
        ({"num_classes": 0}, r"NUM_CLASSES must be a whole number >= 1, got 0"),
    ],
)
def test_values_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_head(**arguments)


def test_groups_of_one_channel_are_refused():
    narrow = [ShapeSpec(channels=32, stride=8)]
    with pytest.raises(ValueError, match="32 groups, of one channel each with 32 channels"):
        FCOSHead(input_shape=narrow, num_classes=5)
    FCOSHead(input_shape=narrow, num_classes=5, norm="BN")
