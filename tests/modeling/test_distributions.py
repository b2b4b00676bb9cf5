import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fcos_d2.modeling.distributions import (
    distribution_focal_losses,
    expected_distances,
    logit_of_geometric_mean,
    logit_of_product,
)


@pytest.mark.parametrize("channels_last", [False, True])
def test_expected_distances_side_by_side(channels_last):
    logits = torch.randn(2, 4 * 6, 3, 5)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    expected = expected_distances(logits)
    assert expected.shape == (2, 4, 3, 5)
    for side in range(4):
        of_side = logits[1, 6 * side : 6 * side + 6, 2, 4].tolist()
        weights = [math.exp(x) for x in of_side]
        mean = sum(i * w for i, w in enumerate(weights)) / sum(weights)
        assert expected[1, side, 2, 4].item() == pytest.approx(mean, rel=1e-5)


def test_hand_computed():
    # Three bins of equal probability 1/3 cost ln 3 wherever the target is.
    loss = distribution_focal_losses(torch.zeros(1, 12), torch.tensor([[0, 0.5, 1, 1.7]]))
    assert loss.item() == pytest.approx(math.log(3))
    # Probabilities 1/2, 1/4, 1/4 and the distance 0.25: 3/4 ln 2 + 1/4 ln 4 = 5/4 ln 2. At 1 it is
    # ln 4. At 2, the last bin, and far beyond, the target is 1.9: also ln 4. The mean is
    # (5/4 + 3 * 2) / 4 ln 2.
    logits = torch.tensor([[math.log(2), 0.0, 0.0]]).repeat(1, 4)
    loss = distribution_focal_losses(logits, torch.tensor([[0.25, 1.0, 2.0, 1e9]]))
    assert loss.item() == pytest.approx(29 / 16 * math.log(2))


@settings(max_examples=50)
@given(st.lists(st.floats(0, 40, width=32), min_size=4, max_size=4), st.integers(1, 16))
def test_the_best_distribution_expects_the_distance(distances, last):
    """Its loss is the entropy, and no other logits are better."""
    distances = torch.tensor([distances]).double()
    inside = distances.clamp(max=last - 0.1)
    bins = torch.arange(last + 1.0).double()
    shares = (1 - (inside[..., None] - bins).abs()).clamp(min=0)  # of the two bins beside
    best = shares.clamp(min=1e-12).log().flatten(1)
    loss = distribution_focal_losses(best, distances)
    entropy = -torch.xlogy(shares, shares).sum(dim=2).mean(dim=1)
    torch.testing.assert_close(loss, entropy, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        expected_distances(best[..., None, None])[..., 0, 0], inside, rtol=1e-6, atol=1e-8
    )
    assert distribution_focal_losses(best + torch.randn_like(best), distances) >= loss - 1e-9


def test_gradcheck():
    logits = torch.randn(3, 4 * 5, dtype=torch.float64, requires_grad=True)
    distances = torch.rand(3, 4, dtype=torch.float64) * 6
    assert gradcheck(lambda x: distribution_focal_losses(x, distances), logits)
    maps = torch.randn(2, 4 * 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(expected_distances, maps)


@pytest.mark.parametrize("function, power", [(logit_of_product, 1), (logit_of_geometric_mean, 0.5)])
def test_logit_of_two_probabilities(function, power):
    a, b = torch.randn(2, 1000, dtype=torch.float64) * 4
    expected = torch.logit((a.sigmoid() * b.sigmoid()) ** power)
    torch.testing.assert_close(function(a, b), expected, rtol=1e-6, atol=1e-8)
    a, b = (x[:20].requires_grad_() for x in (a, b))
    assert gradcheck(function, (a, b))
    # Far out, in float32, it stays finite.
    ends = torch.tensor([-500.0, -90.0, 0.0, 90.0, 500.0])
    a, b = (x.clone().requires_grad_() for x in torch.meshgrid(ends, ends, indexing="ij"))
    found = function(a, b)
    found.sum().backward()
    assert found.isfinite().all() and a.grad.isfinite().all() and b.grad.isfinite().all()
    if power == 1:  # with one probability near 1 the other is left
        torch.testing.assert_close(found[-1, :4], ends[:4])
    else:  # e^(-500 / 2), e^(-90 / 2), and 1 / sqrt(2), whose logit is -ln(sqrt(2) - 1)
        expected = torch.tensor([-250, -45, -math.log(math.sqrt(2) - 1)])
        torch.testing.assert_close(found[-1, :3], expected)
        # 1 - p is half of (1 - sigmoid(90)) + (1 - sigmoid(500)), so the logit is 90 + ln 2.
        assert found[-1, 3].item() == pytest.approx(90 + math.log(2))


def test_no_positives_and_huge_logits():
    assert distribution_focal_losses(torch.zeros(0, 12), torch.zeros(0, 4)).shape == (0,)
    logits = torch.tensor([[1e5, -1e5, 0.0]]).repeat(1, 4).requires_grad_()
    loss = distribution_focal_losses(logits, torch.full((1, 4), 1.5))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()
    assert expected_distances(logits.detach()[..., None, None]).flatten().tolist() == [0.0] * 4
