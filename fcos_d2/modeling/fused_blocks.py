"""Detectron2's residual blocks, whose cheap steps run inside their convolutions.

Parameters, buffers and their names stay, gradients are those of the single steps, and results
differ from theirs by rounding alone. What each fusion saves is in benchmarks/NOTES.md.
"""

import functools

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import Tensor, nn


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

    def add_relu(self, x: Tensor, residual: Tensor, overwrite: bool) -> Tensor:
        """ReLU of the sum of the convolution and ``residual``.

        Args:
            x: (N, C, H, W).
            residual: of the shape of the convolution's output.
            overwrite: whether the result may take the memory of ``residual``, as it does in
                inference on CPU.
        """
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if (
            torch.is_grad_enabled()
            or not overwrite
            or not x.is_cpu
            or not dtype == x.dtype == residual.dtype
            or self.activation is not None
            or torch.jit.is_tracing()
            or torch.compiler.is_exporting()
            or not self._is_fused(x)
        ):
            out = self(x)
            out += residual
            return F.relu_(out)
        weight, bias = (t.to(dtype) for t in self._scaled())
        into = _conv_add_relu_op if torch.compiler.is_compiling() else _conv_add_relu
        into(residual, x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return residual

    def _is_fused(self, x: Tensor) -> bool:
        if not _is_affine_map(self.norm):
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return True  # one graph for all sizes
        cells = x.numel() // x.shape[1] // (self.stride[0] * self.stride[1])
        return self.weight.numel() // self.out_channels <= cells

    def _scaled(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution and its norm as one convolution."""
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        weight = self.weight * scale.reshape(-1, 1, 1, 1)
        # A model in half precision may have kept its norms in float32.
        return weight.to(self.weight.dtype), bias.to(self.weight.dtype)


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
        is_seen = True
        for block in self:
            if isinstance(block, (FusedBasicBlock, FusedBottleneckBlock)):
                x = block(x, overwrite=not is_seen and not block._forward_pre_hooks)
            else:
                x = block(x)
            is_seen = bool(block._forward_hooks)
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
                stage.__class__ = FusedStage


def _add_shortcut(
    block: nn.Module, conv: FusedConv2d, out: Tensor, x: Tensor, overwrite: bool
) -> Tensor:
    if block.shortcut is not None:
        x = block.shortcut(x)
        overwrite = not block.shortcut._forward_hooks
    return conv.add_relu(out, x, overwrite)


def _conv_add_relu(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    """``residual`` becomes the ReLU of its sum with the convolution."""
    if x.numel() == 0 or not _onednn_adds(x.dtype):
        residual.add_(F.conv2d(x, weight, bias, stride, padding, dilation, groups)).relu_()
        return
    _onednn_conv_add_relu(residual, x, weight, bias, stride, padding, dilation, groups)


def _onednn_conv_add_relu(residual, x, weight, bias, stride, padding, dilation, groups) -> None:
    # PyTorch has no public name for a convolution that adds to its output; its compiler uses this.
    torch.ops.mkldnn._convolution_pointwise_.binary(
        residual, x, weight, bias, padding, stride, dilation, groups, "add", 1.0, "relu", [], ""
    )


@functools.cache
def _onednn_adds(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this CPU have the operator, and it does what is expected here."""
    x = torch.linspace(-1, 1, 64, dtype=dtype).view(1, 4, 4, 4)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = x[:, :, :3, :3].expand(4, -1, -1, -1), x[0, :, 0, 0]
    found = x.clone()
    try:
        _onednn_conv_add_relu(found, x, weight, bias, [1, 1], [1, 1], [1, 1], 1)
    except Exception:  # a private operator may go away, or change in any way
        return False
    expected = (x + F.conv2d(x, weight, bias, padding=1)).relu()
    return torch.allclose(found, expected, rtol=0.02, atol=0.02)


# torch.compile takes it as it is. It is called by itself otherwise: 0.1 ms less.
_conv_add_relu_op = torch.library.custom_op(
    "fcos_d2::conv_add_relu_", _conv_add_relu, mutates_args=["residual"]
)
_conv_add_relu_op.register_fake(lambda *_: None)


def _is_affine_map(norm: nn.Module | None) -> bool:
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    return (
        isinstance(norm, nn.modules.batchnorm._BatchNorm)  # SyncBN too
        and not norm.training
        and norm.affine
        and norm.track_running_stats
    )
