"""Convolution and normalisation in one, beside Detectron2's two steps."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.layers.batch_norm import BatchNorm2d
from detectron2.modeling import build_backbone
from helpers import tiny_cfg
from torch import nn

from fcos_d2.modeling.fused_conv import FusedConv2d, fuse_batch_norms


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
    fuse_batch_norms(fused)
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
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    expected, found = (gradients(conv, x) for conv in pair)
    # FrozenBN: output, input, weight; else the norm's weight and bias too.
    assert len(expected) == 3 + bias + 2 * (norm != "FrozenBN")
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a)


def test_frozen_also_in_training():
    pair = [c.train() for c in conv_and_fused("FrozenBN", False)]
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    for a, b in zip(*(gradients(conv, x) for conv in pair), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_half_precision_with_norms_in_float32(norm):
    conv, fused = (c.eval().to(torch.bfloat16) for c in conv_and_fused(norm, False))
    for c in (conv, fused):
        c.norm.float()
    x = torch.randn(1, 4, 5, 5, dtype=torch.bfloat16)
    y = fused(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), conv(x).float(), rtol=0.05, atol=0.1)


def test_batch_statistics_in_training():
    conv, fused = (c.train() for c in conv_and_fused("BN", False))
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    assert torch.equal(fused(x), conv(x))
    assert torch.equal(fused.norm.running_mean, conv.norm.running_mean)


def test_follows_a_norm_that_is_exchanged_or_changed():
    conv, fused = (c.eval() for c in conv_and_fused("FrozenBN", False))
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
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
