"""torch.compile, where a compiler is to be had."""

import functools
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
import torch._inductor.config as inductor_config
from torch import nn

# One object for all calls: PyTorch keeps something of each patch for ever.
_FREEZING = inductor_config.patch(freezing=True)


def compile_in_place(
    modules: Iterable[nn.Module], device: torch.device, dynamic: bool | None = True
) -> None:
    """Compile modules for inputs of any size; they keep their class and the names of their state.

    Where no compiler works for this kind of device they stay as they are, with one warning that
    says why.

    Args:
        dynamic: True for sizes of all kinds from the start. None for PyTorch's default: the first
            size gets code of its own, others share code for any height, any width or both.
    """
    if compiler_works(device.type):
        for module in modules:
            module.compile(dynamic=dynamic)


def frozen_weights() -> AbstractContextManager:
    """What is compiled inside takes its weights for constants, unless gradients are enabled.

    They are then laid out, cast and folded once and for all, and must not change any more. Every
    call must be inside, since each may find that it needs another compilation. That PyTorch offers
    this as a setting of its compiler alone, not of a module, is why it is a context.
    """
    return _FREEZING


@functools.cache
def compiler_works(device_type: str) -> bool:
    """Whether torch.compile works for a kind of device; if not, there is one warning."""
    try:
        torch.compile(_probe, dynamic=True)(torch.ones(2, device=device_type))
        return True
    except Exception as error:  # torch, Triton and the C++ compiler each raise their own
        needed = "a C++ compiler" if device_type == "cpu" else "Triton and a C compiler"
        reason = " ".join(str(error).split("\n", 2)[:2]) or type(error).__name__
        logging.getLogger(__name__).warning(
            f"The model is not compiled: torch.compile does not work here for the device "
            f"{device_type!r}, where it needs {needed}: {reason}"
        )
        return False


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
