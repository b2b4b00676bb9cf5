"""Deformable convolutions that run on every device, on torchvision's operator.

Detectron2's own operators raise on CPU; torchvision's compute the same on CPU and GPU.
"""

import torch
from detectron2.layers import DeformConv, ModulatedDeformConv
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class PortableDeformConv(DeformConv):
    """Detectron2's deformable convolution (v1): same parameters, same result, any device."""

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return _deform_conv(self, x, offset, None)


class PortableModulatedDeformConv(ModulatedDeformConv):
    """Detectron2's modulated deformable convolution (v2): same parameters and result."""

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return _deform_conv(self, x, offset, mask)


class SelfModulatedDeformConv(nn.Module):
    """A 3x3 modulated deformable convolution that predicts its own offsets and mask.

    Starts as an ordinary convolution at half strength: offsets 0, mask sigmoid(0).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.offset = nn.Conv2d(channels, 3 * 9, kernel_size=3, padding=1)
        self.conv = PortableModulatedDeformConv(channels, channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        nn.init.normal_(self.conv.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        offset_and_mask = self.offset(x)
        return self.conv(x, offset_and_mask[:, :18], offset_and_mask[:, 18:].sigmoid())


def use_portable_deform_convs(module: nn.Module) -> None:
    """Give the deformable convolutions inside a module, made by Detectron2, the portable class.

    Detectron2's ResNet builder has no hook for another operator. Parameters and names stay.
    """
    portable = {DeformConv: PortableDeformConv, ModulatedDeformConv: PortableModulatedDeformConv}
    for child in module.modules():
        child.__class__ = portable.get(type(child), type(child))


def _deform_conv(conv: nn.Module, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
    # Under autocast the inputs arrive in different precisions; the operator wants one.
    with torch.autocast(x.device.type, enabled=False):
        y = deform_conv2d(
            x.float(),
            offset.float(),
            conv.weight,
            conv.bias,
            conv.stride,
            conv.padding,
            conv.dilation,
            None if mask is None else mask.float(),
        ).to(x.dtype)
    y = y if conv.norm is None else conv.norm(y)
    return y if conv.activation is None else conv.activation(y)
