"""Fused convolutions, blocks and stages, beside Detectron2's single steps."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.layers.batch_norm import BatchNorm2d
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import build_resnet_backbone
from helpers import tiny_cfg
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from fcos_d2 import get_cfg
from fcos_d2.modeling import fused_blocks
from fcos_d2.modeling.deform_conv import use_portable_deform_convs
from fcos_d2.modeling.fused_blocks import (
    FusedBasicBlock,
    FusedBottleneckBlock,
    FusedConv2d,
    fuse_blocks,
)


def conv_and_fused(norm, bias, activation=None, groups=1):
    """Detectron2's convolution in float64, with statistics as of a trained one, and its twin."""
    norm = get_norm(norm, 6)
    conv = Conv2d(
        4, 6, 3, stride=2, padding=1, groups=groups, bias=bias, norm=norm, activation=activation
    ).double()
    for x, low in ((norm.weight, 0.5), (norm.bias, -1), (norm.running_mean, -1)):
        nn.init.uniform_(x, low, 2)
    nn.init.uniform_(norm.running_var, 0.2, 3)
    fused = copy.deepcopy(conv)
    fuse_blocks(fused)
    assert type(fused) is FusedConv2d and type(conv) is Conv2d
    return conv, fused


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
    pair = [c.eval() for c in conv_and_fused(norm, bias, activation, groups)]
    x = torch.randn(2, 4, 13, 17, dtype=torch.float64)
    expected, found = (gradients(conv, x) for conv in pair)
    # FrozenBN: output, input, weight; else the norm's weight and bias too.
    assert len(expected) == 3 + bias + 2 * (norm != "FrozenBN")
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a)


def test_frozen_also_in_training():
    pair = [c.train() for c in conv_and_fused("FrozenBN", False)]
    x = torch.randn(2, 4, 13, 17, dtype=torch.float64)
    for a, b in zip(*(gradients(conv, x) for conv in pair), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_half_precision_with_norms_in_float32(norm):
    conv, fused = (c.eval().to(torch.bfloat16) for c in conv_and_fused(norm, False))
    for c in (conv, fused):
        c.norm.float()
    x = torch.randn(1, 4, 13, 17, dtype=torch.bfloat16)
    y = fused(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), conv(x).float(), rtol=0.05, atol=0.1)


def test_batch_statistics_in_training():
    conv, fused = (c.train() for c in conv_and_fused("BN", False))
    x = torch.randn(2, 4, 13, 17, dtype=torch.float64)
    assert torch.equal(fused(x), conv(x))
    assert torch.equal(fused.norm.running_mean, conv.norm.running_mean)


def test_follows_a_norm_that_is_exchanged_or_changed():
    conv, fused = (c.eval() for c in conv_and_fused("FrozenBN", False))
    x = torch.randn(1, 4, 13, 17, dtype=torch.float64)
    for c in (conv, fused):
        c.norm.running_mean += 0.3
        c.norm.weight *= 2
    torch.testing.assert_close(fused(x), conv(x))
    conv.norm = fused.norm = nn.GroupNorm(2, 6).double()
    assert torch.equal(fused(x), conv(x))


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_backbone_is_fused(norm):
    cfg = tiny_cfg()
    cfg.MODEL.RESNETS.NORM = norm
    backbone = build_backbone(cfg).eval()
    convs = [m for m in backbone.modules() if isinstance(m, FusedConv2d)]
    # ResNet-18: 1 in the stem, 16 in the blocks, 3 in shortcuts.
    assert len(convs) == 1 + 16 + 3
    kind = FrozenBatchNorm2d if norm == "FrozenBN" else BatchNorm2d
    assert all(isinstance(m.norm, kind) for m in convs)


def test_fused_only_where_weights_are_fewer_than_activations():
    conv, fused = (c.eval() for c in conv_and_fused("FrozenBN", False))
    called = []
    fused.norm.register_forward_hook(lambda *args: called.append(1))
    # 4 x 3 x 3 = 36 weights a channel. At stride 2: 10 x 16 / 4 = 40 cells, 8 x 16 / 4 = 32.
    for height, fewer in ((10, True), (8, False)):
        called.clear()
        x = torch.randn(1, 4, height, 16, dtype=torch.float64)
        torch.testing.assert_close(fused(x), conv(x))
        assert called == ([] if fewer else [1])


def resnet(depth=50, norm="FrozenBN", **keys):
    """A narrow ResNet of Detectron2 in evaluation mode and its fused twin."""
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
    fuse_blocks(ours)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    return theirs, ours


needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="needs a PyTorch with oneDNN"
)


