"""Folded convolutions, beside Detectron2's single steps."""

import copy

import pytest
import torch
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.layers.batch_norm import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone
from helpers import make_input, tiny_cfg
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from fcos_d2 import get_cfg, model_zoo
from fcos_d2.modeling.deform_conv import use_portable_deform_convs
from fcos_d2.runtime import FoldedConv2d, fold_norms


def conv_and_folded(norm, bias, activation=None, groups=1):
    """Detectron2's convolution in float64, with statistics as of a trained one, and its twin."""
    norm = get_norm(norm, 6)
    conv = Conv2d(
        4, 6, 3, stride=2, padding=1, groups=groups, bias=bias, norm=norm, activation=activation
    ).double()
    for x, low in ((norm.weight, 0.5), (norm.bias, -1), (norm.running_mean, -1)):
        nn.init.uniform_(x, low, 2)
    nn.init.uniform_(norm.running_var, 0.2, 3)
    return conv, fold(copy.deepcopy(conv))


def fold(conv):
    """The convolution after :func:`fold_norms` of a block that has it."""
    block = CNNBlockBase(4, 6, 2)
    block.conv1 = conv
    fold_norms(block)
    return block.conv1


def gradients(conv, x):
    """Output, and gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    y = conv(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).sin()).sum().backward()
    return [y, x.grad, *(p.grad for p in conv.parameters())]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
@pytest.mark.parametrize(
    ("bias", "activation", "groups"), [(False, None, 1), (True, nn.ReLU(), 1), (False, None, 2)]
)
def test_equals_two_steps(norm, bias, activation, groups):
    pair = [c.eval() for c in conv_and_folded(norm, bias, activation, groups)]
    x = torch.randn(2, 4, 13, 17, dtype=torch.float64)
    expected, actual = (gradients(conv, x) for conv in pair)
    # FrozenBN: output, input, weight; else the norm's weight and bias too.
    assert len(expected) == 3 + bias + 2 * (norm != "FrozenBN")
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(b, a)


def test_frozen_also_in_training():
    pair = [c.train() for c in conv_and_folded("FrozenBN", False)]
    x = torch.randn(2, 4, 13, 17, dtype=torch.float64)
    for a, b in zip(*(gradients(conv, x) for conv in pair), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_half_precision_with_norms_in_float32(norm):
    conv, folded = (c.eval().to(torch.bfloat16) for c in conv_and_folded(norm, False))
    for c in (conv, folded):
        c.norm.float()
    x = torch.randn(1, 4, 13, 17, dtype=torch.bfloat16)
    y = folded(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), conv(x).float(), rtol=0.05, atol=0.1)


def test_batch_statistics_in_training():
    conv, folded = (c.train() for c in conv_and_folded("BN", False))
    x = torch.randn(2, 4, 13, 17, dtype=torch.float64)
    assert torch.equal(folded(x), conv(x))
    assert torch.equal(folded.norm.running_mean, conv.norm.running_mean)


def test_follows_a_norm_that_is_exchanged_or_changed():
    conv, folded = (c.eval() for c in conv_and_folded("FrozenBN", False))
    x = torch.randn(1, 4, 13, 17, dtype=torch.float64)
    for c in (conv, folded):
        c.norm.running_mean += 0.3
        c.norm.weight *= 2
    torch.testing.assert_close(folded(x), conv(x))
    conv.norm = folded.norm = nn.GroupNorm(2, 6).double()
    assert torch.equal(folded(x), conv(x))


def test_folded_only_where_weights_are_fewer_than_activations():
    conv, folded = (c.eval() for c in conv_and_folded("FrozenBN", False))
    calls_of_norm = []
    folded.norm.register_forward_hook(lambda *args: calls_of_norm.append(1))
    # 4 x 3 x 3 = 36 weights a channel. At stride 2: 10 x 16 / 4 = 40 cells, 8 x 16 / 4 = 32.
    for height, fewer in ((10, True), (8, False)):
        calls_of_norm.clear()
        x = torch.randn(1, 4, height, 16, dtype=torch.float64)
        torch.testing.assert_close(folded(x), conv(x))
        assert calls_of_norm == ([] if fewer else [1])


def test_shares_parameters_and_draws_no_random_numbers():
    conv, _ = conv_and_folded("BN", True)
    state = torch.get_rng_state()
    weight, bias, norm = conv.weight, conv.bias, conv.norm
    folded = fold(conv.eval())
    assert torch.equal(torch.get_rng_state(), state)
    assert folded.weight is weight and folded.bias is bias and folded.norm is norm
    assert not folded.training and repr(folded).startswith("FoldedConv2d(")


def resnet(depth=50, norm="FrozenBN", **keys):
    """A narrow ResNet of Detectron2 in evaluation mode and its folded twin."""
    cfg = get_cfg()
    if depth > 34:
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
        cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32 if norm == "GN" else 16
    else:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.OUT_FEATURES = ["stem", "res2", "res3", "res4", "res5"]
    for key, value in keys.items():
        cfg.MODEL.RESNETS[key] = value
    theirs = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    use_portable_deform_convs(theirs)
    for module in theirs.modules():
        if hasattr(module, "running_var"):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours = copy.deepcopy(theirs)
    fold_norms(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("keys", "folded"),
    [
        # ResNet-18: 1 convolution in the stem, 2 in each of 8 blocks, 3 in shortcuts.
        ({"depth": 18}, 20),
        # ResNet-50: 1 in the stem, 3 in each of 16 blocks, 4 in shortcuts.
        ({"depth": 50}, 53),
        ({"depth": 50, "norm": "BN"}, 53),
        ({"depth": 50, "norm": "SyncBN"}, 53),
        ({"depth": 50, "NUM_GROUPS": 2, "STRIDE_IN_1X1": False, "RES5_DILATION": 2}, 53),
        # One of three in each of res5's blocks is deformable; a fourth, of offsets, has no norm.
        ({"depth": 50, "DEFORM_ON_PER_STAGE": [False] * 3 + [True]}, 50),
        # The stem has as many channels as res2, which then has no convolution in its shortcut.
        ({"depth": 50, "norm": "GN", "WIDTH_PER_GROUP": 32, "STEM_OUT_CHANNELS": 32}, 52),
    ],
)
def test_resnet_is_detectrons(keys, folded, layout):
    theirs, ours = resnet(**keys)
    assert sum(isinstance(m, FoldedConv2d) for m in ours.modules()) == folded
    for size in ((1, 160, 224), (2, 97, 130), (1, 33, 40)):
        x = torch.randn(size[0], 3, *size[1:]).contiguous(memory_format=layout)
        with torch.no_grad():
            expected, actual = theirs(x), ours(x)
        for name, y in expected.items():
            torch.testing.assert_close(actual[name], y, rtol=1e-3, atol=1e-4 * y.std().item())


@pytest.mark.parametrize("depth", [18, 50])
def test_gradients_are_detectrons(depth):
    pair = resnet(depth)
    x = torch.randn(2, 3, 64, 96)
    results = []
    for model in pair:
        model.double()
        y = model(x.double())
        sum((v * v.detach().sin()).sum() for v in y.values()).backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, msg=name)


@torch.no_grad()
def test_pruned_weights_are_made_anew():
    # Pruning computes the weight in a hook before each call.
    theirs, ours = resnet(50)
    for model in (theirs, ours):
        prune.l1_unstructured(model.res3[1].conv3, "weight", 0.5)
        model.res3[1].conv3.weight_orig *= 3
    x = torch.randn(1, 3, 160, 224)
    torch.testing.assert_close(ours(x)["res3"], theirs(x)["res3"], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_nan_stays_nan():
    theirs, ours = resnet(50)
    for model in (theirs, ours):
        model.res3[1].conv3.weight[2, 1] = float("nan")
    x = torch.randn(1, 3, 160, 224).contiguous(memory_format=torch.channels_last)
    actual, expected = ours(x)["res3"], theirs(x)["res3"]
    assert expected.isnan().any()
    assert torch.equal(actual.isnan(), expected.isnan())


@torch.no_grad()
def test_no_images():
    theirs, ours = resnet(18)
    x = torch.empty(0, 3, 64, 64)
    assert ours(x)["res5"].shape == theirs(x)["res5"].shape == (0, 512, 2, 2)


@torch.no_grad()
def test_flop_counters_see_all_convolutions():
    counts = []
    for model in resnet(50):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 160, 224))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_freezing_stages_later_changes_the_norms():
    theirs, ours = resnet(18, norm="BN")
    for model in (theirs, ours):
        model.train().freeze(3)
    assert isinstance(ours.res3[0].conv1.norm, FrozenBatchNorm2d)
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(x)["res3"], theirs(x)["res3"], rtol=1e-3, atol=1e-4)


def folded_modules(model):
    return [m for m in model.modules() if isinstance(m, FoldedConv2d)]


def test_our_backbones_are_folded_and_detectron2s_are_not():
    for name, number in (
        ("quick_schedules/fcos_R_18_FPN_shapes.yaml", 20),
        ("quick_schedules/faster_rcnn_fcos_R_18_FPN_shapes.yaml", 20),
        ("Ablations/retinanet_R_50_FPN_1x.yaml", 0),
    ):
        cfg = model_zoo.get_config(name)
        cfg.MODEL.DEVICE = "cpu"
        assert len(folded_modules(build_model(cfg))) == number


def test_other_devices_run_detectron2s_steps():
    _, folded = conv_and_folded("FrozenBN", False)
    calls_of_norm = []
    folded.norm.register_forward_hook(lambda *args: calls_of_norm.append(1))
    folded = folded.to("meta").eval()
    folded(torch.empty(1, 4, 64, 64, dtype=torch.float64, device="meta"))
    assert calls_of_norm == [1]


def test_names_and_random_weights_are_detectron2s():
    cfg = tiny_cfg()
    torch.manual_seed(3)
    theirs = build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
    torch.manual_seed(3)
    model = build_model(cfg)
    ours = model.backbone.bottom_up.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    sum(model.train()([make_input()]).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
