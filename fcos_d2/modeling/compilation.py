"""torch.compile, where a compiler is to be had."""

import functools
import logging
from collections.abc import Iterable

import torch
from torch import nn


def compile_in_place(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Compile modules for inputs of any size; they keep their class and the names of their state.

    Where no compiler works for this kind of device they stay as they are, with one warning that
    says why.
    """
    if _compiler_works(device.type):
        for module in modules:
            module.compile(dynamic=True)


@functools.cache
def _compiler_works(device_type: str) -> bool:
    try:
        torch.compile(_probe, dynamic=True)(torch.ones(2, device=device_type))
        return True
    except Exception as error:  # torch, Triton and the C++ compiler each raise their own
        needed = "a C++ compiler" if device_type == "cpu" else "Triton and a C compiler"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logging.getLogger(__name__).warning(
            f"MODEL.FCOS.COMPILE has no effect: torch.compile does not work here for the device "
            f"{device_type!r}, where it needs {needed}: {reason}"
        )
        return False


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
