import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import EventStorage
from fvcore.nn import giou_loss, sigmoid_focal_loss
from helpers import LEVELS, RANGES, STRIDES, level_shapes, make_instances, tiny_cfg
from torch.autograd import gradcheck

from fcos_d2.modeling import FCOSLoss, HeadOutputs, LocationAssigner
from fcos_d2.modeling.assignment.candidates import Targets, make_targets
from fcos_d2.modeling.box_losses import box_losses, iou_of_ltrb
from fcos_d2.modeling.distributions import Distributions
from fcos_d2.modeling.losses import gather
from fcos_d2.modeling.points import centerness

NUM_CLASSES = 3
SIZE = (64, 96)


def make_case(images=2, objects=True, dtype=torch.float32):
    """Random maps of all levels, and targets of a few boxes."""
    shapes = level_shapes(*SIZE)
    maps = [
        [torch.randn(images, c, *s).to(dtype).requires_grad_() for s in shapes]
        for c in (NUM_CLASSES, 4, 1)
    ]
    maps[1] = [x.detach().float().abs().mul(20).requires_grad_() for x in maps[1]]
    boxes = [[5, 6, 60, 50], [20, 10, 90, 60]] if objects else []
    instances = [make_instances(boxes, [0, 1][: len(boxes)])] * images
    targets = make_targets(LocationAssigner(RANGES, 1.5), LEVELS, shapes, instances)
    return HeadOutputs(*maps), targets


def test_iou_hand_computed():
    # Boxes of 4x4 = 16 and 6x2 = 12 px²; common 4 * 2 = 8, union 16 + 12 - 8 = 20.
    a, b = torch.tensor([[2.0, 2, 2, 2]]), torch.tensor([[3.0, 1, 3, 1]])
    torch.testing.assert_close(iou_of_ltrb(a, b), torch.tensor([0.4]))
    assert box_losses(a, b, "linear_iou").item() == pytest.approx(0.6)
    assert box_losses(a, b, "iou").item() == pytest.approx(-math.log(0.4))
    # The enclosing box is 6x4 = 24: GIoU = 0.4 - (24 - 20) / 24.
    assert box_losses(a, b, "giou").item() == pytest.approx(1 - (0.4 - 4 / 24))


def test_box_losses_equal_fvcores_and_detectron2s():
    predicted, target = torch.rand(50, 4) * 300 + 1, torch.rand(50, 4) * 300 + 1
    location = torch.rand(50, 2) * 1000
    boxes = [
        torch.cat([location - x[:, :2], location + x[:, 2:]], dim=1) for x in (predicted, target)
    ]
    iou = matched_pairwise_iou(*(Boxes(b) for b in boxes))
    torch.testing.assert_close(iou_of_ltrb(predicted, target), iou, rtol=1e-4, atol=1e-5)
    references = {
        "iou": -iou.log(),
        "linear_iou": 1 - iou,
        "giou": giou_loss(*boxes),
        "diou": diou_loss(*boxes),
        "ciou": ciou_loss(*boxes),
    }
    for name, expected in references.items():
        ours = box_losses(predicted, target, name)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4, msg=name)


def ltrb_around(location, boxes):
    return torch.cat([location - boxes[:, :2], boxes[:, 2:] - location], dim=1)


def random_boxes(count):
    corners = torch.rand(count, 2, 2, dtype=torch.float64) * 300
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1) + 1], dim=1)


def test_boxes_that_do_not_contain_the_location():
    torch.manual_seed(0)
    predicted, target = random_boxes(400), random_boxes(400)
    location = torch.rand(400, 2, dtype=torch.float64) * 300
    iou = matched_pairwise_iou(Boxes(predicted), Boxes(target)).double()
    assert 50 < (iou == 0).sum() < 350
    a, b = ltrb_around(location, predicted), ltrb_around(location, target)
    assert (torch.cat([a, b]) < 0).any(dim=1).float().mean() > 0.5
    torch.testing.assert_close(iou_of_ltrb(a, b), iou, rtol=1e-4, atol=1e-6)
    references = {
        # Boxes apart: the smallest normal number of float32 is 2^-126.
        "iou": torch.where(iou > 0, -iou.log(), 126 * math.log(2)),
        "linear_iou": 1 - iou,
        "giou": giou_loss(predicted, target),
        "diou": diou_loss(predicted, target),
        "ciou": ciou_loss(predicted, target),
    }
    for name, expected in references.items():
        found = box_losses(a, b, name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)
        x = a.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(box_losses(x, b, name).sum(), x)
        assert gradient.isfinite().all()
        # Apart, the first two have no slope, and the others draw the boxes together.
        assert (gradient[iou == 0] != 0).any(dim=1).all() == (name not in ("iou", "linear_iou"))