@needs_onednn
def test_this_pytorch_has_the_operator():
    assert fused_blocks._onednn_adds(torch.float32)
    # Not for doubles: they take the single steps.
    assert not fused_blocks._onednn_adds(torch.float64)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("keys", "blocks", "overwriting"),
    [
        # At 160x224, by the rule above: of res2 the second block. The first one's input is the
        # stem's output; then come 128 x 9 weights a channel and 20 x 28 cells, and so on.
        ({"depth": 18}, 8, 1),
        ({"depth": 50}, 16, 16),
        ({"depth": 50, "norm": "BN"}, 16, 16),
        ({"depth": 50, "norm": "SyncBN"}, 16, 16),
        ({"depth": 50, "NUM_GROUPS": 2, "STRIDE_IN_1X1": False, "RES5_DILATION": 2}, 16, 16),
        # Three of res5's blocks are deformable.
        ({"depth": 50, "DEFORM_ON_PER_STAGE": [False] * 3 + [True]}, 13, 13),
        ({"depth": 50, "norm": "GN", "WIDTH_PER_GROUP": 32, "STEM_OUT_CHANNELS": 32}, 16, 0),
    ],
)
@needs_onednn
def test_resnet_is_detectrons(in_place, keys, blocks, overwriting, layout):
    theirs, ours = resnet(**keys)
    fused = (FusedBasicBlock, FusedBottleneckBlock)
    assert sum(isinstance(m, fused) for m in ours.modules()) == blocks
    for size in ((1, 160, 224), (2, 97, 130), (1, 33, 40)):
        x = torch.randn(size[0], 3, *size[1:]).contiguous(memory_format=layout)
        before = x.clone()
        in_place.clear()
        with torch.no_grad():
            expected, found = theirs(x), ours(x)
        assert torch.equal(x, before)
        for name, y in expected.items():
            torch.testing.assert_close(found[name], y, rtol=1e-3, atol=1e-4 * y.std().item())
        if size[1] == 160:
            assert len(in_place) == overwriting


@pytest.mark.parametrize("depth", [18, 50])
def test_gradients_are_detectrons(in_place, depth):
    pair = resnet(depth)
    x = torch.randn(2, 3, 64, 96)
    results = []
    for model in pair:
        model.double()
        y = model(x.double())
        sum((v * v.detach().sin()).sum() for v in y.values()).backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    assert in_place == []
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, msg=name)


@pytest.mark.skipif(
    not fused_blocks._onednn_adds(torch.bfloat16), reason="needs oneDNN's bfloat16 on this CPU"
)
@torch.no_grad()
def test_bfloat16_is_as_near_as_detectrons(in_place):
    theirs, ours = resnet(50)
    x = torch.randn(1, 3, 160, 224).contiguous(memory_format=torch.channels_last)
    exact = theirs(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = ours(x), theirs(x)
    assert len(in_place) >= 12
    for name, y in exact.items():
        assert found[name].dtype == expected[name].dtype == torch.bfloat16
        error, limit = ((z[name].float() - y).norm() / y.norm() for z in (found, expected))
        assert error < 1.5 * limit + 1e-3, name


@needs_onednn
@torch.no_grad()
def test_blocks_one_by_one_leave_their_input(in_place):
    _, ours = resnet(50)
    x = torch.rand(1, 16, 40, 56).contiguous(memory_format=torch.channels_last)
    inputs = [x]
    for block in ours.res3:
        before = inputs[-1].clone()
        inputs.append(block(inputs[-1]))
        assert torch.equal(inputs[-2], before)
    assert len(in_place) == 1  # of the first, with a shortcut convolution
    in_place.clear()
    torch.testing.assert_close(ours.res3(x), inputs[-1])
    assert len(in_place) == 4


@needs_onednn
@pytest.mark.parametrize(
    ("watched", "overwriting"),
    # Of 4 blocks: not the watched one, nor the one that takes its output.
    [
        ("1", 2),
        ("1.conv1", 2),
        ("1.conv3", 2),
        ("0", 2),
        ("0.shortcut", 2),
        ("0.shortcut.norm", 2),
        ("3", 3),
        (None, 0),
    ],
)
@torch.no_grad()
def test_what_hooks_see_stays(in_place, watched, overwriting):
    _, ours = resnet(50)
    stage = ours.res3
    stage[0].shortcut.__class__ = Conv2d  # which calls its norm
    x = torch.rand(1, 16, 40, 56).contiguous(memory_format=torch.channels_last)
    expected = stage(x)
    in_place.clear()
    kept = []

    def keep(module, inputs, output=None):
        # Detectron2 itself changes outputs of single convolutions, by the sum and ReLU.
        outputs = [output] if isinstance(module, FusedBottleneckBlock) else []
        kept.extend((y, y.clone()) for y in (inputs[0], *outputs) if y is not None)

    of_all = nn.modules.module
    if watched is None:
        handles = [
            of_all.register_module_forward_hook(keep),
            of_all.register_module_forward_pre_hook(keep),
        ]
    else:
        module = stage.get_submodule(watched)
        handles = [module.register_forward_hook(keep), module.register_forward_pre_hook(keep)]
    try:
        found = stage(x)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(found, expected)
    assert len(in_place) == overwriting
    assert len(kept) >= 2
    for y, as_seen in kept:
        assert torch.equal(y, as_seen)


@torch.no_grad()
def test_other_modules_in_the_place_of_detectrons(in_place):
    # An input that is not the stage's own is not overwritten: here the stem's output.
    theirs, ours = resnet(18)
    x = torch.randn(1, 3, 160, 224)
    for model in (theirs, ours):
        model.res2[0] = nn.Identity()
    for name, y in theirs(x).items():
        torch.testing.assert_close(ours(x)[name], y, rtol=1e-3, atol=1e-4)
    # Nor what a shortcut returns that is not a convolution.
    _, ours = resnet(50)
    block = ours.res2[1]
    x = torch.rand(1, 16, 40, 56)
    before, expected = x.clone(), block(x)
    block.shortcut = nn.Identity()
    torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, before)
    # A wrapped convolution is called as it is.
    block.conv3 = nn.Sequential(block.conv3)
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_pruned_weights_are_made_anew(in_place):
    # Pruning computes the weight in a hook before each call.
    theirs, ours = resnet(50)
    for model in (theirs, ours):
        prune.l1_unstructured(model.res3[1].conv3, "weight", 0.5)
        model.res3[1].conv3.weight_orig *= 3
    x = torch.randn(1, 3, 160, 224)
    torch.testing.assert_close(ours(x)["res3"], theirs(x)["res3"], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_nan_stays_nan(in_place):
    theirs, ours = resnet(50)
    for model in (theirs, ours):
        model.res3[1].conv3.weight[2, 1] = float("nan")
    x = torch.randn(1, 3, 160, 224).contiguous(memory_format=torch.channels_last)
    found, expected = ours(x)["res3"], theirs(x)["res3"]
    assert expected.isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())


