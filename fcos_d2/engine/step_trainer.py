"""SOLVER.AMP on every device: float16 with loss scaling, or bfloat16 without."""

import time

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer

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


class AutocastTrainer(AMPTrainer):
    """Detectron2's AMPTrainer, whose own step needs CUDA, on any device."""

    def __init__(self, model, data_loader, optimizer, device: str, dtype: torch.dtype):
        """
        Args:
            model, data_loader, optimizer: see AMPTrainer.
            device: that of the model.
            dtype: of the computations. Only for float16 the loss is scaled.
        """
        self.device_type = torch.device(device).type
        scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)
        super().__init__(model, data_loader, optimizer, grad_scaler=scaler, precision=dtype)

    def run_step(self) -> None:
        assert self.model.training, "The model was changed to eval mode"
        begin = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - begin
        with torch.autocast(self.device_type, dtype=self.precision):
            losses = self.model(data)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def load_state_dict(self, state_dict: dict) -> None:
        # A run in bfloat16 or float32 saves no scale.
        scale = state_dict.get("grad_scaler")
        super().load_state_dict(
            {**state_dict, "grad_scaler": scale or self.grad_scaler.state_dict()}
        )