def test_distances_of_boxes_that_do_not_contain_their_location_are_not_clamped():
    outputs, targets = make_case()
    # All boxes reach from 10 pixels right of the location to 50: l = -10, r = 50.
    ltrb = [torch.ones_like(x) * 50 for x in outputs.ltrb]
    for x in ltrb:
        x[:, 0] = -10
    outputs = outputs._replace(ltrb=[x.requires_grad_() for x in ltrb])
    loss = FCOSLoss(box_loss_weighting="none", box_loss_type="linear_iou")
    found = loss(outputs._replace(may_be_outside=True), targets)["loss_fcos_loc"]
    expected = 0.0
    for left, top, right, bottom in targets.ltrb.tolist():
        common = max(min(50, right) + min(-10, left), 0) * (min(50, bottom) + min(50, top))
        union = 40 * 100 + (left + right) * (top + bottom) - common
        expected += (1 - common / union) / len(targets)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert all((x.grad[:, 0] != 0).any() for x in outputs.ltrb[:1])
    assert loss(outputs, targets)["loss_fcos_loc"].item() != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", ["iou", "linear_iou", "giou", "diou", "ciou"])
def test_box_loss_gradients(name):
    predicted = (torch.rand(6, 4).double() * 50 + 1).requires_grad_()
    target = torch.rand(6, 4).double() * 50 + 1
    if name == "ciou":  # its alpha is a constant to the gradient by definition (1911.08287, eq. 11)
        loss = box_losses(predicted, target, name).sum()
        assert torch.autograd.grad(loss, predicted)[0].isfinite().all()
    else:
        assert gradcheck(lambda x: box_losses(x, target, name), predicted)


def levels_of(targets):
    """(P,) level of each positive."""
    return torch.arange(len(LEVELS)).repeat_interleave(torch.tensor(targets.per_level))


def test_gather_reads_the_cells_of_the_positives():
    outputs, targets = make_case()
    columns = (levels_of(targets), targets.image, targets.y, targets.x)
    entries = zip(*(c.tolist() for c in columns), strict=True)
    rows = [outputs.ltrb[level][image, :, y, x] for level, image, y, x in entries]
    torch.testing.assert_close(gather(outputs.ltrb, targets), torch.stack(rows))
    last = [x.to(memory_format=torch.channels_last) for x in outputs.ltrb]
    torch.testing.assert_close(gather(last, targets), torch.stack(rows))


def test_losses_by_definition():
    outputs, targets = make_case()
    losses = FCOSLoss()(outputs, targets)
    count = len(targets)
    weights = centerness(targets.ltrb)
    dense = 0
    for level, x in enumerate(outputs.class_logits):
        target, here = torch.zeros_like(x), levels_of(targets) == level
        target[targets.image[here], targets.classes[here], targets.y[here], targets.x[here]] = 1
        dense += sigmoid_focal_loss(x, target, 0.25, 2.0, reduction="sum")
    assert losses["loss_fcos_cls"].item() == pytest.approx((dense / count).item(), rel=1e-5)
    giou = box_losses(gather(outputs.ltrb, targets), targets.ltrb, "giou")
    assert losses["loss_fcos_loc"].item() == pytest.approx(
        ((giou * weights).sum() / weights.sum()).item(), rel=1e-5
    )
    logits = gather(outputs.quality_logits, targets)[:, 0]
    ctr = F.binary_cross_entropy_with_logits(logits, weights)
    assert losses["loss_fcos_ctr"].item() == pytest.approx(ctr.item(), rel=1e-5)

    unweighted = FCOSLoss(box_loss_weighting="none", box_loss_weight=2.0, cls_loss_weight=3.0)
    scaled = unweighted(outputs, targets)
    assert scaled["loss_fcos_loc"].item() == pytest.approx(2 * giou.mean().item(), rel=1e-5)
    assert scaled["loss_fcos_cls"].item() == pytest.approx(
        3 * losses["loss_fcos_cls"].item(), rel=1e-5
    )
    assert count > 10


