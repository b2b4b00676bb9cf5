"""Fixed batch norms as part of the weights of their convolutions."""

import math

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn


def fold_norms(backbone: nn.Module) -> None:
    """Exchange the convolutions in Detectron2's residual blocks and stems, in place.

    Parameters, buffers and their names stay, and so do gradients; results differ by rounding.
    Convolutions with hooks, and those whose weight is computed, as by pruning, are left.
    """
    for block in backbone.modules():
        if isinstance(block, CNNBlockBase):
            for name, child in block.named_children():
                if type(child) is not Conv2d or child.norm is None:
                    continue
                hooks = child._forward_hooks or child._forward_pre_hooks
                if isinstance(child.weight, nn.Parameter) and not hooks:
                    setattr(block, name, FoldedConv2d.from_conv(child))


class FoldedConv2d(Conv2d):
    """Detectron2's convolution, with its batch norm in the weights wherever the norm is fixed.

    A frozen norm, or any batch norm in evaluation mode, is an affine map of each channel. Scaling
    the weights by it in every call replaces passes over the activations. The norm is then not
    called, so that hooks on it do not fire. Where the weights are more than the activations the
    norm is called as usual.
    """

    @classmethod
    def from_conv(cls, conv: Conv2d) -> "FoldedConv2d":
        """A convolution that shares its parameters and its norm with ``conv``."""
        folded = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode,
            norm=conv.norm, activation=conv.activation, device="meta",
        )  # fmt: skip
        folded.weight, folded.bias = conv.weight, conv.bias
        return folded.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        if not _is_fixed(self.norm) or not self._has_fewer_weights_than(x):
            return super().forward(x)
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        bias = self.norm.bias - self.norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        # The norms of a model in half precision may have stayed in float32.
        weight = (self.weight * scale.reshape(-1, 1, 1, 1)).to(self.weight.dtype)
        bias = bias.to(weight.dtype)
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def _has_fewer_weights_than(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return True  # one graph for images of all sizes
        weights_per_channel = self.in_channels // self.groups * math.prod(self.kernel_size)
        return weights_per_channel <= x.numel() // x.shape[1] // math.prod(self.stride)


def _is_fixed(norm: nn.Module | None) -> bool:
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    return (
        isinstance(norm, nn.modules.batchnorm._BatchNorm)  # SyncBN is one, too
        and not norm.training
        and norm.affine
        and norm.track_running_stats
    )
