"""A convolution and the batch normalisation behind it as one convolution."""

import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn


class FusedConv2d(Conv2d):
    """Detectron2's convolution with its batch normalisation, where that is fixed, in its weights.

    A frozen normalisation, or any in evaluation mode, is an affine map of each channel. Scaling
    the weights by it, anew in every call, replaces passes over the activations. Parameters,
    buffers and their names stay, gradients are those of the two steps, and results differ from
    theirs by rounding alone. The norm is then not called: hooks on it do not fire.
    """

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not _is_affine_map(norm):
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        weight = self.weight * scale.reshape(-1, 1, 1, 1)
        # A model in half precision may have kept its norms in float32.
        weight, bias = weight.to(self.weight.dtype), bias.to(self.weight.dtype)
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fuse_batch_norms(module: nn.Module) -> None:
    """Give the convolutions inside a module, made by Detectron2, the class above."""
    for child in module.modules():
        if type(child) is Conv2d and child.norm is not None:
            child.__class__ = FusedConv2d


def _is_affine_map(norm: nn.Module | None) -> bool:
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    return (
        isinstance(norm, nn.modules.batchnorm._BatchNorm)  # SyncBN too
        and not norm.training
        and norm.affine
        and norm.track_running_stats
    )