def test_iou_as_quality():
    outputs, targets = make_case()
    loss = FCOSLoss(quality="iou", box_loss_weighting="none", quality_loss_weight=0.5)
    losses = loss(outputs, targets)
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_iou"}
    iou = iou_of_ltrb(gather(outputs.ltrb, targets), targets.ltrb).detach()
    logits = gather(outputs.quality_logits, targets)[:, 0]
    expected = 0.5 * F.binary_cross_entropy_with_logits(logits, iou)
    assert losses["loss_fcos_iou"].item() == pytest.approx(expected.item(), rel=1e-5)
    losses["loss_fcos_iou"].backward()
    assert all(x.grad is None for x in outputs.ltrb)  # the target is no path for the gradient


def dense_quality_focal(outputs, targets, scores):
    """2006.04388, section 3, with beta 2, on dense targets."""
    total = 0
    for level, x in enumerate(outputs.class_logits):
        y, here = torch.zeros_like(x), levels_of(targets) == level
        place = targets.image[here], targets.classes[here], targets.y[here], targets.x[here]
        y[place] = scores[here]
        cross_entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        total += ((y - x.sigmoid()) ** 2 * cross_entropy).sum()
    return total


def test_joint_quality_by_definition():
    outputs, targets = make_case()
    outputs = outputs._replace(quality_logits=None)
    keys = {"quality": "joint", "cls_loss_type": "quality_focal", "box_loss_weight": 2.0}
    losses = FCOSLoss(box_loss_weighting="score", **keys)(outputs, targets)
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc"}
    predicted = gather(outputs.ltrb, targets)
    iou = iou_of_ltrb(predicted, targets.ltrb).detach()
    expected = dense_quality_focal(outputs, targets, iou) / len(targets)
    assert losses["loss_fcos_cls"].item() == pytest.approx(expected.item(), rel=1e-5)
    giou = box_losses(predicted, targets.ltrb, "giou")
    weights = gather(outputs.class_logits, targets).sigmoid().amax(dim=1)
    expected = 2 * (giou * weights).sum() / weights.sum()
    assert losses["loss_fcos_loc"].item() == pytest.approx(expected.item(), rel=1e-5)
    # Neither the IoU nor the weights are paths for the gradient.
    losses["loss_fcos_cls"].backward(retain_graph=True)
    assert all(x.grad is None for x in outputs.ltrb)
    before = [x.grad.clone() for x in outputs.class_logits]
    losses["loss_fcos_loc"].backward()
    assert all(torch.equal(x.grad, b) for x, b in zip(outputs.class_logits, before, strict=True))

    unweighted = FCOSLoss(box_loss_weighting="none", **keys)(outputs, targets)
    assert unweighted["loss_fcos_loc"].item() == pytest.approx(2 * giou.mean().item(), rel=1e-5)


def with_distributions(outputs, bins=5):
    """The same maps, with distributions over few bins: true distances are beyond some."""
    shapes = [(len(x), 4 * bins, *x.shape[2:]) for x in outputs.ltrb]
    logits = [torch.randn(shape).requires_grad_() for shape in shapes]
    return outputs._replace(distributions=Distributions(logits, STRIDES))


@pytest.mark.parametrize("weighting", ["quality", "none"])
def test_distribution_loss_by_definition(weighting):
    outputs, targets = make_case()
    outputs, bins = with_distributions(outputs), 5
    loss = FCOSLoss(box_loss_weighting=weighting, distribution_loss_weight=3.0)
    losses = loss(outputs, targets)
    total = weights = beyond = 0.0
    for i, level in enumerate(levels_of(targets).tolist()):
        place = targets.image[i], slice(None), targets.y[i], targets.x[i]
        logits = outputs.distributions.logits[level][place].tolist()
        quality = centerness(targets.ltrb[i : i + 1]).item() if weighting == "quality" else 1.0
        weights += quality
        for side in range(4):
            of_side = logits[side * bins : (side + 1) * bins]
            log_sum = math.log(sum(map(math.exp, of_side)))
            distance = targets.ltrb[i, side].item() / STRIDES[level]
            beyond += distance > bins - 1
            distance = min(distance, bins - 1 - 0.1)
            low = math.floor(distance)
            for bin, share in ((low, low + 1 - distance), (low + 1, distance - low)):
                total += quality / 4 * share * (log_sum - of_side[bin])
    assert beyond > 5 and len(targets) > 10
    assert losses["loss_fcos_dfl"].item() == pytest.approx(3 * total / weights, rel=1e-5)
    others = FCOSLoss(box_loss_weighting=weighting)(outputs._replace(distributions=None), targets)
    assert {k: v for k, v in losses.items() if k != "loss_fcos_dfl"} == others