@torch.no_grad()
def test_without_the_operator(monkeypatch, in_place):
    theirs, ours = resnet(50)
    x = torch.randn(1, 3, 160, 224)
    for name, replacement in (("raises", None), ("other result", lambda r, *args: r.zero_())):
        monkeypatch.setattr(fused_blocks, "_onednn_add_conv", replacement)
        fused_blocks._onednn_adds.cache_clear()
        assert not fused_blocks._onednn_adds(torch.float32), name
        torch.testing.assert_close(ours(x)["res5"], theirs(x)["res5"], rtol=1e-3, atol=1e-4)


@needs_onednn
@torch.no_grad()
def test_without_onednn(in_place):
    theirs, ours = resnet(50)
    x = torch.randn(1, 3, 160, 224)
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(ours(x)["res5"], theirs(x)["res5"], rtol=1e-3, atol=1e-4)
    assert in_place == []


@torch.no_grad()
def test_no_images(in_place):
    theirs, ours = resnet(18)
    x = torch.empty(0, 3, 64, 64)
    assert ours(x)["res5"].shape == theirs(x)["res5"].shape == (0, 512, 2, 2)
    # Compiled code has not looked at the size.
    residual = torch.empty(0, 6, 4, 4)
    weight, bias = torch.rand(6, 3, 1, 1), torch.rand(6)
    fused_blocks._add_conv_relu_op(
        residual, torch.empty(0, 3, 4, 4), weight, bias, [1, 1], [0, 0], [1, 1], 1
    )
    assert in_place == []


@torch.no_grad()
def test_graphs_for_others_have_public_operators_alone(in_place):
    _, ours = resnet(50)
    x = torch.randn(1, 3, 160, 224)
    graphs = [
        str(torch.jit.trace(ours, x, strict=False).inlined_graph),
        str(torch.export.export(ours, (x,)).graph),
        str(make_fx(ours)(x).graph),
    ]
    for graph in graphs:
        assert "convolution" in graph or "conv2d" in graph
        assert "mkldnn" not in graph and "add_conv" not in graph


@torch.no_grad()
def test_under_dispatch_modes(in_place):
    theirs, ours = resnet(50)
    x = torch.randn(1, 3, 160, 224)
    counts = []
    for model in (theirs, ours):
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ours(mode.from_tensor(x))["res5"].shape == (1, 128, 5, 7)
    assert in_place == []


@needs_onednn
def test_inference_mode(in_place):
    theirs, ours = resnet(50)
    x = torch.randn(1, 3, 160, 224)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x)["res5"], theirs(x)["res5"], rtol=1e-3, atol=1e-4)
    assert len(in_place) >= 12
