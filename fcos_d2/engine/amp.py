"""SOLVER.AMP on every device: float16 with loss scaling, or bfloat16 without."""

import torch
from detectron2.config import CfgNode

from .step_trainer import StepTrainer

AutocastTrainer = StepTrainer  # its name before, which programs of others import

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def amp_dtype(cfg: CfgNode) -> torch.dtype:
    """The type that ``SOLVER.AMP.DTYPE`` means on ``MODEL.DEVICE``.

    Raises:
        ValueError: for another value than "auto", "float16" and "bfloat16", and for float16 on CPU.
    """
    name, device = cfg.SOLVER.AMP.DTYPE, torch.device(cfg.MODEL.DEVICE)
    if name == "auto":
        # Detectron2's RoI heads round box corners to the precision of the features, which is whole
        # pixels and more in bfloat16. So models other than FCOS get float16.
        prefers_bfloat16 = device.type != "cuda" or (
            cfg.MODEL.META_ARCHITECTURE == "FCOS"
            and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        name = "bfloat16" if prefers_bfloat16 else "float16"
    if name not in _DTYPES:
        raise ValueError(f"SOLVER.AMP.DTYPE must be one of {['auto', *_DTYPES]}, got {name!r}")
    if name == "float16" and device.type != "cuda":
        raise ValueError(
            f"SOLVER.AMP.DTYPE 'float16' needs a GPU, MODEL.DEVICE is {cfg.MODEL.DEVICE!r}: set "
            "SOLVER.AMP.DTYPE to 'bfloat16' or 'auto'"
        )
    return _DTYPES[name]
