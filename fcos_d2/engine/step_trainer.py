"""One step of a training, in full or half precision, in one or several parts."""

import logging
import math
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch.nn.parallel import DistributedDataParallel

from .peers import host_group


def check_accumulation(parts: int, images: int) -> None:
    """Raise a ValueError unless ``images``, those of one process, split into equal parts."""
    if parts < 1 or images % parts:
        choices = [n for n in range(1, images + 1) if images % n == 0]
        raise ValueError(
            f"SOLVER.ACCUMULATE {parts} does not split the {images} images that a process has in "
            f"each step into equal parts: choose one of {choices}, or another SOLVER.IMS_PER_BATCH "
            "(over all processes)"
        )


class StepTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer and AMPTrainer in one, which do not wait for the losses of a step.

    Detectron2's gather the losses of all processes as pickled objects in each step, which lets the
    device run dry. Here :meth:`gather_metrics` does it for many steps at once.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        device: str,
        dtype: torch.dtype | None,
        accumulate: int = 1,
    ):
        """
        Args:
            model, data_loader, optimizer: see SimpleTrainer.
            device: that of the model.
            dtype: of the computations under autocast, None without it. Only for float16 the loss is
                scaled.
            accumulate: parts that the images of a step run in, one after the other. A model with
                a method ``loss_normalizers``, such as FCOS, is given those of all parts, and
                learns as from one large batch. Other models learn from the mean of the losses of
                the parts.
        """
        super().__init__(model, data_loader, optimizer)
        self.accumulate = accumulate
        self._is_distributed = isinstance(model, DistributedDataParallel)
        module = model.module if self._is_distributed else model
        self._loss_normalizers = getattr(module, "loss_normalizers", None)
        if accumulate > 1 and self._loss_normalizers is None:
            logging.getLogger(__name__).warning(
                f"SOLVER.ACCUMULATE {accumulate}: {type(module).__name__} learns from the mean of "
                "the losses of the parts, each with normalisers of its own. That is near to one "
                "large batch, but not the same"
            )
        self.device_type, self.dtype = torch.device(device).type, dtype
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)
        # Iteration, seconds of waiting for data, and losses of the steps since gather_metrics.
        self._steps: list[tuple[int, float, dict[str, torch.Tensor]]] = []

    def run_step(self) -> None:
        assert self.model.training, "The model was changed to eval mode"
        begin = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - begin
        self.optimizer.zero_grad()
        try:
            losses = self._backward(data)
            self.after_backward()
            self.grad_scaler.step(self.optimizer)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(self._what_fits(len(data))) from error
        self.grad_scaler.update()
        self._steps.append((self.iter, data_time, losses))

    def _backward(self, data: list[dict]) -> dict[str, torch.Tensor]:
        """Compute the gradients of this process's images; returns the means of the losses."""
        number, parts, shared = self.accumulate, [data], {}
        if number > 1:
            check_accumulation(number, len(data))
            size = len(data) // number
            parts = [data[i : i + size] for i in range(0, len(data), size)]
            if self._loss_normalizers is not None:
                shared["normalizers"] = self._loss_normalizers(parts)
        means: dict[str, torch.Tensor] = {}
        for i, part in enumerate(parts, start=1):
            # The processes share the sum of the gradients, after the last part.
            waits = self._is_distributed and i < number
            with self.model.no_sync() if waits else nullcontext():
                with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
                    losses = self.model(part, **shared)
                if isinstance(losses, torch.Tensor):
                    losses = {"total_loss": losses}
                self.grad_scaler.scale(sum(losses.values()) / number).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach().reshape(()) / number
        return means

    def _what_fits(self, number: int) -> str:
        """What to try when this process's images of a step need more memory than the device has."""
        world = comm.get_world_size()
        parts = next((n for n in range(self.accumulate + 1, number + 1) if number % n == 0), None)
        choices = []
        if parts is not None:
            choices.append(
                f"SOLVER.ACCUMULATE {parts} (the same batch, {number // parts} image(s) at once)"
            )
        if number > 1:
            choices.append(f"--batch {number // 2 * world} (the learning rate follows)")
        choices += [
            "SOLVER.AMP.ENABLED True",
            "smaller images (INPUT.MIN_SIZE_TRAIN, MAX_SIZE_TRAIN)",
        ]
        at_once = number // self.accumulate
        return (
            f"{at_once} image(s) at once do not fit the memory of the device: SOLVER.IMS_PER_BATCH "
            f"{number * world}, {world} process(es), SOLVER.ACCUMULATE {self.accumulate}. Try "
            f"{', or '.join(choices)}"
        )

    def gather_metrics(self) -> None:
        """Write the metrics of the steps since the last call, as Detectron2 writes those of one.

        All processes must call it after the same steps.

        Raises:
            FloatingPointError: in all processes, for losses that are infinite or NaN.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        losses = torch.stack([x for *_, named in steps for x in named.values()]).double().cpu()
        data_times = torch.tensor([data_time for _, data_time, _ in steps]).double()
        of_process = torch.cat([data_times, losses])
        of_all = [of_process]
        if comm.get_world_size() > 1:
            of_all = [torch.empty_like(of_process) for _ in range(comm.get_world_size())]
            dist.all_gather(of_all, of_process, host_group())
        of_all = torch.stack(of_all).numpy()
        means, storage = iter(of_all[:, len(steps) :].mean(axis=0)), get_event_storage()
        for (iteration, data_time, named), longest in zip(steps, of_all.max(axis=0), strict=False):
            metrics = {name: next(means) for name in named}
            total = sum(metrics.values())
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"Loss became infinite or NaN at iteration={iteration}!\nloss_dict = {metrics}"
                )
            times = {"rank_data_time": data_time, "data_time": longest}
            storage.put_scalars(cur_iter=iteration, **times, total_loss=total)
            storage.put_scalars(cur_iter=iteration, **metrics)

    def state_dict(self) -> dict:
        state = super().state_dict()
        if self.dtype is not None:  # as Detectron2's AMPTrainer
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        scale = state_dict.get("grad_scaler")
        if scale:  # a run in bfloat16 or float32 saves none
            self.grad_scaler.load_state_dict(scale)
