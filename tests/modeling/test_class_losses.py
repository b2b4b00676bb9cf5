import gc

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from torch.autograd import gradcheck

from fcos_d2.modeling import Targets
from fcos_d2.modeling.class_losses import CLASS_LOSSES, class_loss

SHAPES = [(5, 6), (3, 3), (1, 1)]  # cells of each level
NUM_IMAGES, NUM_CLASSES = 2, 4


def make_targets():
    # image, level, y, x, class
    rows = torch.tensor(
        [[0, 0, 1, 1, 1], [0, 0, 1, 2, 3], [1, 0, 4, 5, 0], [1, 1, 1, 1, 2], [0, 2, 0, 0, 3],
         [1, 2, 0, 0, 0]]
    )  # fmt: skip
    image, _, y, x, classes = rows.unbind(dim=1)
    return Targets(image, x, y, classes, torch.ones(len(rows), 4), torch.ones(len(rows)), [3, 1, 2])


def no_targets(num_levels=3):
    none = torch.zeros(0, dtype=torch.int64)
    return Targets(none, none, none, none, torch.zeros(0, 4), torch.zeros(0), [0] * num_levels)


def focal_loss(logits, targets, alpha, gamma):
    return class_loss(logits, targets, targets.scores, "focal", alpha, gamma)


def make_logits(dtype=torch.float64, scale=4.0, channels_last=False):
    logits = [torch.randn(NUM_IMAGES, NUM_CLASSES, *s, dtype=dtype) * scale for s in SHAPES]
    if channels_last:
        logits = [x.to(memory_format=torch.channels_last) for x in logits]
    return [x.requires_grad_() for x in logits]


def dense_loss(logits, targets, alpha, gamma):
    """fvcore's loss on one-hot targets, which it computes in float32."""
    total = 0
    level_of = torch.arange(len(SHAPES)).repeat_interleave(torch.tensor(targets.per_level))
    for level, logits_of_level in enumerate(logits):
        one_hot, here = torch.zeros_like(logits_of_level), level_of == level
        one_hot[targets.image[here], targets.classes[here], targets.y[here], targets.x[here]] = 1
        total = total + sigmoid_focal_loss(logits_of_level, one_hot, alpha, gamma, reduction="sum")
    return total


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.6, 1.5), (-1, 2.0), (0.25, 0.0)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("make", [make_targets, no_targets])
def test_value_and_gradient_equal_fvcores(alpha, gamma, channels_last, make):
    targets = make()
    logits = make_logits(channels_last=channels_last)
    ours = focal_loss(logits, targets, alpha, gamma)
    theirs = dense_loss(logits, targets, alpha, gamma)
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=0)
    our_grads = torch.autograd.grad(3 * ours, logits)
    their_grads = torch.autograd.grad(3 * theirs, logits)
    torch.testing.assert_close(our_grads, their_grads, rtol=1e-4, atol=1e-6)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert all(g.is_contiguous(memory_format=layout) for g in our_grads)


def test_gradcheck():
    targets = make_targets()
    assert gradcheck(
        lambda *logits: focal_loss(logits, targets, 0.25, 2.0),
        make_logits(),
    )


def test_hand_computed():
    # One cell, two classes, the second present, both logits 0: p = 1/2, -ln(1/2) = ln 2.
    # Absent: (1 - 0.25) * 0.5^2 * ln 2; present: 0.25 * 0.5^2 * ln 2; the sum is 0.25 ln 2.
    zero = torch.zeros(1, dtype=torch.int64)
    targets = Targets(zero, zero, zero, zero + 1, torch.ones(1, 4), torch.ones(1), [1])
    loss = focal_loss([torch.zeros(1, 2, 1, 1)], targets, 0.25, 2.0)
    assert loss.item() == pytest.approx(0.25 * 0.693147, rel=1e-5)


def test_any_strides():
    targets = make_targets()
    wide = [torch.randn(NUM_IMAGES, NUM_CLASSES, h, 2 * w).double() for h, w in SHAPES]
    strided = [x[..., ::2].requires_grad_() for x in wide]
    copied = [x.detach().contiguous().requires_grad_() for x in strided]
    ours = focal_loss(strided, targets, 0.25, 2.0)
    theirs = focal_loss(copied, targets, 0.25, 2.0)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, strided), torch.autograd.grad(theirs, copied)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite(dtype):
    targets = make_targets()
    logits = [
        (torch.rand_like(x) * 2 - 1).mul(200).to(dtype).requires_grad_() for x in make_logits()
    ]
    loss = focal_loss(logits, targets, 0.25, 2.0)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    assert all(x.grad.isfinite().all() and x.grad.dtype == dtype for x in logits)


def test_half_precision_logits_are_summed_in_float32():
    targets = make_targets()
    logits = make_logits(torch.bfloat16)
    exact = dense_loss([x.detach().double() for x in logits], targets, 0.25, 2.0)
    ours = focal_loss(logits, targets, 0.25, 2.0)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=0)


def test_backward_twice_through_a_kept_graph():
    targets = make_targets()
    logits = make_logits()
    loss = focal_loss(logits, targets, 0.25, 2.0)
    first = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(loss, logits))


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_memory_beside_the_logits_is_one_gradient(name):
    """Counts bytes that the operators hold at once, through PyTorch's profiler."""
    x = torch.randn(2, 80, 160, 160, requires_grad=True)  # 16 MB
    targets = no_targets(1)
    gc.collect()  # what older tensors free would count, too
    with torch.profiler.profile(profile_memory=True) as profiler:
        class_loss([x], targets, targets.scores, name, 0.25, 2.0).backward()
    in_use = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    size = x.numel() * 4
    assert size <= peak <= 1.25 * size


