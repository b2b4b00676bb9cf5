"""Sigmoid focal loss (arXiv 1708.02002, eq. 5) on dense class logits and a list of positives.

Summed over all cells and classes, it is the loss of an absent class everywhere plus a correction
where a class is present. So it needs no one-hot targets and no permutation of the logits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .assignment.candidates import Targets

# Elements to process at once. On CPU the temporaries then stay in the cache; on GPU this bounds
# their size with few kernel launches.
_CHUNK_CPU, _CHUNK_GPU = 2**17, 2**22


def sparse_sigmoid_focal_loss(
    logits: Sequence[Tensor], targets: Targets, alpha: float, gamma: float
) -> Tensor:
    """Sum of the focal loss over all levels, images, cells and classes.

    Value and gradient equal fvcore's ``sigmoid_focal_loss(..., reduction="sum")`` on one-hot
    targets. Memory: bounded temporaries, and the gradient in backward. Computes in float32, for
    float64 logits in float64.

    Args:
        logits: (N, K, Hi, Wi) for N images and K classes on each level, in any memory layout.
        targets: the positives and their classes.
        alpha: weight of present classes; that of absent ones is 1 - alpha. Negative: no weights.
        gamma: focusing exponent, >= 0.

    Returns:
        a scalar, connected to all logits even without positives.
    """
    dense = [_dense(x) for x in logits]
    by_level = zip(dense, targets.by_level(), strict=True)
    present = [_memory_index(x, *positives) for x, positives in by_level]
    return _SparseFocalLoss.apply(alpha, gamma, present, *dense)


class _SparseFocalLoss(torch.autograd.Function):
    """``present``: on each level, the indices into :func:`_flat` of the present classes."""

    @staticmethod
    def forward(ctx, alpha: float, gamma: float, present: list[Tensor], *logits: Tensor) -> Tensor:
        ctx.weight_present, ctx.weight_absent = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
        ctx.gamma, ctx.present = gamma, present
        ctx.save_for_backward(*logits)
        total = 0.0
        for x, indices in zip(logits, present, strict=True):
            flat = _flat(x)
            for chunk in flat.split(_chunk_size(x)):
                total = total + ctx.weight_absent * _absent_term(_upcast(chunk), gamma).sum()
            z = _upcast(flat[indices])
            correction = ctx.weight_present * _absent_term(-z, gamma)
            total = total + (correction - ctx.weight_absent * _absent_term(z, gamma)).sum()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        grads = []
        for x, indices in zip(ctx.saved_tensors, ctx.present, strict=True):
            layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
            grad = torch.empty_like(x, memory_format=layout)
            flat, flat_grad = _flat(x), _flat(grad)
            size = _chunk_size(x)
            for chunk, out in zip(flat.split(size), flat_grad.split(size), strict=True):
                slope = _absent_slope(_upcast(chunk), ctx.gamma)
                out.copy_(slope.mul_(ctx.weight_absent * grad_output))
            slope = -_absent_slope(-_upcast(flat[indices]), ctx.gamma)
            flat_grad[indices] = (slope * (ctx.weight_present * grad_output)).to(grad.dtype)
            grads.append(grad)
        return None, None, None, *grads


def _absent_term(x: Tensor, gamma: float) -> Tensor:
    """p^gamma * -ln(1 - p) with p = sigmoid(x). The term of a present class is that of -x."""
    return _power_(torch.sigmoid(x), gamma).mul_(_softplus(x))


def _absent_slope(x: Tensor, gamma: float) -> Tensor:
    """Derivative of :func:`_absent_term`: p^gamma * (gamma * (1 - p) * -ln(1 - p) + p)."""
    p = torch.sigmoid(x)
    slope = torch.rsub(p, 1).mul_(_softplus(x)).mul_(gamma).add_(p)
    return slope.mul_(_power_(p, gamma))


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