def test_distribution_loss_without_positives_and_in_evaluation_mode():
    outputs, targets = make_case(objects=False)
    outputs = with_distributions(outputs)
    loss = FCOSLoss()(outputs, targets)["loss_fcos_dfl"]
    assert loss == 0
    loss.backward()
    assert all((x.grad == 0).all() for x in outputs.distributions.logits)

    outputs, targets = make_case()
    outputs = with_distributions(outputs)
    mean, sums = FCOSLoss()(outputs, targets), FCOSLoss().eval()(outputs, targets)
    for name, value in mean.items():
        assert (sums[name] / sums[f"{name}/divisor"]).item() == pytest.approx(value.item())


def test_scores_of_the_assignment_multiply_the_iou():
    outputs, targets = make_case()
    scores = torch.rand(len(targets))
    targets = dataclasses.replace(targets, scores=scores)
    loss = FCOSLoss(quality="joint", cls_loss_type="quality_focal", box_loss_weighting="none")
    loss = loss(outputs._replace(quality_logits=None), targets)["loss_fcos_cls"]
    iou = iou_of_ltrb(gather(outputs.ltrb, targets), targets.ltrb).detach()
    expected = dense_quality_focal(outputs, targets, scores * iou) / len(targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("total", [5.0, 0.3])
def test_aligned_targets_by_definition(total):
    """2108.07755: the scores are targets, the weights of boxes and, summed, divisors.

    What classes are divided by is at least 1, as their negatives are there without any target.
    """
    outputs, targets = make_case()
    scores = torch.rand(len(targets))
    scores *= total / scores.sum()
    outputs = with_distributions(outputs)._replace(quality_logits=None)
    targets = dataclasses.replace(targets, scores=scores, are_aligned=True)
    keys = {"quality": "joint", "cls_loss_type": "quality_focal"}
    losses = FCOSLoss(box_loss_weighting="alignment", **keys)(outputs, targets)
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_dfl"}
    dense = dense_quality_focal(outputs, targets, scores) / max(total, 1)
    assert losses["loss_fcos_cls"].item() == pytest.approx(dense.item(), rel=1e-5)
    giou = box_losses(gather(outputs.ltrb, targets), targets.ltrb, "giou")
    expected = (giou * scores).sum() / total
    assert losses["loss_fcos_loc"].item() == pytest.approx(expected.item(), rel=1e-5)
    # In evaluation mode, sums and what they are divided by.
    sums = FCOSLoss(box_loss_weighting="alignment", **keys).eval()(outputs, targets)
    assert all(sums[f"{name}/divisor"] == pytest.approx(total) for name in losses)


def test_no_quality_branch():
    outputs, targets = make_case()
    for quality in ("none", "computed"):
        loss = FCOSLoss(quality=quality, box_loss_weighting="none")
        losses = loss(outputs._replace(quality_logits=None), targets)
        assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc"}


@pytest.mark.parametrize("name", ["quality_focal", "varifocal"])
@pytest.mark.parametrize("weighting", ["score", "none"])
def test_joint_quality_without_positives(name, weighting):
    outputs, targets = make_case(objects=False)
    loss = FCOSLoss(quality="joint", cls_loss_type=name, box_loss_weighting=weighting)
    losses = loss(outputs._replace(quality_logits=None), targets)
    assert losses["loss_fcos_cls"] > 0 and losses["loss_fcos_loc"] == 0
    sum(losses.values()).backward()
    assert all(x.grad.isfinite().all() for x in (*outputs.class_logits, *outputs.ltrb))


@pytest.mark.parametrize("quality", ["centerness", "iou"])
@pytest.mark.parametrize("name", ["iou", "giou", "ciou"])
def test_without_positives_finite_and_connected(quality, name):
    outputs, targets = make_case(objects=False)
    weighting = "quality" if quality == "centerness" else "none"
    loss = FCOSLoss(quality=quality, box_loss_type=name, box_loss_weighting=weighting)
    losses = loss(outputs, targets)
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    for x in (*outputs.class_logits, *outputs.ltrb, *outputs.quality_logits):
        assert x.grad is not None and x.grad.isfinite().all()
    assert all((x.grad == 0).all() for x in (*outputs.ltrb, *outputs.quality_logits))


@pytest.mark.parametrize("name", ["iou", "linear_iou", "giou", "diou", "ciou"])
@pytest.mark.parametrize("left", [0.0, 3000.0])
def test_predicted_boxes_without_area_are_finite(name, left):
    outputs, targets = make_case()
    ltrb = [torch.zeros_like(x) for x in outputs.ltrb]
    for x in ltrb:
        x[:, 0], x[:, 2] = left, -left
    outputs = outputs._replace(ltrb=[x.requires_grad_() for x in ltrb], may_be_outside=left > 0)
    losses = FCOSLoss(box_loss_type=name)(outputs, targets)
    assert all(v.isfinite() for v in losses.values())
    losses["loss_fcos_loc"].backward()
    assert all(x.grad.isfinite().all() for x in outputs.ltrb)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("objects", [True, False])
def test_half_precision_maps_give_float32_losses(dtype, objects):
    outputs, targets = make_case(objects=objects, dtype=dtype)
    losses = FCOSLoss()(outputs, targets)
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())
    exact = HeadOutputs(*([x.detach().float() for x in m] for m in outputs[:3]))
    exact = FCOSLoss()(exact, targets)
    for key, value in losses.items():
        torch.testing.assert_close(value, exact[key], rtol=1e-5, atol=1e-6)


