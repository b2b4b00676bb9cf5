"""TOOD's head beside its definition in loops, and torchvision's deformable convolution."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import TOOD, make_input, tiny_cfg
from torch import nn
from torch.autograd import gradcheck
from torchvision.ops import deform_conv2d

from fcos_d2.modeling import TaskAlignedHead
from fcos_d2.modeling.sampling import sample_channels

SHAPES = [ShapeSpec(channels=64, stride=s) for s in (8, 16)]


def make_head(**kwargs):
    defaults = {"num_classes": 5, "num_share_convs": 3}
    return TaskAlignedHead(input_shape=SHAPES, **(defaults | kwargs))


@torch.no_grad()
def make_lively_head(**kwargs):
    """A head with weights as after a training: all parts matter, and offsets of several cells."""
    head = make_head(**kwargs)
    for name, parameter in head.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=2 / math.sqrt(parameter[0].numel()))
        elif "scale" in name or name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 2)
        else:
            nn.init.normal_(parameter, std=0.5)
    return head


def features(images=2):
    return [torch.randn(images, 64, 6, 8), torch.randn(images, 64, 3, 4)]


def deformable_sampling(maps, offsets):
    """Each channel through torchvision's kernel, with groups of one channel."""
    channels = maps.shape[1]
    return deform_conv2d(maps, offsets, maps.new_ones(channels, 1, 1, 1))


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 6), (2, 1)])
@pytest.mark.parametrize("reach", [0.0, 0.4, 2.0, 20.0])
def test_sampling_equals_a_deformable_convolution(size, reach):
    maps = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    offsets = torch.randn(2, 8, *size, dtype=torch.float64) * reach
    offsets[0] = offsets[0].round()  # at the centres of cells, and at -1, H and W
    offsets.requires_grad_()
    found, expected = sample_channels(maps, offsets), deformable_sampling(maps, offsets)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), [maps, offsets])
    theirs = torch.autograd.grad((expected * weights).sum(), [maps, offsets])
    torch.testing.assert_close(ours[0], theirs[0])
    if reach > 0:  # on a cell the slopes to both sides differ
        torch.testing.assert_close(ours[1][1], theirs[1][1])


def test_gradient_of_the_sampling():
    maps = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    offsets = torch.rand(1, 4, 3, 4, dtype=torch.float64) * 1.8 - 0.9  # no whole number
    assert gradcheck(sample_channels, (maps, offsets.requires_grad_()))


def test_sampling_with_nan_and_infinity():
    maps = torch.ones(1, 1, 3, 3)
    offsets = torch.zeros(1, 2, 3, 3)
    offsets[0, 0, 0, 0] = math.nan
    offsets[0, 1, 1, 1] = math.inf
    offsets[0, 1, 2, 2] = -math.inf
    found = sample_channels(maps, offsets)[0, 0]
    assert found[0, 0].isnan() and found[1, 1] == found[2, 2] == 0
    assert found.nansum() == 6


@torch.no_grad()
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_equals_the_slow_reference(offset):
    head, maps = make_lively_head(location_offset=offset), features()
    outputs = head(maps)
    assert outputs.quality_logits is None and outputs.distributions is None
    negative = replaced = 0
    for level, (x, stride) in enumerate(zip(maps, (8, 16), strict=True)):
        for image in range(2):
            expected = by_loops(head, x[image : image + 1], level, stride, offset)
            scores, boxes, is_own = expected
            torch.testing.assert_close(outputs.class_logits[level][image].sigmoid(), scores)
            ltrb = outputs.ltrb[level][image]
            assert ltrb.dtype == torch.float32
            for row in range(x.shape[2]):
                for column in range(x.shape[3]):
                    px, py = (column + offset) * stride, (row + offset) * stride
                    left, top, right, bottom = ltrb[:, row, column].tolist()
                    found = torch.tensor([px - left, py - top, px + right, py + bottom])
                    torch.testing.assert_close(found, boxes[:, row, column], rtol=1e-4, atol=1e-2)
                    assert left + right >= -1e-3 and top + bottom >= -1e-3
            negative += (ltrb < 0).sum().item()
            replaced += is_own.sum().item()
    assert outputs.may_be_outside and negative > 20 and 5 < replaced < 100


