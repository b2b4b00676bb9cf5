"""TEST.PATIENCE: a training ends when its evaluations bring no new best."""

import logging
import math
import os

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..checkpoint import AtomicCheckpointer
from .resuming import evaluated


class EndedEarly(BaseException):
    """Leaves the loop of a training. Not an Exception, which Detectron2 logs as a failure."""


def check_patience(cfg: CfgNode) -> None:
    """Raise a ValueError for a TEST.PATIENCE that could never end the training as it says."""
    patience = cfg.TEST.PATIENCE
    if patience < 0:
        raise ValueError(
            f"TEST.PATIENCE must be a number of evaluations, or 0 for no end, got {patience}"
        )
    if patience and not cfg.DATASETS.TEST:
        raise ValueError(
            f"TEST.PATIENCE {patience} needs a data set to evaluate on: set DATASETS.TEST"
        )
    if patience and cfg.TEST.EVAL_PERIOD <= 0:
        raise ValueError(
            f"TEST.PATIENCE {patience} counts evaluations, and TEST.EVAL_PERIOD "
            f"{cfg.TEST.EVAL_PERIOD} asks for none before the end: set TEST.EVAL_PERIOD to the "
            "number of iterations between two"
        )


class EarlyStopping(HookBase):
    """Ends a training, as one that is finished, after evaluations without a new best.

    Each checkpoint has the count, also of a run without an end, so that a resumed run may be given
    one. All processes end after the same step.
    """

    def __init__(
        self, eval_period: int, patience: int, checkpointer: AtomicCheckpointer, metric: str
    ):
        """
        Args:
            eval_period: of the evaluation, whose hook runs before this one.
            patience: how many evaluations without a new best end the training; 0 for no end.
            metric: such as "bbox/AP"; higher is better, and NaN is no new best.
        """
        self._eval_period, self._patience = eval_period, patience
        self._checkpointer, self._metric = checkpointer, metric
        self._best, self._without_gain = -math.inf, 0
        self._counted = 0  # iterations before the last evaluation that was counted

    def state_dict(self) -> dict:
        return {"best": self._best, "without_gain": self._without_gain, "counted": self._counted}

    def load_state_dict(self, state: dict) -> None:
        self._best, self._without_gain = state["best"], state["without_gain"]
        self._counted = state["counted"]

    def before_train(self) -> None:
        done = self.trainer.start_iter
        if not 0 < done < self.trainer.max_iter:
            return
        if self._counted < done:
            # A checkpoint is older than the evaluation after its step.
            value = self._latest(done - 1)
            if value is None:
                file = os.path.join(self.trainer.cfg.OUTPUT_DIR, "metrics.json")
                value = evaluated(file, done - 1, self._metric)
            self._count(value, done)
        self._end_if_due(done)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._eval_period == 0 and done != self.trainer.max_iter:
            value = self._latest(done - 1)
            self._count(math.nan if value is None else value, done)
            self._end_if_due(done)

    def _latest(self, iteration: int) -> float | None:
        value, latest = self.trainer.storage.latest().get(self._metric, (None, None))
        return value if latest == iteration else None

    def _count(self, value: float | None, done: int) -> None:
        # The main process alone has the results.
        value = comm.all_gather(value)[0]
        if value is None:
            return
        self._counted = done
        if value > self._best:
            self._best, self._without_gain = value, 0
        else:
            self._without_gain += 1

    def _end_if_due(self, done: int) -> None:
        if not 0 < self._patience <= self._without_gain:
            return
        has_best = self._best > -math.inf
        best = f"the best is {self._best:.3f}" if has_best else "it never was a number"
        logging.getLogger(__name__).info(
            f"The training ends early, after iteration {done - 1}: {self._metric} had no new best "
            f"in {self._without_gain} evaluations, and {best}. It goes on with --resume and a "
            f"larger TEST.PATIENCE than {self._patience}, or 0"
        )
        trainer = self.trainer
        # As in a run whose last step this was.
        trainer.iter, trainer.max_iter, trainer.ended_early = done - 1, done, True
        self._checkpointer.save("model_final", iteration=done - 1)
        raise EndedEarly
