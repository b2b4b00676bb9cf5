"""Deformable convolutions that run on every device, on torchvision's operator.

Detectron2's own operators raise on CPU; torchvision's compute the same on CPU and GPU.
"""

import torch
from detectron2.layers import DeformConv, ModulatedDeformConv
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class PortableDeformConv(nn.Module):
    """A convolution of Detectron2 on any device, with the parameters and the norm of ``conv``."""

    def __init__(self, conv: DeformConv | ModulatedDeformConv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.norm, self.activation = conv.norm, conv.activation
        self.train(conv.training)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (N, C, H, W).
            offset: (N, 2 * G * k, Ho, Wo) for G groups of channels and k cells of the kernel.
            mask: (N, G * k, Ho, Wo) for a modulated convolution.
        """
        # The operator needs one precision, and under autocast the inputs have several.
        tensors = (x, offset, self.weight, self.bias, mask)
        pixels, offset, weight, bias, mask = (None if t is None else t.float() for t in tensors)
        with torch.autocast(x.device.type, enabled=False):
            y = deform_conv2d(
                pixels, offset, weight, bias, self.stride, self.padding, self.dilation, mask
            ).to(x.dtype)
        y = y if self.norm is None else self.norm(y)
        return y if self.activation is None else self.activation(y)


class SelfModulatedDeformConv(nn.Module):
    """A 3x3 modulated deformable convolution that predicts its own offsets and mask.

    Starts as an ordinary convolution at half strength: offsets 0, mask sigmoid(0).
    """

    def __init__(self, channels: int, deform_groups: int = 1):
        """
        Args:
            deform_groups: groups of channels, each with offsets and a mask of its own.
        """
        super().__init__()
        self.offset = nn.Conv2d(channels, deform_groups * 3 * 9, kernel_size=3, padding=1)
        conv = ModulatedDeformConv(
            channels, channels, 3, padding=1, deformable_groups=deform_groups
        )
        self.conv = PortableDeformConv(conv)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        nn.init.normal_(self.conv.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        offset_and_mask = self.offset(x)
        first_mask = offset_and_mask.shape[1] // 3 * 2
        offset, mask = offset_and_mask[:, :first_mask], offset_and_mask[:, first_mask:]
        return self.conv(x, offset, mask.sigmoid())


def use_portable_deform_convs(module: nn.Module) -> None:
    """Replace Detectron2's deformable convolutions in a module by portable ones, in place.

    Detectron2's ResNet builder takes no other operator. Parameters and their names stay.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DeformConv | ModulatedDeformConv):
                setattr(parent, name, PortableDeformConv(child))