def test_ema_normalizer_by_hand():
    outputs, targets = make_case()
    loss = FCOSLoss(loss_normalizer="ema_fg")
    count = len(targets)
    plain = FCOSLoss()(outputs, targets)
    first = loss(outputs, targets)
    assert loss.state_dict()["ema_num_positives"].item() == count  # the first step has no average
    for key, value in first.items():
        assert value.item() == pytest.approx(plain[key].item(), rel=1e-5)
    few_outputs, few = make_case(images=1)
    second, plain = loss(few_outputs, few), FCOSLoss()(few_outputs, few)
    ema = 0.9 * count + 0.1 * len(few)  # momentum 0.9
    assert loss.ema_num_positives.item() == pytest.approx(ema)
    for key in ("loss_fcos_cls", "loss_fcos_ctr"):
        expected = plain[key] * len(few) / ema
        assert second[key].item() == pytest.approx(expected.item(), rel=1e-5)
    assert second["loss_fcos_loc"].item() == pytest.approx(plain["loss_fcos_loc"].item())
    sum(first.values()).backward()  # not disturbed by the buffer having moved on

    assert "ema_num_positives" not in FCOSLoss().state_dict()


def test_logged_centerness_loss_can_reach_zero():
    outputs, targets = make_case()
    # Logits whose sigmoid is the target: the loss is then its own least value, the entropy.
    perfect = [torch.zeros_like(x) for x in outputs.quality_logits]
    ideal = torch.logit(centerness(targets.ltrb), eps=1e-6)
    for i, level in enumerate(levels_of(targets).tolist()):
        perfect[level][targets.image[i], 0, targets.y[i], targets.x[i]] = ideal[i]
    with EventStorage(0) as storage:
        losses = FCOSLoss()(outputs._replace(quality_logits=perfect), targets)
        above_floor = storage.latest()["fcos/loss_fcos_ctr_above_floor"][0]
    assert losses["loss_fcos_ctr"].item() > 0.3
    assert above_floor == pytest.approx(0, abs=1e-5)


def test_logged_centerness_loss_by_hand():
    # Centerness is sqrt(2/8 * 3/12) = 1/4, that of equal distances 1. With logits of 0 the
    # cross entropy of each is ln 2, whatever the target. The floors are the entropies:
    # -(1/4 ln 1/4 + 3/4 ln 3/4) = 1/2 ln 2 - 3/4 (ln 3 - 2 ln 2) = 2 ln 2 - 3/4 ln 3, and 0.
    # So the loss is above its floor by 2 ln 2 - (2 ln 2 - 3/4 ln 3) = 3/4 ln 3, and with two
    # positives by 3/8 ln 3 = 0.412.
    targets = Targets(
        image=torch.tensor([0, 0]),
        x=torch.tensor([0, 1]),
        y=torch.tensor([0, 0]),
        classes=torch.tensor([0, 1]),
        ltrb=torch.tensor([[2.0, 3, 8, 12], [5, 5, 5, 5]]),
        scores=torch.ones(2),
        per_level=[2],
    )
    outputs = HeadOutputs(*([torch.zeros(1, c, 1, 2)] for c in (NUM_CLASSES, 4, 1)))
    for weight in (1.0, 3.0):  # the weight of the loss is no part of it
        with EventStorage(0) as storage:
            FCOSLoss(quality_loss_weight=weight)(outputs, targets)
            above_floor = storage.latest()["fcos/loss_fcos_ctr_above_floor"][0]
        assert above_floor == pytest.approx(3 / 8 * math.log(3), rel=1e-5)


