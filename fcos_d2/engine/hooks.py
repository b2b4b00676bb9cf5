"""What happens between the steps of a training."""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn

from ..checkpoint import AtomicCheckpointer, read_checkpoint

_WAIT_LOGGED_AFTER = 60.0  # seconds


class BestCheckpointer(HookBase):
    """Keeps the best checkpoint so far as ``model_best.pth``, which holds its metric.

    In place of Detectron2's hook, whose record ends with the process: here a resumed run does not
    overwrite a better model, and ``last_checkpoint`` goes on naming the last one.
    """

    def __init__(self, eval_period: int, checkpointer: AtomicCheckpointer, metric: str):
        """
        Args:
            eval_period: that of the evaluation, whose hook comes before.
            metric: such as "bbox/AP"; higher is better.
        """
        self._period, self._checkpointer, self._metric = eval_period, checkpointer, metric
        self._logger = logging.getLogger(__name__)
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def before_train(self) -> None:
        file = os.path.join(self._checkpointer.save_dir, "model_best.pth")
        if self.trainer.start_iter == 0 or not os.path.isfile(file):
            return
        try:
            saved = read_checkpoint(file)
            self.best_metric, self.best_iter = saved["best_metric"], saved["best_iter"]
        except Exception as error:  # a damaged file raises many kinds of errors
            kept = os.path.join(self._checkpointer.save_dir, "model_best_unknown.pth")
            os.replace(file, kept)
            self._logger.warning(
                f"{file} has no record of its metric, or is damaged ({error!r}). It is kept as "
                f"{kept}, and the best model is looked for anew"
            )

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self.check()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self.check()

    def check(self) -> None:
        """Save the model if the last evaluation is the best one."""
        value, iteration = self.trainer.storage.latest().get(self._metric, (math.nan, 0))
        if value > (-math.inf if self.best_metric is None else self.best_metric):  # NaN is not
            # After the last iteration Detectron2 counts one too many.
            self.best_metric, self.best_iter = value, min(iteration, self.trainer.max_iter - 1)
            record = {"best_metric": self.best_metric, "best_iter": self.best_iter}
            self._checkpointer.save("model_best", tag=False, iteration=self.best_iter, **record)
        best = "no best model yet"
        if self.best_metric is not None:
            best = f"model_best.pth is {self.best_metric:.3f}, of iteration {self.best_iter}"
        self._logger.info(f"{self._metric} is {value:.3f}; {best}")


class EvaluateOnResume(HookBase):
    """Evaluates before the first step of a resumed run, if that was due after the last one.

    The run may have been stopped in the middle of its evaluation.
    """

    def __init__(
        self,
        eval_period: int,
        was_evaluated: Callable[[int], bool],
        evaluate: Callable[[], dict],
        best: BestCheckpointer | None,
    ):
        """
        Args:
            was_evaluated: whether there are results of an iteration. The main process is asked.
            evaluate: the evaluation of the run.
            best: in the main process, what keeps the best checkpoint.
        """
        self._period, self._was_evaluated = eval_period, was_evaluated
        self._evaluate, self._best = evaluate, best

    def before_train(self) -> None:
        done, end = self.trainer.start_iter, self.trainer.max_iter
        is_due = self._period > 0 and done % self._period == 0 and 0 < done < end
        if not is_due or comm.all_gather(self._was_evaluated(done - 1))[0]:
            return
        results = flatten_results_dict(self._evaluate())
        self.trainer.storage.put_scalars(**results, smoothing_hint=False, cur_iter=done - 1)
        if self._best is not None:
            self._best.check()
        comm.synchronize()


class AverageBatchNormStatistics(HookBase):
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
