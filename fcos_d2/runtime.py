"""How a detector runs, as opposed to what it is: nothing here changes a result beyond rounding.

Precision, memory layout and compilation of the backbone and the head; batch norms folded into
convolutions; copies to a GPU that the CPU does not wait for.
"""

import contextlib
import functools
import logging
import math

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d
from detectron2.structures import ImageList
from fvcore.nn.precise_bn import BN_MODULE_TYPES
from torch import Tensor, nn

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Runtime:
    """Runs the backbone and the head of one detector."""

    def __init__(self, *, precision_test: str = "float32", compile: bool = False):
        """
        Args:
            precision_test: ``MODEL.FCOS.PRECISION_TEST``.
            compile: ``MODEL.FCOS.COMPILE``. The first run compiles. A copy of a compiled detector
                is not compiled.

        Raises:
            ValueError: for an unknown precision.
        """
        if precision_test not in _PRECISIONS:
            raise ValueError(
                f"MODEL.FCOS.PRECISION_TEST must be one of {list(_PRECISIONS)}, got "
                f"{precision_test!r}"
            )
        self.dtype_test = _PRECISIONS[precision_test]
        self.compile = compile
        self._is_compiled = False

    def run(self, model: nn.Module, images: Tensor):
        """``model.dense(images)``: what backbone and head make of (N, 3, H, W) images."""
        device = images.device.type
        if self.compile and not self._is_compiled and compiler_works(device):
            # In place: modules keep their class and the names of their parameters.
            model.backbone.compile(dynamic=True)
            # On CPU, PyTorch's own group normalisation is faster than the compiled one
            # (benchmarks/NOTES.md), and the head has little else to fuse.
            if device != "cpu":
                model.head.compile(dynamic=True)
            self._is_compiled = True
        if device == "cpu":
            # Channels-last: all layers take the layout of their input. On GPU it is not measured.
            images = images.contiguous(memory_format=torch.channels_last)
        dtype = None if model.training else self.dtype_test
        with torch.autocast(device, dtype) if dtype else contextlib.nullcontext():
            return model.dense(images)


def inference_parts(images: ImageList) -> list[ImageList]:
    """The batches to run in place of this one, without training.

    On CPU a batch gains nothing, and the maps of one image stay nearer to the caches.
    """
    if images.tensor.device.type != "cpu":
        return [images]
    pairs = zip(images.tensor.split(1), images.image_sizes, strict=True)
    return [ImageList(image, [size]) for image, size in pairs]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. The CPU does not wait for a copy to a GPU."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


@functools.cache
def compiler_works(device_type: str) -> bool:
    """Whether torch.compile works on a type of device; if not, one warning says why."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=True)(torch.ones(2, device=device_type))
        return True
    except Exception as error:  # torch, Triton and the C++ compiler each raise their own
        needed = "a C++ compiler" if device_type == "cpu" else "Triton and a C compiler"
        reason = " ".join(str(error).split("\n", 2)[:2]) or type(error).__name__
        logging.getLogger(__name__).warning(
            f"The model is not compiled: torch.compile does not work here for the device "
            f"{device_type!r}, where it needs {needed}: {reason}"
        )
        return False


def fold_norms(backbone: nn.Module) -> None:
    """Make :class:`FoldedConv2d` of the convolutions in the residual blocks and stem of a ResNet.

    Parameters, buffers, their names and their gradients stay; results differ by rounding.
    """
    for block in backbone.modules():
        if isinstance(block, CNNBlockBase):
            for child in block.children():
                if type(child) is Conv2d and child.norm is not None:
                    child.__class__ = FoldedConv2d  # which only adds methods


class FoldedConv2d(Conv2d):
    """Detectron2's convolution, which on CPU applies a fixed batch norm to its weights.

    A frozen norm, or any batch norm in evaluation mode, is an affine map of each channel. Scaling
    the weights by it in every call saves passes over the activations. The norm itself is then not
    called, and hooks on it do not run. It is called as usual where there are more weights than
    activations, and on other devices, where the scaling costs more launches than it saves.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not _is_fixed(self.norm) or not self._has_few_weights(x):
            return super().forward(x)
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        bias = self.norm.bias - self.norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        # In a model in half precision the norms may still be float32.
        weight = (self.weight * scale.reshape(-1, 1, 1, 1)).to(self.weight.dtype)
        bias = bias.to(weight.dtype)
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def _has_few_weights(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return True  # one graph for all image sizes
        weights_per_channel = self.in_channels // self.groups * math.prod(self.kernel_size)
        return weights_per_channel <= x.numel() // x.shape[1] // math.prod(self.stride)


def _is_fixed(norm: nn.Module | None) -> bool:
    if isinstance(norm, BN_MODULE_TYPES):  # SyncBN is one, too
        return not norm.training and norm.affine and norm.track_running_stats
    return isinstance(norm, FrozenBatchNorm2d)
