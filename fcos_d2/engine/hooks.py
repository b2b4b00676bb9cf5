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
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ..checkpoint import AtomicCheckpointer, read_checkpoint
from .resuming import evaluated

_WAIT_LOGGED_AFTER = 60.0  # seconds
_EPOCH_LOGGED_EVERY = 20  # iterations, where epochs are shorter


def is_finished(trainer: TrainerBase) -> bool:
    """Whether a training has come to its end. Detectron2's hooks take an error there for one."""
    return trainer.iter >= trainer.max_iter or trainer.ended_early


class EvalHook(hooks.EvalHook):
    """Detectron2's, which also evaluates before a resumed run if that was due after its last step.

    The run may have been stopped in the middle of that evaluation.
    """

    def __init__(self, eval_period: int, evaluate: Callable[[], dict], metric: str):
        """Like Detectron2's. ``metric`` is a result of each evaluation, such as "bbox/AP"."""
        super().__init__(eval_period, evaluate)
        self._eval_period, self._evaluate, self._metric = eval_period, evaluate, metric

    def before_train(self) -> None:
        done, end = self.trainer.start_iter, self.trainer.max_iter
        is_due = self._eval_period > 0 and done % self._eval_period == 0 and 0 < done < end
        if is_due and not self._was_evaluated(done - 1):
            results = flatten_results_dict(self._evaluate())
            self.trainer.storage.put_scalars(**results, smoothing_hint=False, cur_iter=done - 1)
            comm.synchronize()

    def after_train(self) -> None:
        # A run that ends early was evaluated after its last step. The evaluation with test-time
        # augmentation, which has no period, follows, unless this is a resumed run that has it.
        is_done = self.trainer.ended_early and (
            self._eval_period > 0 or self._was_evaluated(self.trainer.max_iter - 1)
        )
        if is_finished(self.trainer) and not is_done:
            super().after_train()

    def _was_evaluated(self, iteration: int) -> bool:
        file = os.path.join(self.trainer.cfg.OUTPUT_DIR, "metrics.json")
        # The main process decides for all.
        return comm.all_gather(evaluated(file, iteration, self._metric))[0] is not None


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's, which also deletes older checkpoints, those of a run before --resume too.

    fvcore's ``max_to_keep`` forgets them when the process ends.
    """

    def __init__(self, checkpointer: AtomicCheckpointer, solver: CfgNode):
        """
        Raises:
            ValueError: for a negative SOLVER.CHECKPOINTS_KEPT.
        """
        super().__init__(checkpointer, solver.CHECKPOINT_PERIOD)
        self._kept = solver.CHECKPOINTS_KEPT
        if self._kept < 0:
            raise ValueError(
                f"SOLVER.CHECKPOINTS_KEPT must be at least 1, or 0 for all, got {self._kept}"
            )

    def after_step(self) -> None:
        super().after_step()
        if self._kept and (self.trainer.iter + 1) % self.period == 0:
            files = self.checkpointer.checkpoints_of_run()
            periodic = [f for f in files if os.path.basename(f) != "model_final.pth"]
            for file in periodic[self._kept :]:
                os.remove(file)


class BestCheckpointer(HookBase):
    """Keeps the best checkpoint so far, with its metric, as ``model_best.pth``.

    Detectron2's hook forgets the metric when the process ends. Here a resumed run does not
    overwrite a better model, and ``last_checkpoint`` does not name this file.
    """

    def __init__(self, eval_period: int, checkpointer: AtomicCheckpointer, metric: str):
        """
        Args:
            eval_period: of the evaluation, whose hook runs before this one.
            metric: such as "bbox/AP"; higher is better.
        """
        self._eval_period, self._checkpointer, self._metric = eval_period, checkpointer, metric
        self.best_metric, self.best_iter = -math.inf, None
        self._logger = logging.getLogger(__name__)

    def before_train(self) -> None:
        if self.trainer.start_iter == 0:
            return
        file = os.path.join(self._checkpointer.save_dir, "model_best.pth")
        if os.path.isfile(file):
            try:
                saved = read_checkpoint(file)
                self.best_metric, self.best_iter = saved["best_metric"], saved["best_iter"]
            except Exception as error:  # a damaged file raises many kinds of errors
                kept = os.path.join(self._checkpointer.save_dir, "model_best_unknown.pth")
                os.replace(file, kept)
                self._logger.warning(
                    f"{file} has no record of its metric, or is damaged ({error!r}). It is kept as "
                    f"{kept}, and the search for the best model starts anew"
                )
        if self._metric in self.trainer.storage.latest():  # from EvalHook.before_train
            self._check()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_due = self._eval_period > 0 and done % self._eval_period == 0
        if is_due and done != self.trainer.max_iter:  # after the last step, after_train does it
            self._check()

    def after_train(self) -> None:
        if is_finished(self.trainer) and not self.trainer.ended_early:
            self._check()

    def _check(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._metric, (math.nan, 0))
        if value > self.best_metric:  # NaN is not
            # After the last iteration Detectron2 counts one too many.
            self.best_metric, self.best_iter = value, min(iteration, self.trainer.max_iter - 1)
            record = {"best_metric": self.best_metric, "best_iter": self.best_iter}
            self._checkpointer.save("model_best", tag=False, iteration=self.best_iter, **record)
        best = "no best model yet"
        if self.best_iter is not None:
            best = f"model_best.pth is {self.best_metric:.3f}, of iteration {self.best_iter}"
        self._logger.info(f"{self._metric} is {value:.3f}; {best}")


class GatherMetrics(HookBase):
    """Collects the losses of the steps so far, before others write them or save a checkpoint."""

    def __init__(self, *periods: int):
        """
        Args:
            periods: numbers of iterations after which losses are needed; 0 for never.
        """
        self._periods = [period for period in periods if period > 0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_due = any(done % period == 0 for period in self._periods)
        if is_due or done == self.trainer.max_iter:
            self.trainer.gather_metrics()


class EpochLog(HookBase):
    """Counts epochs beside iterations: as the metric "epoch", and in the log when one ends."""

    def __init__(self, iterations: float):
        """
        Args:
            iterations: in an epoch.
        """
        self._iterations, self._said = iterations, 0

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        epochs = done / self._iterations
        self.trainer.storage.put_scalar("epoch", epochs, smoothing_hint=False)
        ends = int(epochs) > int((done - 1) / self._iterations)
        if ends and done - self._said >= _EPOCH_LOGGED_EVERY:
            self._said, last = done, round(self.trainer.max_iter / self._iterations, 2)
            logging.getLogger(__name__).info(f"Epoch {int(epochs)} of {last:g} is done")


class AverageBatchNormStatistics(HookBase):
    """Averages the running statistics of batch normalisation over the processes, in each step.

    Each process updates them from its own share of the batch. Without this hook each would evaluate
    with its own, and a checkpoint would hold those of the first process. SyncBN needs no average.
    """

    def before_train(self) -> None:
        self._norms = [
            module
            for module in get_bn_modules(self.trainer.model)
            if module.track_running_stats
            and not isinstance(module, NaiveSyncBatchNorm | nn.SyncBatchNorm)
        ]

    @torch.no_grad()
    def after_step(self) -> None:
        world = comm.get_world_size()
        if world == 1 or not self._norms:
            return
        # TEST.PRECISE_BN replaces them now and then.
        statistics = [x for norm in self._norms for x in (norm.running_mean, norm.running_var)]
        averages = torch.cat(statistics)
        dist.all_reduce(averages)
        averages /= world
        # One operation for all; PyTorch's optimizers use it, too, and there is no public one.
        torch._foreach_copy_(statistics, averages.split([len(x) for x in statistics]))


class WaitingLog(HookBase):
    """Logs where a process stands whose step takes too long, for example because it waits."""

    def __init__(self):
        self._step: tuple[int, float] | None = None  # iteration, and when it began
        self._ended = threading.Event()

    def before_train(self) -> None:
        if comm.get_world_size() > 1:
            # A thread of its own, as the main thread is the one that waits.
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
            seconds = 0.0 if step is None else time.monotonic() - step[1]
            if frame is not None and seconds >= _WAIT_LOGGED_AFTER:
                logging.getLogger(__name__).warning(
                    f"Process {comm.get_rank()} has been in iteration {step[0]} for {seconds:.0f} "
                    f"s, and stands at {frame.f_code.co_filename}:{frame.f_lineno}. It may be "
                    "waiting for another process"
                )
