"""Distances as distributions over bins (arXiv 2006.04388, section 3; 2011.12885).

Shapes: N images, P positives, n REG_MAX. The bins of a side stand at 0, 1, ..., n bin widths from
the location. Channels are side by side: the n + 1 bins of left, then of top, right and bottom.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A target at the last bin would need one beyond it; mmdetection keeps this far below, too.
_BELOW_LAST = 0.1


class Distributions(NamedTuple):
    """What the head predicts for the distances of a batch."""

    logits: list[Tensor]  # (N, 4 * (n + 1), Hi, Wi) float32 for each level, before the softmax
    bin_widths: Sequence[int]  # pixels, of each level


def expected_distances(logits: Tensor) -> Tensor:
    """(N, 4, Hi, Wi) expected values in bin widths of (N, 4 * (n + 1), Hi, Wi) logits."""
    probability = logits.unflatten(1, (4, -1)).softmax(dim=2)
    bins = torch.arange(probability.shape[2], device=logits.device, dtype=logits.dtype)
    return (probability * bins[:, None, None]).sum(dim=2)


class DistributionQuality(nn.Module):
    """How good a box is, from the shapes of its distributions (2011.12885, section 3).

    A sharp distribution is that of a side that the head is sure of. The statistics of a side are
    its highest probabilities and their mean; two layers make one logit of those of all sides.
    """

    def __init__(self, top_k: int = 4, channels: int = 64):
        super().__init__()
        self.top_k = top_k
        self.layers = nn.Sequential(
            nn.Conv2d(4 * (top_k + 1), channels, 1), nn.ReLU(), nn.Conv2d(channels, 1, 1)
        )
        for layer in (self.layers[0], self.layers[2]):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, logits: Tensor) -> Tensor:
        """(N, 1, Hi, Wi) logits of (N, 4 * (n + 1), Hi, Wi) logits of distributions."""
        probability = logits.unflatten(1, (4, -1)).softmax(dim=2)
        highest = probability.topk(self.top_k, dim=2).values
        statistics = torch.cat([highest, highest.mean(dim=2, keepdim=True)], dim=2)
        return self.layers(statistics.flatten(1, 2))


def logit_of_product(a: Tensor, b: Tensor) -> Tensor:
    """The logit of sigmoid(a) * sigmoid(b), for tensors whose shapes broadcast.

    With 1 / p = (1 + e^-a) (1 + e^-b), it is -ln(1 / p - 1) = -ln(e^-a + e^-b + e^-(a + b)).
    """
    return -torch.logaddexp(torch.logaddexp(-a, -b), -(a + b))


def logit_of_geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """The logit of sqrt(sigmoid(a) * sigmoid(b)), for tensors whose shapes broadcast.

    With x the logit of the product, 1 / p = sqrt(1 + e^-x). Then e^-x = (1 / p - 1) (1 / p + 1),
    and the logit, -ln(1 / p - 1), is x + ln(1 + sqrt(1 + e^-x)).
    """
    x = logit_of_product(a, b)
    return x + F.softplus(F.softplus(-x) / 2)


def distribution_focal_losses(logits: Tensor, distances: Tensor) -> Tensor:
    """(P,) the distribution focal loss, the mean of the four sides.

    It is the cross entropy with a target that shares its probability between the two bins beside
    the distance, so that the expected value is the distance.

    Args:
        logits: (P, 4 * (n + 1)).
        distances: (P, 4) true distances in bin widths, >= 0. Beyond the last bin, one just below it
            is learnt.
    """
    log_probability = logits.unflatten(1, (4, -1)).log_softmax(dim=2)  # (P, 4, n + 1)
    last = log_probability.shape[2] - 1
    distances = distances.clamp(max=last - _BELOW_LAST)
    below = distances.floor()
    share_above = distances - below
    beside = torch.stack([below, below + 1], dim=2).long()
    shares = torch.stack([1 - share_above, share_above], dim=2)
    return -(shares * log_probability.gather(2, beside)).sum(dim=2).mean(dim=1)