# ---- Scores between 0 and 1: the quality focal loss and the varifocal loss ----

SOFT = ("quality_focal", "varifocal")


def make_scores(dtype=torch.float64):
    """Also the ends: the score of a predicted box that misses, or equals, the true one."""
    return torch.tensor([0.0, 1.0, 0.37, 0.99, 1e-4, 0.5], dtype=dtype)


def soft_loss_by_definition(logits, targets, scores, name, alpha, gamma):
    """2006.04388 and 2008.13367, section 3, on dense targets, differentiated by autograd."""
    total = 0
    level_of = torch.arange(len(SHAPES)).repeat_interleave(torch.tensor(targets.per_level))
    for level, x in enumerate(logits):
        y, here = torch.zeros_like(x), level_of == level
        place = targets.image[here], targets.classes[here], targets.y[here], targets.x[here]
        y[place] = scores[here].to(x.dtype)
        p = x.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        if name == "quality_focal":
            factor = (y - p).abs() ** gamma
        else:
            factor = torch.where(y > 0, y, (1 - alpha if alpha >= 0 else 1) * p**gamma)
        total = total + (factor * cross_entropy).sum()
    return total


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.6, 1.5), (-1, 1.0), (0.25, 3.0)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_soft_value_and_gradient_by_definition(name, alpha, gamma, channels_last):
    targets, scores = make_targets(), make_scores()
    logits = make_logits(channels_last=channels_last)
    ours = class_loss(logits, targets, scores, name, alpha, gamma)
    expected = soft_loss_by_definition(logits, targets, scores, name, alpha, gamma)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)
    gradients = torch.autograd.grad(3 * ours, logits)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(3 * expected, logits), rtol=1e-8, atol=1e-12
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert all(g.is_contiguous(memory_format=layout) for g in gradients)


@pytest.mark.parametrize("name", SOFT)
def test_soft_gradcheck(name):
    targets, scores = make_targets(), make_scores()
    assert gradcheck(
        lambda *logits: class_loss(logits, targets, scores, name, 0.25, 2.0), make_logits(scale=2.0)
    )


def test_soft_hand_computed():
    # One cell, two classes, the second present with the score 3/4, both logits 0: p = 1/2, both
    # cross entropies are ln 2. Quality focal: (1/2)² ln 2 + (3/4 - 1/2)² ln 2 = 5/16 ln 2.
    # Varifocal: 3/4 (1/2)² ln 2 + 3/4 ln 2 = 15/16 ln 2.
    zero = torch.zeros(1, dtype=torch.int64)
    targets = Targets(zero, zero, zero, zero + 1, torch.ones(1, 4), torch.ones(1), [1])
    for name, expected in (("quality_focal", 5 / 16), ("varifocal", 15 / 16)):
        scores = torch.tensor([0.75])
        loss = class_loss([torch.zeros(1, 2, 1, 1)], targets, scores, name, 0.25, 2.0)
        assert loss.item() == pytest.approx(expected * 0.693147, rel=1e-5)


def test_with_scores_of_1_the_quality_focal_loss_is_the_focal_loss_without_weights():
    targets, logits = make_targets(), make_logits()
    ours = class_loss(logits, targets, targets.scores, "quality_focal", 0.25, 2.0)
    torch.testing.assert_close(ours, focal_loss(logits, targets, -1, 2.0))


@pytest.mark.parametrize("name", SOFT)
def test_a_positive_that_predicts_its_score_learns_nothing_more(name):
    targets, scores = make_targets(), make_scores().clamp(0.01, 0.99)
    logits = [x.detach() for x in make_logits()]
    level_of = torch.arange(len(SHAPES)).repeat_interleave(torch.tensor(targets.per_level))
    for i, level in enumerate(level_of.tolist()):
        place = targets.image[i], targets.classes[i], targets.y[i], targets.x[i]
        logits[level][place] = torch.logit(scores[i])
    logits = [x.requires_grad_() for x in logits]
    loss = class_loss(logits, targets, scores, name, 0.25, 2.0)
    gradients = torch.autograd.grad(loss, logits)
    for i, level in enumerate(level_of.tolist()):
        place = targets.image[i], targets.classes[i], targets.y[i], targets.x[i]
        assert abs(gradients[level][place].item()) < 1e-12


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_soft_losses_of_extreme_logits_stay_finite(name, dtype):
    targets = make_targets()
    logits = [
        (torch.rand_like(x) * 2 - 1).mul(200).to(dtype).requires_grad_() for x in make_logits()
    ]
    for score in (0.0, 0.5, 1.0):
        scores = torch.full((len(targets),), score)
        loss = class_loss(logits, targets, scores, name, 0.25, 2.0)
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, logits))


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_losses_under_autocast_are_those_of_the_same_logits_in_float32(name, dtype):
    targets, scores = make_targets(), make_scores(torch.float32)
    half = make_logits(dtype)
    exact = [x.detach().float().requires_grad_() for x in half]
    with torch.autocast("cpu", torch.bfloat16):
        ours = class_loss(half, targets, scores, name, 0.25, 2.0)
    expected = class_loss(exact, targets, scores, name, 0.25, 2.0)
    assert torch.equal(ours, expected)
    pairs = zip(torch.autograd.grad(ours, half), torch.autograd.grad(expected, exact), strict=True)
    assert all(torch.equal(a, b.to(dtype)) for a, b in pairs)
