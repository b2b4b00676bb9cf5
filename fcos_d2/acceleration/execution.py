"""How the dense part of a detector, backbone and head, is run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import torch
from detectron2.config import configurable
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..config import check_choice
from .compilation import compile_in_place, frozen_weights

_PRECISIONS = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Execution:
    """Precision, memory layout, compilation and batches of a dense detector."""

    @configurable
    def __init__(self, *, precision_test: str = "float32", compile: bool = False):
        """
        Args:
            precision_test: ``MODEL.FCOS.PRECISION_TEST``.
            compile: ``MODEL.FCOS.COMPILE``.

        Raises:
            ValueError: for an unknown precision.
        """
        check_choice("PRECISION_TEST", precision_test, list(_PRECISIONS))
        self.dtype_test = _PRECISIONS[precision_test]
        self.compile = compile
        self.frozen = False
        self._compiled: WeakSet[nn.Module] = WeakSet()

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {
            "precision_test": cfg.MODEL.FCOS.PRECISION_TEST,
            "compile": cfg.MODEL.FCOS.COMPILE,
        }

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_compiled": WeakSet()}  # PyTorch copies modules uncompiled

    def freeze(self) -> None:
        """Compile for inference alone, with the weights that the first call finds.

        The weights must not change after that: the compiler keeps copies of some of them. Compiled
        kernels may turn NaN into 0.
        """
        self.compile, self.frozen, self._compiled = True, True, WeakSet()

    @contextmanager
    def of(self, model: nn.Module, images: Tensor) -> Iterator[Tensor]:
        """Run the backbone and the head of ``model`` inside, on the tensor that is given.

        Args:
            model: with the attributes ``backbone``, ``head`` and ``training``.
            images: (N, 3, H, W).
        """
        device = images.device
        if self.compile and model not in self._compiled:
            # On CPU, PyTorch's own group normalisation is faster than the compiled one
            # (benchmarks/NOTES.md), and little else in the head could be fused.
            modules = [model.backbone] if device.type == "cpu" else [model.backbone, model.head]
            # Frozen weights are laid out for one size of images: that of the first one.
            compile_in_place(modules, device, dynamic=None if self.frozen else True)
            self._compiled.add(model)
        with ExitStack() as stack:
            if self.dtype_test is not None and not model.training:
                stack.enter_context(torch.autocast(device.type, dtype=self.dtype_test))
            if self.frozen:
                stack.enter_context(frozen_weights())
            if channels_last_helps(device.type):
                # Convolutions, and on CPU all that follows them, take the layout of their input.
                images = images.contiguous(memory_format=torch.channels_last)
            yield images

    def batches(self, images: ImageList) -> list[ImageList]:
        """The parts of a batch that are detected one after the other.

        On CPU a batch gains nothing, and the maps of one image stay nearer to the caches.
        """
        if images.tensor.device.type != "cpu":
            return [images]
        return [
            ImageList(images.tensor[i : i + 1], images.image_sizes[i : i + 1])
            for i in range(len(images.image_sizes))
        ]


def channels_last_helps(device_type: str) -> bool:
    """Whether convolutions run faster on (N, H, W, C) memory.

    On CPU always (benchmarks/NOTES.md); on GPU in half precision, whose tensor cores want it.
    There the group norms of the head return the plain layout, so it ends with the backbone.
    """
    return device_type == "cpu" or (device_type == "cuda" and torch.is_autocast_enabled("cuda"))