def by_loops(head, x, level, stride, offset):
    """Scores (K, H, W), boxes (4, H, W) in pixels, and where they are those of the cell itself."""
    layers, outputs = list(head.share_tower), []
    for conv, norm, _ in zip(layers[::3], layers[1::3], layers[2::3], strict=True):
        x = norm(conv(x)).relu()
        outputs.append(x[0])
    mean = torch.cat([of_layer.flatten(1).mean(dim=1) for of_layer in outputs])

    def task_features(decomposition):
        first, _, second, _ = decomposition.attention
        hidden = (first.weight[:, :, 0, 0] @ mean + first.bias).relu()
        weights = (second.weight[:, :, 0, 0] @ hidden + second.bias).sigmoid()
        weighted = torch.cat([w * of_layer for w, of_layer in zip(weights, outputs, strict=True)])
        reduced = torch.einsum("oi,ihw->ohw", decomposition.reduction.weight[:, :, 0, 0], weighted)
        return decomposition.tower[0](reduced[None]).relu()

    def branch(layers):
        first, _, second = layers
        stack = torch.cat(outputs)[None]
        return second(first(stack).relu())

    probability = head.cls_logits(task_features(head.cls_decomposition)).sigmoid()[0]
    scores = (probability * branch(head.alignment).sigmoid()[0]).sqrt()

    distances = head.bbox_pred(task_features(head.box_decomposition))[0].exp()
    distances = distances * head.scales[level].scale.item() * stride
    height, width = distances.shape[1:]
    own = torch.empty_like(distances)
    for row in range(height):
        for column in range(width):
            px, py = (column + offset) * stride, (row + offset) * stride
            left, top, right, bottom = distances[:, row, column]
            own[:, row, column] = torch.stack([px - left, py - top, px + right, py + bottom])
    boxes = deformable_sampling(own[None], branch(head.offsets))[0]
    is_own = (boxes[0] > boxes[2]) | (boxes[1] > boxes[3])
    return scores, torch.where(is_own, own, boxes), is_own


def test_starts_with_the_prior_and_with_boxes_where_they_were_predicted():
    head = make_head(prior_prob=0.03, location_offset=0.0)
    for layer in (head.cls_logits, head.alignment[2], head.bbox_pred):
        nn.init.zeros_(layer.weight)
    outputs = head(features())
    # sqrt(0.03 * 0.03); e^0 strides to all sides.
    for logits, ltrb, stride in zip(outputs.class_logits, outputs.ltrb, (8, 16), strict=True):
        torch.testing.assert_close(
            logits.sigmoid(), torch.full_like(logits, 0.03), rtol=1e-5, atol=0
        )
        inside = ltrb[:, :, 1:-1, 1:-1]  # beyond the border there is 0 in place of a box
        torch.testing.assert_close(inside, torch.full_like(inside, stride), rtol=0, atol=0.5)


@pytest.mark.parametrize("use_scale", [True, False])
def test_distances_in_pixels(use_scale):
    # The predictor's bias is ln 2 and the scales are 3 and 5: 3 * 2 strides of 8, 5 * 2 of 16.
    head = make_head(use_scale=use_scale)
    for layer in (head.bbox_pred, head.offsets[2]):
        nn.init.zeros_(layer.weight)
    nn.init.constant_(head.bbox_pred.bias, math.log(2))
    for scale, value in zip(head.scales or [], (3.0, 5.0), strict=False):
        nn.init.constant_(scale.scale, value)
    expected = (48.0, 160.0) if use_scale else (16.0, 32.0)
    for x, value in zip(head(features()).ltrb, expected, strict=True):
        torch.testing.assert_close(x, torch.full_like(x, value))
    nn.init.constant_(head.bbox_pred.bias, 1e6)
    assert all((x * x).isfinite().all() for x in head(features()).ltrb)


@pytest.mark.parametrize("norm", ["GN", "BN", ""])
@pytest.mark.parametrize("use_deformable", [True, False])
def test_all_parameters_learn(norm, use_deformable):
    head = make_lively_head(norm=norm, use_deformable=use_deformable)
    outputs = head(features())
    sum(x.sum() for x in (*outputs.class_logits, *outputs.ltrb)).backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


