"""Classification losses on dense class logits and a list of positives.

Summed over all cells and classes, each is the loss of an absent class everywhere plus a correction
where a class is present. So it needs no one-hot targets and no permutation of the logits.

The loss of an absent class with p = sigmoid(x) is weight * p^gamma * -ln(1 - p) for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .assignment.candidates import Targets

# The values of CLS_LOSS_TYPE.
CLASS_LOSSES = ("focal", "quality_focal", "varifocal")
# Elements to process at once. On CPU the temporaries then stay in the cache; on GPU this bounds
# their size with few kernel launches.
_CHUNK_CPU, _CHUNK_GPU = 2**17, 2**22


def class_loss(
    logits: Sequence[Tensor],
    targets: Targets,
    scores: Tensor,
    cls_loss_type: str,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Sum of a classification loss over all levels, images, cells and classes.

    Memory: bounded temporaries, and the gradient in backward. Computes in float32, for float64
    logits in float64.

    Args:
        logits: (N, K, Hi, Wi) for N images and K classes on each level, in any memory layout.
        targets: the positives and their classes.
        scores: (P,) in [0, 1], what the score of each positive's class is to be, without gradient.
        cls_loss_type: "focal" (arXiv 1708.02002, eq. 5), for scores of 1, whatever is given;
            "quality_focal" (arXiv 2006.04388, section 3); "varifocal" (arXiv 2008.13367,
            section 3).
        alpha: absent classes weigh 1 - alpha, in the focal loss present ones alpha; negative for no
            weights. The quality focal loss has none.
        gamma: focusing exponent, >= 0, in the quality focal loss (its beta) >= 1.

    Returns:
        a scalar, connected to all logits even without positives.
    """
    weight, weight_absent = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    if cls_loss_type == "focal":
        present = _Focal(weight, gamma)
    elif cls_loss_type == "quality_focal":
        present, weight_absent = _QualityFocal(gamma), 1.0
    else:
        present = _Varifocal(weight_absent, gamma)
    dense = [_dense(x) for x in logits]
    by_level = zip(dense, targets.by_level(), strict=True)
    index = [_memory_index(x, *positives) for x, positives in by_level]
    scores = scores.split(targets.per_level)
    return _SparseLoss.apply(weight_absent, gamma, present, index, scores, *dense)


@dataclass(frozen=True)
class _Focal:
    """The term of a present class with logit z, its derivative, and what both are multiplied by."""

    weight: float
    gamma: float

    def term(self, z: Tensor, score: Tensor) -> Tensor:
        return _absent_term(-z, self.gamma)

    def slope(self, z: Tensor, score: Tensor) -> Tensor:
        return -_absent_slope(-z, self.gamma)


@dataclass(frozen=True)
class _QualityFocal:
    """|score - p|^beta times the cross entropy with the score."""

    beta: float
    weight: float = 1.0

    def term(self, z: Tensor, score: Tensor) -> Tensor:
        return (z.sigmoid() - score).abs().pow(self.beta) * _cross_entropy(z, score)

    def slope(self, z: Tensor, score: Tensor) -> Tensor:
        p = z.sigmoid()
        above = p - score  # also the derivative of the cross entropy
        distance = above.abs()
        of_factor = self.beta * distance.pow(self.beta - 1) * above.sign() * p * (1 - p)
        return of_factor * _cross_entropy(z, score) + distance.pow(self.beta) * above


@dataclass(frozen=True)
class _Varifocal:
    """The score times the cross entropy with the score; a score of 0 is that of an absent class."""

    weight_absent: float
    gamma: float
    weight: float = 1.0

    def term(self, z: Tensor, score: Tensor) -> Tensor:
        absent = self.weight_absent * _absent_term(z, self.gamma)
        return torch.where(score > 0, score * _cross_entropy(z, score), absent)

    def slope(self, z: Tensor, score: Tensor) -> Tensor:
        absent = self.weight_absent * _absent_slope(z, self.gamma)
        return torch.where(score > 0, score * (z.sigmoid() - score), absent)


