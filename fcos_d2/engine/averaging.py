"""SOLVER.EMA: a moving average of the weights, which is what is evaluated and kept."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage(AveragedModel):
    """Exponential moving average of a model, as a model of its own: ``module``.

    The average moves by min(decay, (1 + n) / (10 + n)) after n steps, so that it forgets the first
    ones soon (TensorFlow's ``ExponentialMovingAverage``). Buffers with fractions, such as the
    statistics of batch norm, are averaged with the weights that they belong to; counters are
    copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: not under DDP. It is copied.
            decay: in (0, 1).

        Raises:
            ValueError: for another decay.
        """
        if not 0 < decay < 1:
            raise ValueError(
                "SOLVER.EMA.DECAY must be from 0 (no average) to below 1, or -1.0 for one that "
                f"follows the length of the run, got {decay}"
            )
        super().__init__(model, multi_avg_fn=self._move, use_buffers=True)
        self.decay = decay

    def _move(self, averages: list[Tensor], values: list[Tensor], number: Tensor) -> None:
        if not averages[0].is_floating_point():
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)
            return
        n = int(self.n_averaged)  # on CPU, while ``number`` may be on a GPU that is still at work
        decay = min(self.decay, (1 + n) / (10 + n))
        get_ema_multi_avg_fn(decay)(averages, values, n)

    def start(self, model: nn.Module, checkpoint: Mapping[str, Any] | None = None) -> None:
        """Go on with the average of a checkpoint, or begin anew with the weights of the model.

        Args:
            checkpoint: a result of :func:`split_checkpoint`.
        """
        self.module.load_state_dict(model.state_dict())
        self.n_averaged.zero_()
        if checkpoint is not None:
            # What the checkpoint lacks, such as a buffer that the config has added, is the model's.
            self.module.load_state_dict(checkpoint["model"], strict=False)
            self.n_averaged.fill_(checkpoint["n_averaged"])

    def checkpoint(self, raw: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a checkpoint holds: the average under "model", where every reader looks for weights.

        Args:
            raw: the state of the model that is trained.
        """
        averaged = self.module.state_dict()
        return {"model": averaged, "raw_model": raw, "n_averaged": int(self.n_averaged)}


def build_average(cfg: CfgNode, model: nn.Module) -> WeightAverage | None:
    """The average that ``SOLVER.EMA`` asks for, None for a decay of 0. For errors see there."""
    if cfg.SOLVER.EMA.DECAY == 0:
        return None
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise ValueError(
            "TEST.PRECISE_BN computes statistics for the weights that are trained, and with "
            "SOLVER.EMA their average is evaluated, whose statistics are averages, too: set "
            "TEST.PRECISE_BN.ENABLED False, or SOLVER.EMA.DECAY 0.0"
        )
    return WeightAverage(model, cfg.SOLVER.EMA.DECAY)


def split_checkpoint(checkpoint: dict[str, Any], goes_on: bool) -> dict[str, Any] | None:
    """Take the average out of a checkpoint, and leave the weights that are trained as "model".

    Args:
        checkpoint: changed in place.
        goes_on: whether the run has an average. The log says where that of the checkpoint differs.

    Returns:
        the average, for :meth:`WeightAverage.start`; None if the checkpoint has none.
    """
    logger = logging.getLogger(__name__)
    if "raw_model" not in checkpoint:
        if goes_on:
            logger.info("SOLVER.EMA: the checkpoint has no average, which begins with its weights")
        return None
    average = {"model": checkpoint["model"], "n_averaged": checkpoint.pop("n_averaged")}
    checkpoint["model"] = checkpoint.pop("raw_model")
    if not goes_on:
        logger.info("SOLVER.EMA.DECAY is 0: the average of the checkpoint is dropped")
    return average


class AverageWeights(HookBase):
    """Moves the average after each step. Hooks before it may change the model, as batch norms'."""

    def __init__(self, average: WeightAverage, model: nn.Module):
        self._average, self._model = average, model

    def after_step(self) -> None:
        self._average.update_parameters(self._model)
