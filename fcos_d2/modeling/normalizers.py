"""What the losses are divided by: numbers of the whole batch, over all processes and parts."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn

from .validation import check_choice

_EMA_MOMENTUM = 0.9


class Normalizers(NamedTuple):
    """Divisors of the losses, scalars.

    They make the mean of the losses that of the whole batch: the mean over all processes, and over
    the parts that each process splits its images into.
    """

    num_positives: Tensor  # with aligned targets, the sum of their scores
    sum_of_weights: Tensor


class NormalizedLoss(nn.Module):
    """A loss that knows the divisors of the whole batch.

    With ``loss_normalizer="ema_fg"`` the moving average is a buffer, so that a resumed run
    continues it. It is of the whole batch, however many processes share the batch.
    """

    def __init__(self, loss_normalizer: str):
        super().__init__()
        check_choice("LOSS_NORMALIZER", loss_normalizer, ("fg", "ema_fg"))
        average = torch.tensor(0.0) if loss_normalizer == "ema_fg" else None
        self.register_buffer("ema_num_positives", average)

    def divisors(
        self, num_positives: Tensor, weights: Tensor, is_weighted: bool, parts: int = 1
    ) -> Normalizers:
        """The divisors of a step; in evaluation mode 1. The moving average moves once.

        All processes must call it together.

        Args:
            num_positives: scalar, of this process in all parts; of aligned targets, the sum of
                their scores.
            weights: (P,) of the box losses of these positives.
            is_weighted: whether what is weighted is divided by the sum of the weights; else it is
                divided as the others are.
            parts: how many parts.
        """
        if not self.training:
            return Normalizers(weights.new_ones(()), weights.new_ones(()))
        sums = torch.stack([num_positives, weights.sum()])
        world_size = comm.get_world_size()
        if world_size > 1:
            dist.all_reduce(sums)
        # Bounds for a batch without positives; of the whole batch, so that the number of processes
        # changes nothing.
        count = sums[0].clamp(min=1.0)
        shares = world_size * parts
        sum_of_weights = sums[1].clamp(min=1e-6) / shares
        if self.ema_num_positives is not None:
            average = self.ema_num_positives  # 0 before the first step
            moved = _EMA_MOMENTUM * average + (1 - _EMA_MOMENTUM) * count
            count = torch.where(average > 0, moved, count)
            average.copy_(count)
        count = count / shares
        return Normalizers(count, sum_of_weights if is_weighted else count)
