import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import (
    ALIGNED,
    LEVELS,
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

from fcos_d2.modeling import ATSSAssigner, HeadOutputs, Levels, TaskAlignedAssigner

CLASSES = 3


def assign_by_loops(shapes, strides, boxes, classes, outputs, offset=0.5, top_k=13, radius=8):
    """2108.07755, section 3.2: {(image, level, cell): (box, score)}, and whether that is sure.

    It is not where two different values are so near to each other that rounding decides.
    """
    best, is_sure = {}, True
    found = candidates_by_loops(shapes, strides, boxes, outputs, offset, radius)
    for number, cells in enumerate(found):
        # float32 has no alignment below 1e-45.
        t = [iou**6 / (1 + math.exp(-x[classes[number]])) for _, x, iou, _ in cells]
        is_sure &= not any(0 < value < 1e-37 for value in t)
        order = sorted((-value, i) for i, value in enumerate(t))
        if len(order) > top_k:
            kept, left = -order[top_k - 1][0], -order[top_k][0]
            is_sure &= kept == left or kept > left * (1 + 1e-4)
        for _, i in order[:top_k]:
            place, _, iou, _ = cells[i]
            if t[i] > 0 and place in best:
                is_sure &= iou == best[place][0] or abs(iou - best[place][0]) > 1e-5
            if t[i] > 0 and (place not in best or iou > best[place][0]):
                best[place] = iou, t[i], number
    most = {}
    for iou, t, number in best.values():
        old = most.get(number, (0, 0))
        most[number] = max(old[0], iou), max(old[1], t)
    scores = {place: (n, t / most[n][1] * most[n][0]) for place, (_, t, n) in best.items()}
    return scores, is_sure


def assign(boxes, classes, outputs, shapes=((4, 4),), strides=(8,), offset=0.5, **settings):
    """{(image, level, cell): (box, score)}"""
    boxes = [torch.as_tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes]
    classes = torch.tensor(classes, dtype=torch.int64)
    levels = Levels(tuple(strides), offset)
    positives = TaskAlignedAssigner(**settings)(levels, shapes, boxes, classes, outputs)
    assert (positives.ltrb > 0).all() and positives.level.tolist() == sorted(positives.level)
    owners = as_dict(positives, shapes)  # in the order of the positives
    rows = zip(owners.items(), positives.score.tolist(), strict=True)
    return {place: (number, score) for (place, number), score in rows}


def same(found, expected):
    assert {k: n for k, (n, _) in found.items()} == {k: n for k, (n, _) in expected.items()}
    for place, (_, score) in expected.items():
        assert found[place][1] == pytest.approx(score, rel=1e-3, abs=1e-6), place


def on_one_level(boxes_at, logits=None, side=4):
    """Outputs of one level of stride 8: at each cell logits, and the distances to a box."""
    logits = torch.zeros(CLASSES, side, side) if logits is None else logits
    centers = (torch.arange(side) + 0.5) * 8
    py, px = torch.meshgrid(centers, centers, indexing="ij")
    x0, y0, x1, y1 = boxes_at.unbind(2)
    ltrb = torch.stack([px - x0, py - y0, x1 - px, y1 - py])
    return HeadOutputs([logits[None]], [ltrb[None]], None)


WHOLE = torch.tensor([0.0, 0, 32, 32])


def test_the_best_aligned_locations_and_their_scores_by_hand():
    # All 16 locations are inside. Two predict the box, the others half of it: with a probability of
    # 1/2, t is 1/2 and 1/2 * (1/2)^6. At cell 6 the probability is e^2 / (1 + e^2) = 0.8808.
    at, logits = torch.tensor([0.0, 0, 16, 32]).repeat(4, 4, 1), torch.zeros(CLASSES, 4, 4)
    at[1, 2] = at[2, 3] = WHOLE
    logits[1, 1, 2] = 2
    outputs = on_one_level(at, logits)
    # The scores are t / 0.8808 * 1: 1, 0.5677, and 1 / 64 of it, 0.00887. Of the others the first.
    rest = {(0, 0, cell): (0, 0.00887) for cell in (*range(6), *range(7, 11), 12)}
    expected = {(0, 0, 6): (0, 1.0), (0, 0, 11): (0, 0.5677)} | rest
    same(assign([[WHOLE.tolist()]], [1], outputs), expected)
    best = {(0, 0, 6): (0, 1.0), (0, 0, 11): (0, 0.5677)}
    same(assign([[WHOLE.tolist()]], [1], outputs, top_k=2), best)
    # Of another class all are alike; the largest IoU is the largest score.
    first = {(0, 0, cell): (0, 1 / 64) for cell in (*range(11), 11)} | {(0, 0, 12): (0, 1 / 64)}
    found = assign([[WHOLE.tolist()]], [0], outputs)
    same(found, first | {(0, 0, 6): (0, 1.0), (0, 0, 11): (0, 1.0)})
    # With alpha 0 and beta 1 the scores are the IoUs.
    found = assign([[WHOLE.tolist()]], [1], outputs, alpha=0, beta=1, top_k=3)
    same(found, {(0, 0, 6): (0, 1.0), (0, 0, 11): (0, 1.0), (0, 0, 0): (0, 0.5)})


def test_what_does_not_meet_the_box_is_not_taken():
    at = torch.tensor([100.0, 100, 132, 132]).repeat(4, 4, 1)
    assert assign([[WHOLE.tolist()]], [0], on_one_level(at)) == {}
    at[3, 3] = torch.tensor([0.0, 0, 8, 32])  # a quarter
    same(assign([[WHOLE.tolist()]], [0], on_one_level(at)), {(0, 0, 15): (0, 0.25)})


def test_of_several_boxes_the_highest_iou_wins_and_of_equal_ones_the_first():
    # The upper half wins where it is predicted, though its class is unlikely there.
    upper, at = torch.tensor([0.0, 0, 32, 16]), WHOLE.repeat(4, 4, 1)
    at[0, 1] = upper
    logits = torch.zeros(CLASSES, 4, 4)
    logits[2] = -4
    found = assign([[WHOLE.tolist(), upper.tolist()]], [1, 2], on_one_level(at, logits), top_k=16)
    # Of the cells in the upper half it is the only one: at the others the IoU is 1/2, not 1.
    assert {place: n for place, (n, _) in found.items()} == {
        (0, 0, cell): int(cell == 1) for cell in range(16)
    }
    # The score of the half is over what it has won.
    assert found[0, 0, 1][1] == pytest.approx(1)
    outputs = on_one_level(WHOLE.repeat(4, 4, 1), logits)
    for classes in ([1, 2], [2, 1]):
        found = assign([[WHOLE.tolist()] * 2], classes, outputs)
        assert {n for n, _ in found.values()} == {0} and len(found) == 13


def test_boxes_without_candidates_larger_than_the_image_and_images_without_boxes():
    outputs = on_one_level(WHOLE.repeat(4, 4, 1))
    assert assign([[[5, 5, 11, 11], [4, 4, 4, 4], [4, 4, 12, 12]]], [0, 0, 0], outputs) == {}
    assert assign([[]], [], outputs) == {}
    large = [-1000, -1000, 1032, 1032]
    outputs = on_one_level(torch.tensor(large).float().repeat(4, 4, 1))
    found = assign([[large]], [0], outputs)
    assert found == {(0, 0, cell): (0, 1.0) for cell in range(13)}
    outputs = HeadOutputs(*([torch.cat([x] * 3) for x in maps] for maps in outputs[:2]), None)
    assert set(assign([[], [large], []], [0], outputs)) == {(1, 0, cell) for cell in range(13)}


@settings(max_examples=60)
@given(predictions(CLASSES), st.sampled_from([13, 1, 4]))
def test_equals_the_slow_reference(case, top_k):
    expected, is_sure = assign_by_loops(*case, top_k)
    assume(is_sure)
    shapes, strides, boxes, classes, outputs, offset = case
    same(assign(boxes, classes, outputs, shapes, strides, offset, top_k=top_k), expected)


@pytest.mark.parametrize("noise, radius", [(0.05, 8), (0.3, 3), (0.05, 0)])
def test_equals_the_slow_reference_on_realistic_boxes(noise, radius):
    torch.manual_seed(0)
    shapes = level_shapes(200, 320)
    sizes = torch.exp(torch.rand(2, 15, 2) * 4 + 1.5)  # 4 to 245 pixels
    centers = torch.rand(2, 15, 2) * torch.tensor([320.0, 200.0])
    boxes = list(torch.cat([centers - sizes / 2, centers + sizes / 2], dim=2))
    classes = torch.randint(CLASSES, (30,)).tolist()
    outputs = make_outputs(shapes, STRIDES, boxes, CLASSES, noise=noise)
    found = assign(boxes, classes, outputs, shapes, STRIDES, center_radius=radius)
    args = shapes, STRIDES, boxes, classes, outputs
    expected, is_sure = assign_by_loops(*args, radius=radius or math.inf)
    same(found, expected)
    assert is_sure and len(found) > 60


@pytest.mark.parametrize("keys", [ALIGNED, ALIGNED | {"BOX_ACTIVATION": "distribution"}])
def test_a_detector_learns_with_it(keys):
    model = build_model(tiny_cfg(**keys, LOSS_NORMALIZER="ema_fg")).train()
    for batch in ([make_input(), make_input((), ())], [make_input((), ())]):
        model.zero_grad()
        losses = model(batch)
        assert all(x.isfinite() for x in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_training_begins_as_atss_with_the_losses_of_fcos():
    cfg = tiny_cfg(**ALIGNED)
    cfg.SOLVER.ATSS_ITERS = 3
    model, batch = build_model(cfg).train(), [make_input()]
    # ATSS, a class score of 1 and the focal loss, boxes weighted by centerness: all as FCOS, which
    # has a third branch.
    fcos = build_model(tiny_cfg(ASSIGNMENT="atss")).train()
    fcos.load_state_dict(model.state_dict(), strict=False)
    expected = fcos(batch)

    def at(iteration):
        with EventStorage(iteration):
            return model(batch)

    for iteration in (0, 2):
        for name, loss in at(iteration).items():
            assert loss == expected[name], name
    without = model(batch)  # outside of a training no iteration is known
    assert at(3) == without and without["loss_fcos_cls"] != expected["loss_fcos_cls"]
    model.loss.eval()  # losses of held-out images are those of the rule, all the time
    assert at(0).keys() == model(batch).keys() and at(0) == model(batch)


def test_the_rule_of_a_step():
    rule = TaskAlignedAssigner(atss_iters=5)
    with EventStorage(4) as storage:
        assert type(rule.now(is_training=True)) is ATSSAssigner
        assert rule.now(is_training=False) is rule
        storage.step()
        assert rule.now(is_training=True) is rule
    assert rule.now(is_training=True) is rule
    assert ATSSAssigner.now(first := ATSSAssigner(), True) is first
    cfg = SimpleNamespace(SOLVER=SimpleNamespace(ATSS_ITERS=7))
    assert TaskAlignedAssigner.from_config(cfg) == {"atss_iters": 7}


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="'task_aligned', top_k must be a whole number >= 1"):
        TaskAlignedAssigner(top_k=0)
    with pytest.raises(ValueError, match="'task_aligned' chooses by what a model predicts"):
        TaskAlignedAssigner()(LEVELS, level_shapes(8, 8), [torch.zeros(1, 4)])
    need_each_other = r"ASSIGNMENT 'task_aligned' and BOX_LOSS_WEIGHTING 'alignment' need each .*"
    with pytest.raises(ValueError, match=f"{need_each_other}'quality': set both"):
        build_model(tiny_cfg(ASSIGNMENT="task_aligned"))
    with pytest.raises(ValueError, match=f"{need_each_other} ASSIGNMENT is another: set both"):
        build_model(tiny_cfg(**ALIGNED | {"ASSIGNMENT": "atss"}))
    with pytest.raises(ValueError, match=r"'alignment' weights .* QUALITY is 'none'"):
        build_model(
            tiny_cfg(ASSIGNMENT="task_aligned", QUALITY="none", BOX_LOSS_WEIGHTING="alignment")
        )
    cfg = tiny_cfg(**ALIGNED)
    cfg.SOLVER.ACCUMULATE = 2
    with pytest.raises(ValueError, match=r"ACCUMULATE 2 .* MODEL\.FCOS\.ASSIGNMENT 'task_aligned'"):
        build_model(cfg)
    cfg = tiny_cfg(ASSIGNMENT="simota")
    cfg.SOLVER.ATSS_ITERS = 10
    with pytest.raises(ValueError, match=r"ATSS_ITERS 10 is for .* ASSIGNMENT is 'simota'"):
        build_model(cfg)


@pytest.mark.gpu
def test_gpu_equals_cpu():
    shapes, boxes = level_shapes(320, 480), [torch.rand(40, 2, 2).cumsum(1).flatten(1) * 200]
    classes, outputs = [i % CLASSES for i in range(40)], make_outputs(shapes, STRIDES, boxes)
    on_gpu = HeadOutputs(*([x.cuda() for x in maps] for maps in outputs[:2]), None)
    same(*(assign(boxes, classes, x, shapes, STRIDES) for x in (outputs, on_gpu)))
