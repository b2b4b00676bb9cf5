"""Detectron2's residual blocks, whose cheap steps run inside their convolutions.

Parameters, buffers and their names stay, gradients are those of the single steps, and results
differ from theirs by rounding alone. What each fusion saves is in benchmarks/NOTES.md.
"""

import functools
import math

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode


class FusedConv2d(Conv2d):
    """A convolution with its batch normalisation, where that is fixed, in its weights.

    A frozen normalisation, or any in evaluation mode, is an affine map of each channel. Scaling
    the weights by it, anew in every call, replaces passes over the activations, and is done where
    the weights are fewer than those. The norm is then not called: hooks on it do not fire.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_fused(x):
            return super().forward(x)
        weight, bias = self._scaled()
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def add_relu(self, residual: Tensor, x: Tensor, overwrite: bool) -> Tensor:
        """ReLU of the sum of ``residual`` and the convolution.

        Args:
            residual: of the shape of the convolution's output.
            x: (N, C, H, W).
            overwrite: whether the result may take the memory of ``residual``: on CPU, and needed
                neither by autograd nor by hooks on the convolution, which then do not fire.
        """
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if (
            not overwrite
            or not dtype == x.dtype == residual.dtype
            or self.activation is not None
            or not self._is_fused(x)
        ):
            out = self(x)
            out += residual
            return F.relu_(out)
        weight, bias = (t.to(dtype) for t in self._scaled())
        into = _add_conv_relu_op if torch.compiler.is_compiling() else _add_conv_relu
        into(residual, x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return residual

    def _is_fused(self, x: Tensor) -> bool:
        if not _is_affine_map(self.norm):
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return True  # one graph for all sizes
        cells = x.numel() // x.shape[1] // (self.stride[0] * self.stride[1])
        return self.in_channels // self.groups * math.prod(self.kernel_size) <= cells

    def _scaled(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution and its norm as one convolution."""
        norm, weight = self.norm, self.weight
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        # A model in half precision may have kept its norms in float32.
        scaled = weight * scale.reshape(-1, 1, 1, 1)
        return scaled.to(weight.dtype), bias.to(weight.dtype)


class FusedBasicBlock(BasicBlock):
    """Two convolutions and the sum with the block's input."""

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """
        Args:
            overwrite: whether the result may take the memory of ``x``.
        """
        out = F.relu_(self.conv1(x))
        return _add_shortcut(self, self.conv2, out, x, overwrite)


class FusedBottleneckBlock(BottleneckBlock):
    """Three convolutions and the sum with the block's input."""

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """
        Args:
            overwrite: whether the result may take the memory of ``x``.
        """
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        return _add_shortcut(self, self.conv3, out, x, overwrite)


class FusedStage(nn.Sequential):
    """Blocks of one resolution. Maps between them, which nobody else sees, are overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        overwrite = False
        for block in self:
            if isinstance(block, (FusedBasicBlock, FusedBottleneckBlock)):
                x = block(x, overwrite=overwrite)
                overwrite = _may_overwrite_in(block, x)
            else:
                x, overwrite = block(x), False
        return x


def fuse_blocks(module: nn.Module) -> None:
    """Give what Detectron2 made of a backbone the classes above."""
    for child in module.modules():
        if type(child) is Conv2d and child.norm is not None:
            child.__class__ = FusedConv2d
    for child in module.modules():
        if type(child) is BasicBlock and isinstance(child.conv2, FusedConv2d):
            child.__class__ = FusedBasicBlock
        elif type(child) is BottleneckBlock and isinstance(child.conv3, FusedConv2d):
            child.__class__ = FusedBottleneckBlock
        elif isinstance(child, ResNet):
            for stage in child.stages:
                if type(stage) is nn.Sequential:
                    stage.__class__ = FusedStage


def _add_shortcut(
    block: nn.Module, conv: nn.Module, out: Tensor, x: Tensor, overwrite: bool
) -> Tensor:
    """ReLU of the sum of the last convolution and the shortcut of a block."""
    if block.shortcut is not None:
        x = block.shortcut(x)
        overwrite = isinstance(block.shortcut, Conv2d)  # another might return its input
    if not isinstance(conv, FusedConv2d):  # exchanged since
        return F.relu_(conv(out) + x)
    return conv.add_relu(x, out, overwrite and _may_overwrite_in(block, x))


def _may_overwrite_in(block: nn.Module, x: Tensor) -> bool:
    """Whether maps like ``x`` inside a block may be overwritten: it pays, and nobody sees them."""
    if torch.is_grad_enabled() or not x.is_cpu:
        return False
    # Operators are recorded or replaced by tracing, export, or a counter of FLOPs.
    if torch.compiler.is_compiling():
        is_watched = torch.compiler.is_exporting()  # PyTorch 2.7 says so of any compilation
    else:
        is_watched = torch.jit.is_tracing() or _get_current_dispatch_mode() is not None
    of_all = nn.modules.module
    return (
        not is_watched
        and not of_all._global_forward_hooks
        and not of_all._global_forward_pre_hooks
        and not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())
    )


def _add_conv_relu(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    """Add a convolution to ``residual``, and take the ReLU of it, in its memory."""
    usable = torch.backends.mkldnn.enabled and x.numel() > 0 and _onednn_adds(x.dtype)
    add = _onednn_add_conv if usable else _add_conv_in_steps
    add(residual, x, weight, bias, stride, padding, dilation, groups)
    residual.relu_()


def _add_conv_in_steps(residual: Tensor, *args) -> None:
    residual += F.conv2d(*args)


def _onednn_add_conv(residual, x, weight, bias, stride, padding, dilation, groups) -> None:
    # PyTorch has no public name for a convolution that adds to its output; its compiler uses this.
    # Its ReLU is left out: it would make 0 of NaN.
    torch.ops.mkldnn._convolution_pointwise_.binary(
        residual, x, weight, bias, padding, stride, dilation, groups, "add", 1.0, None, [], ""
    )


@functools.cache
def _onednn_adds(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this CPU have the operator, and it does what is expected here."""
    x = torch.linspace(-1, 1, 4 * 8 * 8, device="cpu").to(dtype).view(1, 4, 8, 8)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = x[:, :2, :3, :3].expand(6, -1, -1, -1), x[0, 0, 0, :6].contiguous()
    settings = [2, 2], [3, 3], [1, 1], 2  # all different: it takes them in another order
    expected, found = (
        torch.ones(1, 6, 6, 6, dtype=dtype, device="cpu").to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    try:
        _add_conv_in_steps(expected, x, weight, bias, *settings)
        _onednn_add_conv(found, x, weight, bias, *settings)
    except Exception:  # a private operator may go away, or change in any way
        return False
    return torch.allclose(found, expected, rtol=0.02, atol=0.02)


# For torch.compile, which takes it as it is. Called by itself otherwise: 0.1 ms less.
_add_conv_relu_op = torch.library.custom_op(
    "fcos_d2::add_conv_relu", _add_conv_relu, mutates_args=["residual"]
)
_add_conv_relu_op.register_fake(lambda *_: None)


def _is_affine_map(norm: nn.Module | None) -> bool:
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    return (
        isinstance(norm, nn.modules.batchnorm._BatchNorm)  # SyncBN too
        and not norm.training
        and norm.affine
        and norm.track_running_stats
    )