class _SparseLoss(torch.autograd.Function):
    """``index``: on each level, the indices into :func:`_flat` of the present classes."""

    @staticmethod
    def forward(
        ctx,
        weight_absent: float,
        gamma: float,
        present: _Focal | _QualityFocal | _Varifocal,
        index: Sequence[Tensor],
        scores: Sequence[Tensor],
        *logits: Tensor,
    ) -> Tensor:
        ctx.weight_absent, ctx.gamma, ctx.present = weight_absent, gamma, present
        ctx.index, ctx.scores = index, scores
        ctx.save_for_backward(*logits)
        total = 0.0
        for x, indices, score in zip(logits, index, scores, strict=True):
            flat = _flat(x)
            for chunk in flat.split(_chunk_size(x)):
                total = total + weight_absent * _absent_term(_upcast(chunk), gamma).sum()
            z = _upcast(flat[indices])
            correction = present.weight * present.term(z, score)
            total = total + (correction - weight_absent * _absent_term(z, gamma)).sum()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        grads = []
        for x, indices, score in zip(ctx.saved_tensors, ctx.index, ctx.scores, strict=True):
            layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
            grad = torch.empty_like(x, memory_format=layout)
            flat, flat_grad = _flat(x), _flat(grad)
            size = _chunk_size(x)
            for chunk, out in zip(flat.split(size), flat_grad.split(size), strict=True):
                slope = _absent_slope(_upcast(chunk), ctx.gamma)
                out.copy_(slope.mul_(ctx.weight_absent * grad_output))
            slope = ctx.present.slope(_upcast(flat[indices]), score)
            flat_grad[indices] = (slope * (ctx.present.weight * grad_output)).to(grad.dtype)
            grads.append(grad)
        return None, None, None, None, None, *grads


def _absent_term(x: Tensor, gamma: float) -> Tensor:
    """p^gamma * -ln(1 - p) with p = sigmoid(x). The term of a present class is that of -x."""
    return _power_(torch.sigmoid(x), gamma).mul_(_softplus(x))


def _absent_slope(x: Tensor, gamma: float) -> Tensor:
    """Derivative of :func:`_absent_term`: p^gamma * (gamma * (1 - p) * -ln(1 - p) + p)."""
    p = torch.sigmoid(x)
    slope = torch.rsub(p, 1).mul_(_softplus(x)).mul_(gamma).add_(p)
    return slope.mul_(_power_(p, gamma))


def _cross_entropy(z: Tensor, score: Tensor) -> Tensor:
    """-score ln p - (1 - score) ln(1 - p) with p = sigmoid(z): two terms, none negative."""
    return score * _softplus(-z) + (1 - score) * _softplus(z)


def _softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x) = -ln(1 - sigmoid(x)). Above 40 this is x, in float64 too."""
    return F.softplus(x, threshold=40.0)


def _power_(p: Tensor, gamma: float) -> Tensor:
    return p.mul_(p) if gamma == 2 else p.pow_(gamma)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _dense(x: Tensor) -> Tensor:
    """The tensor itself if its memory is one block in NCHW or NHWC order, else a copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _flat(x: Tensor) -> Tensor:
    """(numel,) view in memory order."""
    return x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1).view(-1)


def _memory_index(logits: Tensor, image: Tensor, y: Tensor, x: Tensor, classes: Tensor) -> Tensor:
    """Indices into :func:`_flat` of the logits of the classes of these cells."""
    _, num_classes, height, width = logits.shape
    if logits.is_contiguous():
        return ((image * num_classes + classes) * height + y) * width + x
    return ((image * height + y) * width + x) * num_classes + classes


def _chunk_size(x: Tensor) -> int:
    return _CHUNK_CPU if x.device.type == "cpu" else _CHUNK_GPU