def test_deformable_layers_are_the_first_two_with_four_groups():
    head = make_head(use_deformable=True)
    names = [type(m).__name__ for m in head.share_tower[::3]]
    assert names == ["SelfModulatedDeformConv", "SelfModulatedDeformConv", "Conv2d"]
    layer, x = head.share_tower[0], torch.randn(1, 64, 5, 7)
    nn.init.normal_(layer.offset.weight, std=0.05)
    predicted = layer.offset(x)  # 4 groups with 9 pairs and then 9 masks: 72 and 36 channels
    assert predicted.shape[1] == 108
    expected = 0
    for group in range(4):
        channels = slice(16 * group, 16 * group + 16)
        offset = predicted[:, 18 * group : 18 * group + 18]
        mask = predicted[:, 72 + 9 * group : 72 + 9 * group + 9].sigmoid()
        weight = layer.conv.weight[:, channels]
        expected = expected + deform_conv2d(x[:, channels], offset, weight, padding=1, mask=mask)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    head, maps = make_lively_head(), features()
    exact = head(maps)
    with torch.autocast("cpu", dtype=dtype):
        outputs = head(maps)
    for a, b in zip(outputs.class_logits + outputs.ltrb, exact[0] + exact[1], strict=True):
        assert a.dtype == torch.float32 and a.isfinite().all()
        assert (a - b).abs().median() < 0.1 * b.abs().median()


def test_nan_stays_nan():
    """The loss says so; no index is out of range."""
    maps = [torch.full_like(x, math.nan) for x in features()]
    outputs = make_head()(maps)
    assert all(x.isnan().all() for x in outputs.class_logits + outputs.ltrb)


@torch.no_grad()
def test_compiled():
    head, maps = make_lively_head(), features()
    torch.compiler.reset()
    compiled = torch.compile(head, dynamic=True, fullgraph=True, backend="aot_eager")
    for x in (maps, [torch.randn(2, 64, 9, 5), torch.randn(2, 64, 5, 3)]):
        torch.testing.assert_close(compiled(x), head(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("NUM_CLS_CONVS", 4, "NUM_CLS_CONVS 0 in place of 4"),
        ("NUM_BOX_CONVS", 1, "NUM_BOX_CONVS 0 in place of 1"),
        ("BOX_ACTIVATION", "distribution", "BOX_ACTIVATION 'exp' in place of 'distribution'"),
        ("DISTRIBUTION_QUALITY", True, "DISTRIBUTION_QUALITY False in place of True"),
        ("NUM_SHARE_CONVS", 0, r"NUM_SHARE_CONVS .*must be a whole number >= 1, got 0"),
        ("NORM", "LN", "NORM must be one of"),
        ("HEAD", "tood", r"HEAD must be one of \['fcos', 'task_aligned'\], got 'tood'"),
    ],
)
def test_keys_that_do_not_go_with_this_head(key, value, message):
    with pytest.raises(ValueError, match=message) as e:
        build_model(tiny_cfg(**(TOOD | {key: value})))
    assert "in place of" not in message or "HEAD 'task_aligned'" in str(e.value)


def test_other_keys_at_once():
    with pytest.raises(ValueError, match="NUM_BOX_CONVS 0 in place of 1, BOX_ACTIVATION 'exp' in "):
        build_model(tiny_cfg(HEAD="task_aligned"))
    keys = TOOD | {"QUALITY": "iou", "CLS_LOSS_TYPE": "focal", "BOX_LOSS_WEIGHTING": "none"}
    with pytest.raises(ValueError, match="QUALITY 'joint' in place of 'iou', or HEAD 'fcos'"):
        build_model(tiny_cfg(**keys))


def test_the_detector_must_have_the_same_locations():
    model = build_model(tiny_cfg(**TOOD, LOCATION_OFFSET=0.0))
    assert model.head.levels == model.levels
    parts = type(model).from_config(tiny_cfg(**TOOD)) | {"location_offset": 0.0}
    with pytest.raises(ValueError, match=r"same location_offset, got head 0\.5, detector 0\.0"):
        type(model)(**parts)


@pytest.mark.parametrize("box_loss_type", ["giou", "ciou", "iou"])
def test_trains_boxes_that_do_not_contain_their_location(box_loss_type):
    """Sampled from two cells to the right, all boxes lie beside their locations at first."""
    torch.manual_seed(0)
    model = build_model(tiny_cfg(**TOOD, BOX_LOSS_TYPE=box_loss_type)).train()
    with torch.no_grad():
        model.head.offsets[2].bias[1::2] = 2.0
        model.head.bbox_pred.bias.fill_(0.5)
    batch, losses = [make_input()], []
    optimizer = torch.optim.Adam(model.head.parameters(), lr=1e-3)
    for _ in range(30):
        with EventStorage(0):
            loss = model(batch)
        optimizer.zero_grad()
        sum(loss.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss["loss_fcos_loc"].item())
    assert losses[-1] < 0.7 * losses[0]
