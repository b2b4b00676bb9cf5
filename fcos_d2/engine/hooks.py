"""What happens between the steps of a training."""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

from ..checkpoint import read_checkpoint

_WAIT_LOGGED_AFTER = 60.0  # seconds


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, with a record that is kept in ``model_best.pth`` itself.

    So a resumed run does not overwrite a better model, and ``last_checkpoint`` goes on naming the
    last one.
    """

    def before_train(self) -> None:
        file = os.path.join(self._checkpointer.save_dir, self._file_prefix + ".pth")
        if self.trainer.start_iter == 0 or not os.path.isfile(file):
            return
        try:
            saved = read_checkpoint(file)
            self.best_metric, self.best_iter = saved["best_metric"], saved["best_iter"]
        except Exception as error:  # a damaged file raises many kinds of errors
            kept = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}_unknown.pth")
            os.replace(file, kept)
            self._logger.warning(
                f"{file} has no record of its metric, or is damaged ({error!r}). It is kept as "
                f"{kept}, and the best model is looked for anew"
            )

    def _best_checking(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (math.nan, 0))
        if math.isnan(value) or (self.best_metric is not None and value <= self.best_metric):
            self._logger.info(f"{self._val_metric} is {value:.3f}: {self._best()}")
            return
        # After the last iteration Detectron2 counts one too many.
        self.best_metric, self.best_iter = value, min(iteration, self.trainer.max_iter - 1)
        self._checkpointer.save(
            self._file_prefix,
            tag=False,
            iteration=self.best_iter,
            best_metric=self.best_metric,
            best_iter=self.best_iter,
        )
        self._logger.info(f"Saved {self._file_prefix}.pth: {self._best()}")

    def _best(self) -> str:
        if self.best_metric is None:
            return "no best model yet"
        return f"best is {self.best_metric:.3f} of iteration {self.best_iter}"


class OwedEvaluation(HookBase):
    """Evaluates before the first step of a resumed run, if that was due after the last one.

    The run may have been stopped in the middle of its evaluation.
    """

    def __init__(self, was_done: Callable[[int], bool], evaluating: Sequence[HookBase]):
        """
        Args:
            was_done: whether there are results of an iteration. The main process is asked.
            evaluating: what evaluates after a step if it is due.
        """
        self._was_done, self._evaluating = was_done, evaluating

    def before_train(self) -> None:
        trainer, start = self.trainer, self.trainer.start_iter
        if start == 0 or comm.all_gather(self._was_done(start - 1))[0]:
            return
        trainer.iter = trainer.storage.iter = start - 1
        for hook in self._evaluating:
            hook.after_step()
        trainer.iter = trainer.storage.iter = start


class AgreeOnBuffers(HookBase):
    """Averages the running statistics of batch normalisation over the processes, in each step.

    Each process has statistics of its own share of the batches. Evaluation would see those of each
    process, and a checkpoint those of the first one alone.
    """

    def before_train(self) -> None:
        self._buffers = [
            buffer
            for module in self.trainer.model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
            for buffer in (module.running_mean, module.running_var)
        ]

    @torch.no_grad()
    def after_step(self) -> None:
        world = comm.get_world_size()
        if world == 1 or not self._buffers:
            return
        values = torch.cat(self._buffers)
        dist.all_reduce(values)
        values /= world
        for buffer, value in zip(
            self._buffers, values.split([len(b) for b in self._buffers]), strict=True
        ):
            buffer.copy_(value)


class WaitingLog(HookBase):
    """Says where a process stands whose step does not end, such as one that waits for another."""

    def __init__(self):
        self._step: tuple[int, float] | None = None  # iteration, and when it began
        self._ended = threading.Event()

    def before_train(self) -> None:
        if comm.get_world_size() > 1:
            threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True).start()

    def after_train(self) -> None:
        self._ended.set()

    def before_step(self) -> None:
        self._step = self.trainer.iter, time.monotonic()

    def after_step(self) -> None:
        self._step = None

    def _watch(self, thread: int) -> None:
        while not self._ended.wait(_WAIT_LOGGED_AFTER):
            step, frame = self._step, sys._current_frames().get(thread)
            if step is None or frame is None:
                continue
            seconds = time.monotonic() - step[1]
            if seconds >= _WAIT_LOGGED_AFTER:
                logging.getLogger(__name__).warning(
                    f"Process {comm.get_rank()} has been in iteration {step[0]} for {seconds:.0f} "
                    f"s, and stands at {frame.f_code.co_filename}:{frame.f_lineno}. It may be "
                    "waiting for another process"
                )
