import math

import pytest
import torch
from detectron2.modeling import build_model
from helpers import (
    GFL,
    LEVELS,
    SIMOTA,
    STRIDES,
    as_dict,
    candidates_by_loops,
    level_shapes,
    make_input,
    make_outputs,
    predictions,
    tiny_cfg,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fcos_d2.modeling import HeadOutputs, Levels, SimOTAAssigner

CLASSES = 3


def cost_of(logits, label, iou, iou_weight=3):
    """-ln p of the class of the box, -ln (1 - p) of the others, and 3 * -ln IoU."""
    terms = [math.log1p(math.exp(-x if k == label else x)) for k, x in enumerate(logits)]
    return math.fsum(terms) - iou_weight * math.log(max(iou, 1e-7))


def assign_by_loops(shapes, strides, boxes, classes, outputs, offset=0.5, top_k=10):
    """2107.08430, section 2.1: {(image, level, cell): index of the box}, and whether that is sure.

    It is not where two different costs, or a sum of IoUs and a whole number, are so near to each
    other that rounding decides.
    """
    best, is_sure = {}, True
    found = candidates_by_loops(shapes, strides, boxes, outputs, offset, radius=2.5)
    for number, cells in enumerate(found):
        ious = sorted((iou for _, _, iou, _ in cells), reverse=True)[:top_k]
        total = math.fsum(ious)
        is_sure &= set(ious) <= {0, 1} or abs(total - round(total)) > 1e-4
        k = max(math.floor(total), 1)
        costs = [(cost_of(x, classes[number], iou), i) for i, (_, x, iou, _) in enumerate(cells)]
        costs.sort()
        if len(costs) > k:
            is_sure &= not 0 < costs[k][0] - costs[k - 1][0] < 1e-4
        for cost, i in costs[:k]:
            place = cells[i][0]
            if place in best:
                is_sure &= not 0 < abs(cost - best[place][0]) < 1e-4
            if place not in best or cost < best[place][0]:
                best[place] = cost, number
    return {place: number for place, (_, number) in best.items()}, is_sure


def assign(boxes, classes, outputs, shapes=((4, 4),), strides=(8,), **settings):
    boxes = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes]
    positives = SimOTAAssigner(**settings)(
        Levels(tuple(strides)), shapes, boxes, torch.tensor(classes, dtype=torch.int64), outputs
    )
    assert (positives.score == 1).all() and (positives.ltrb > 0).all()
    return as_dict(positives, shapes)


def on_one_level(boxes_at, logits=None, side=4, num_classes=CLASSES):
    """Outputs of one level of stride 8: at each cell logits, and the distances to a box."""
    logits = torch.zeros(num_classes, side, side) if logits is None else logits
    centers = (torch.arange(side) + 0.5) * 8
    py, px = torch.meshgrid(centers, centers, indexing="ij")
    x0, y0, x1, y1 = boxes_at.unbind(2)
    ltrb = torch.stack([px - x0, py - y0, x1 - px, y1 - py])
    return HeadOutputs([logits[None]], [ltrb[None]], None)


WHOLE = torch.tensor([0.0, 0, 32, 32])