def test_errors_name_key_and_choices():
    with pytest.raises(ValueError, match=r"BOX_LOSS_TYPE must be one of .*'giou'.* got 'l1'"):
        FCOSLoss(box_loss_type="l1")
    for quality in ("none", "iou"):
        with pytest.raises(ValueError, match="set BOX_LOSS_WEIGHTING 'none'"):
            FCOSLoss(quality=quality)
    with pytest.raises(ValueError, match="'joint': set BOX_LOSS_WEIGHTING 'score' or 'none'"):
        FCOSLoss(quality="joint", cls_loss_type="varifocal")
    with pytest.raises(
        ValueError, match="QUALITY is 'centerness': set QUALITY 'joint', or another"
    ):
        FCOSLoss(box_loss_weighting="score")
    for keys in (
        {"quality": "joint", "box_loss_weighting": "none"},
        {"cls_loss_type": "varifocal"},
    ):
        with pytest.raises(ValueError, match=r"CLS_LOSS_TYPE '.*' and QUALITY '.*' do not go"):
            FCOSLoss(**keys)
    joint = {"quality": "joint", "box_loss_weighting": "none", "cls_loss_type": "quality_focal"}
    with pytest.raises(
        ValueError, match=r"FOCAL_LOSS_GAMMA must be a number from 1 to .* got 0\.5"
    ):
        FCOSLoss(focal_loss_gamma=0.5, **joint)


def test_weights_that_are_predictions_refuse_parts():
    keys = {"quality": "joint", "cls_loss_type": "quality_focal"}
    loss = FCOSLoss(box_loss_weighting="score", **keys)
    message = r"ACCUMULATE 2 .*\.BOX_LOSS_WEIGHTING 'score' .*: set SOLVER\.ACCUMULATE 1, or"
    with pytest.raises(ValueError, match=message):
        loss.normalizers(torch.ones(3, 4), parts=2)
    assert loss.normalizers(torch.ones(3, 4), parts=1).num_positives == 3
    cfg = tiny_cfg(QUALITY="joint", CLS_LOSS_TYPE="quality_focal", BOX_LOSS_WEIGHTING="score")
    build_model(cfg)
    cfg.SOLVER.ACCUMULATE = 2
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


@pytest.mark.parametrize(
    "key, value",
    [
        ("focal_loss_alpha", 1.5),
        ("focal_loss_gamma", -1),
        ("cls_loss_weight", -0.1),
        ("box_loss_weight", math.nan),
        ("quality_loss_weight", math.inf),
        ("quality_loss_weight", "1"),
        ("distribution_loss_weight", -1),
    ],
)
def test_values_are_checked(key, value):
    with pytest.raises(ValueError, match=f"MODEL.FCOS.{key.upper()} must be a number from"):
        FCOSLoss(**{key: value})


def test_in_evaluation_mode_nothing_is_shared_or_moved(monkeypatch):
    """The sums of two parts, over the sums of their divisors, are the losses of the whole."""
    outputs, targets = make_case(images=1)
    twice = HeadOutputs(*([torch.cat([x, x]) for x in maps] for maps in outputs[:3]))
    _, targets_twice = make_case(images=2)
    whole = FCOSLoss()(twice, targets_twice)
    loss = FCOSLoss(loss_normalizer="ema_fg").eval()
    loss.ema_num_positives.fill_(7)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    part = loss(outputs, targets)  # an all-reduce would fail: there is no group of processes
    for name, value in whole.items():
        assert (2 * part[name] / (2 * part[f"{name}/divisor"])).item() == pytest.approx(
            value.item(), rel=1e-5
        )
    assert loss.ema_num_positives.item() == 7