def test_as_many_locations_as_the_ious_of_the_best_ten_sum_up_to():
    # All 16 locations, at 4, 12, 20 and 28, are inside and less than 20 from the centre (16, 16).
    # Five predict the box, the others its left half: the ten best sum up to 5 + 5 / 2 = 7.5. The
    # five are the cheapest, then those of equal cost in the order of the cells.
    at = torch.tensor([0.0, 0, 16, 32]).repeat(4, 4, 1)
    for cell in (2, 6, 9, 13, 15):
        at[cell // 4, cell % 4] = WHOLE
    expected = {2, 6, 9, 13, 15, 0, 1}
    outputs = on_one_level(at)
    assert assign([[WHOLE.tolist()]], [1], outputs) == {(0, 0, cell): 0 for cell in expected}
    # The best two are whole.
    assert len(assign([[WHOLE.tolist()]], [1], outputs, candidate_topk=2)) == 2
    # The class counts, too: -ln IoU of a half is 0.69, three times 2.08. With a logit of -9 for the
    # box's class the cross entropy is 9 in place of 0.69.
    logits = torch.zeros(CLASSES, 4, 4)
    logits[1, 0, 2] = -9
    expected = {6, 9, 13, 15, 0, 1, 3}
    outputs = on_one_level(at, logits)
    assert assign([[WHOLE.tolist()]], [1], outputs) == {(0, 0, cell): 0 for cell in expected}
    # High logits of other classes cost, too.
    logits[1, 0, 2], logits[2, 0, 2] = 0, 9
    outputs = on_one_level(at, logits)
    assert assign([[WHOLE.tolist()]], [1], outputs) == {(0, 0, cell): 0 for cell in expected}


def test_at_least_one_location_even_if_no_prediction_meets_the_box():
    at = torch.tensor([100.0, 100, 132, 132]).repeat(4, 4, 1)
    assert assign([[WHOLE.tolist()]], [0], on_one_level(at)) == {(0, 0, 0): 0}
    # Predicted boxes with their sides swapped have no area.
    at = torch.tensor([32.0, 32, 0, 0]).repeat(4, 4, 1)
    assert assign([[WHOLE.tolist()]], [0], on_one_level(at)) == {(0, 0, 0): 0}


def test_only_locations_inside_and_around_the_centre():
    # Of 8 x 8 locations from 4 to 60, those less than 20 from (32, 32): 12 < p < 52, 20 to 44.
    image = torch.tensor([0.0, 0, 64, 64])
    outputs = on_one_level(image.repeat(8, 8, 1), side=8)
    owned = assign([[image.tolist()]], [0], outputs, ((8, 8),), candidate_topk=99)
    assert owned == {(0, 0, 8 * y + x): 0 for y in range(2, 6) for x in range(2, 6)}
    # A box larger than the image has those around its centre, one beside it has none.
    for box_, cells in (([-1000, -1000, 1064, 1064], 16), ([-1000, -1000, 16, 16], 0)):
        outputs = on_one_level(torch.tensor(box_).float().repeat(8, 8, 1), side=8)
        assert len(assign([[box_]], [0], outputs, ((8, 8),), candidate_topk=99)) == cells
    # Boxes between locations, as small as a point, and on the sides of cells.
    outputs = on_one_level(WHOLE.repeat(4, 4, 1))
    assert assign([[[5, 5, 11, 11], [4, 4, 4, 4], [4, 4, 12, 12]]], [0, 0, 0], outputs) == {}


def test_of_several_boxes_the_one_of_lowest_cost_wins_and_of_equal_ones_the_first():
    # Both want all 16 locations: k is 10, the 10 first. The class of the second is likelier.
    logits = torch.zeros(CLASSES, 4, 4)
    logits[2] = 1
    outputs = on_one_level(WHOLE.repeat(4, 4, 1), logits)
    twice = [WHOLE.tolist()] * 2
    for classes, winner in (([0, 2], 1), ([2, 0], 0), ([2, 2], 0)):
        assert assign([twice], classes, outputs) == {(0, 0, cell): winner for cell in range(10)}


def test_images_without_boxes():
    assert assign([[]], [], on_one_level(WHOLE.repeat(4, 4, 1))) == {}
    outputs = on_one_level(WHOLE.repeat(4, 4, 1))
    outputs = HeadOutputs(*([torch.cat([x] * 3) for x in maps] for maps in outputs[:2]), None)
    owned = assign([[], [WHOLE.tolist()], []], [0], outputs)
    assert owned == {(1, 0, cell): 0 for cell in range(10)}


@settings(max_examples=60)
@given(predictions(CLASSES), st.sampled_from([10, 1, 4]))
def test_equals_the_slow_reference(case, top_k):
    expected, is_sure = assign_by_loops(*case, top_k)
    assume(is_sure)
    shapes, strides, boxes, classes, outputs, offset = case
    positives = SimOTAAssigner(candidate_topk=top_k)(
        Levels(tuple(strides), offset), shapes, boxes, torch.tensor(classes).long(), outputs
    )
    assert as_dict(positives, shapes) == expected
    assert positives.level.tolist() == sorted(positives.level.tolist())


def test_as_many_boxes_as_locations():
    """Costs are then worked out at all cells at once."""
    shapes, generator = level_shapes(64, 64), torch.Generator().manual_seed(0)
    corners = torch.rand(40, 2, 2, generator=generator) * 20
    boxes = [torch.cat([corners[:, 0], 40 + corners[:, 1]], dim=1)]
    classes = [i % CLASSES for i in range(40)]
    outputs = make_outputs(shapes, STRIDES, boxes, CLASSES, seed=1)
    args = shapes, STRIDES, boxes, classes, outputs
    positives = SimOTAAssigner()(LEVELS, shapes, boxes, torch.tensor(classes), outputs)
    assert (as_dict(positives, shapes), True) == assign_by_loops(*args)
    assert len(positives) > 30


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_equals_the_slow_reference_on_realistic_boxes(noise):
    torch.manual_seed(0)
    shapes = level_shapes(200, 320)
    sizes = torch.exp(torch.rand(2, 15, 2) * 4 + 1.5)  # 4 to 245 pixels
    centers = torch.rand(2, 15, 2) * torch.tensor([320.0, 200.0])
    boxes = list(torch.cat([centers - sizes / 2, centers + sizes / 2], dim=2))
    classes = torch.randint(CLASSES, (30,))
    outputs = make_outputs(shapes, STRIDES, boxes, CLASSES, noise=noise)
    positives = SimOTAAssigner()(LEVELS, shapes, boxes, classes, outputs)
    args = shapes, STRIDES, boxes, classes.tolist(), outputs
    assert (as_dict(positives, shapes), True) == assign_by_loops(*args)
    assert len(positives) > 30


GFL_SIMOTA = GFL | SIMOTA


@pytest.mark.parametrize(
    "keys", [SIMOTA, GFL_SIMOTA, {"QUALITY": "iou", "BOX_LOSS_WEIGHTING": "none"} | SIMOTA]
)
def test_a_detector_learns_with_it(keys):
    model = build_model(tiny_cfg(**keys)).train()
    for batch in ([make_input(), make_input((), ())], [make_input((), ())]):
        model.zero_grad()
        losses = model(batch)
        assert all(x.isfinite() for x in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_half_precision_logits_are_compared_in_float32():
    outputs = make_outputs(level_shapes(64, 96), STRIDES, [torch.tensor([[10.0, 8, 50, 40]])])
    half = outputs._replace(class_logits=[x.bfloat16() for x in outputs.class_logits])
    full = outputs._replace(class_logits=[x.bfloat16().float() for x in outputs.class_logits])
    args = LEVELS, level_shapes(64, 96), [torch.tensor([[10.0, 8, 50, 40]])], torch.tensor([1])
    owned = [as_dict(SimOTAAssigner()(*args, x), level_shapes(64, 96)) for x in (half, full)]
    assert owned[0] == owned[1] and len(owned[0]) > 1


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="'simota', candidate_topk must be a whole number >= 1"):
        SimOTAAssigner(candidate_topk=0)
    with pytest.raises(ValueError, match="'simota', center_radius must be a number from 0"):
        SimOTAAssigner(center_radius=-1)
    with pytest.raises(ValueError, match="'simota' chooses by what a model predicts"):
        SimOTAAssigner()(LEVELS, level_shapes(8, 8), [torch.zeros(1, 4)])
    cfg = tiny_cfg(**SIMOTA)
    cfg.SOLVER.ACCUMULATE = 2
    message = r"ACCUMULATE 2 .* MODEL\.FCOS\.ASSIGNMENT 'simota' .*: set SOLVER\.ACCUMULATE 1, or"
    with pytest.raises(ValueError, match=message):
        build_model(cfg)
    with pytest.raises(ValueError, match=message):
        build_model(tiny_cfg(**SIMOTA)).loss_normalizers([[make_input()]] * 2)


@pytest.mark.gpu
def test_gpu_equals_cpu():
    shapes, boxes = level_shapes(320, 480), [torch.rand(40, 2, 2).cumsum(1).flatten(1) * 200]
    classes, outputs = torch.randint(CLASSES, (40,)), make_outputs(shapes, STRIDES, boxes)
    on_gpu = HeadOutputs(*([x.cuda() for x in maps] for maps in outputs[:2]), None)
    positives = [SimOTAAssigner()(LEVELS, shapes, boxes, classes, x) for x in (outputs, on_gpu)]
    assert as_dict(positives[0], shapes) == as_dict(positives[1], shapes)
