import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from helpers import LEVELS, STRIDES, as_dict, box, level_shapes, make_input, tiny_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from fcos_d2.modeling import ATSSAssigner, Levels, LocationAssigner
from fcos_d2.modeling.assignment.candidates import Candidates, lowest_cost_wins


def exact_iou(a, b):
    """IoU of two boxes as fractions, rounded once to float32."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (list(map(Fraction, box)) for box in (a, b))
    width = max(min(ax1, bx1) - max(ax0, bx0), Fraction(0))
    height = max(min(ay1, by1) - max(ay0, by0), Fraction(0))
    areas = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0)
    return np.float32(float(width * height / (areas - width * height)))


def assign_by_loops(shapes, strides, boxes_per_image, offset=0.5, top_k=9):
    """Algorithm 1 of 1912.02424, over all cells: {(image, level, cell): index of the box}."""
    best, number = {}, -1
    for image, boxes in enumerate(boxes_per_image):
        for x0, y0, x1, y1 in boxes.tolist():
            number += 1
            near = []  # of all levels: level, cell, IoU, whether inside
            for level, ((height, width), stride) in enumerate(zip(shapes, strides, strict=True)):
                cells = []
                for y in range(height):
                    for x in range(width):
                        px, py = (x + offset) * stride, (y + offset) * stride
                        distance = (px - (x0 + x1) / 2) ** 2 + (py - (y0 + y1) / 2) ** 2
                        cells.append((distance, abs(py - (y0 + y1) / 2), y, x))
                for *_, y, x in sorted(cells)[:top_k]:
                    px, py, half = (x + offset) * stride, (y + offset) * stride, 4 * stride
                    square = (px - half, py - half, px + half, py + half)
                    sides = np.float32([px - x0, py - y0, x1 - px, y1 - py])
                    iou = exact_iou((x0, y0, x1, y1), square)
                    near.append((level, y * width + x, iou, min(sides) > 0))
            ious = [float(iou) for _, _, iou, _ in near]
            mean = math.fsum(ious) / len(ious)
            variance = math.fsum((iou - mean) ** 2 for iou in ious) / max(len(ious) - 1, 1)
            for level, cell, iou, inside in near:
                if inside and iou >= mean + math.sqrt(variance):
                    key = image, level, cell
                    if key not in best or iou > best[key][0]:
                        best[key] = iou, number
    return {key: number for key, (_, number) in best.items()}


def assign(boxes, shapes=((4, 4),), strides=(8,)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return as_dict(ATSSAssigner()(Levels(strides), shapes, [boxes]), shapes)


# The locations of a 4 x 4 grid of stride 8 are 4, 12, 20 and 28 on both axes, the squares have
# sides of 64. Four cells are (4, 4) from the centre (16, 16), four (12, 4) and four (4, 12). Of the
# last eight, five count: the four in the rows 1 and 2, which are nearer, and of the others (1, 0),
# in the upper row on the left.
MIDDLE = (1, 4, 5, 6, 7, 8, 9, 10, 11)  # 4 y + x


def test_of_equally_near_locations_the_nearest_row_then_the_upper_then_the_left():
    # Each of the nine squares holds the box: all IoUs are 32² / 64² = 1/4, with a deviation of 0.
    assert assign([[0, 0, 32, 32]]) == {(0, 0, cell): 0 for cell in MIDDLE}


def test_a_box_larger_than_the_image():
    # It holds all squares: all IoUs are 64² / 2032².
    assert assign([[-1000, -1000, 1032, 1032]]) == {(0, 0, cell): 0 for cell in MIDDLE}


def test_the_threshold_by_hand():
    # Levels of one cell, whose locations are (4, 4) and (8, 8), with squares of 64 and 128. The box
    # (0, 0, 48, 48) is cut by the first square at 36: 36² / (64² + 48² - 36²) = 0.2539, and lies in
    # the second: 48² / 128² = 0.1406. Mean 0.1973, deviation 0.1133 / sqrt(2) = 0.0801: both are
    # below 0.2774, and the box is not learnt. With the third level, (16, 16) and 256, the IoUs are
    # 0.2539, 0.1406, 0.0352: mean 0.1432, deviation 0.1094, and the first is above 0.2526.
    one = [(1, 1)]
    assert assign([[0, 0, 48, 48]], one * 2, (8, 16)) == {}
    assert assign([[0, 0, 48, 48]], one * 3, (8, 16, 32)) == {(0, 0, 0): 0}


def test_a_single_location_has_no_deviation():
    assert assign([[0, 0, 8, 8]], [(1, 1)]) == {(0, 0, 0): 0}


def test_a_box_without_a_location_inside_is_not_learnt():
    assert assign([[5, 5, 11, 11], [4, 4, 12, 12], [12, 12, 12, 12], [4, 4, 4, 30]]) == {}


def test_of_several_boxes_the_highest_iou_wins_and_of_equal_ones_the_first():
    # Both lie in all squares: IoUs of 30² / 64² and 20² / 64². Around (16, 16) both have the same
    # nine nearest locations. The locations 4 and 28 are not inside of the smaller one.
    large, small = [1, 1, 31, 31], [6, 6, 26, 26]
    assert set(assign([small]).values()) == {0}
    for boxes, winner in (([small, large], 1), ([large, small], 0), ([large, large], 0)):
        assert assign(boxes) == {(0, 0, cell): winner for cell in MIDDLE}


def test_images_without_boxes():
    assert assign([]) == {}
    none, box = torch.zeros(0, 4), torch.tensor([[0.0, 0, 32, 32]])
    positives = ATSSAssigner()(Levels((8,)), [(4, 4)], [none, box, none, box])
    expected = {(image, 0, cell): gt for image, gt in ((1, 0), (3, 1)) for cell in MIDDLE}
    assert as_dict(positives, [(4, 4)]) == expected


coordinate = st.one_of(
    st.floats(-300, 900, width=32),
    st.sampled_from([0.0, 64.0, 128.0, 20.0, 4.0, -20000.0, 30000.0]),
    st.integers(0, 300).map(float),
)


@settings(max_examples=60)
@given(
    st.lists(st.lists(box(coordinate), max_size=3), min_size=1, max_size=2),
    st.sampled_from([(100, 140), (64, 256), (257, 90), (8, 200)]),
    st.sampled_from([0.5, 0.0, 0.25]),
    st.sampled_from([9, 1, 4, 12]),
)
def test_equals_the_slow_reference(images, size, offset, top_k):
    shapes = level_shapes(*size)
    boxes = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in images]
    boxes = [torch.cat([b, b.flip(0)]) for b in boxes]  # a second copy of each makes ties
    assigner = ATSSAssigner(top_k=top_k)
    positives = assigner(Levels(tuple(STRIDES), offset), shapes, boxes)
    assert as_dict(positives, shapes) == assign_by_loops(shapes, STRIDES, boxes, offset, top_k)
    assert positives.level.tolist() == sorted(positives.level.tolist())


def random_boxes(number, size):
    sizes = torch.exp(torch.rand(number, 2) * 4 + 1.5)  # 4 to 245 pixels
    centers = torch.rand(number, 2) * torch.tensor(size[::-1]).float()
    return torch.cat([centers - sizes / 2, centers + sizes / 2], dim=1)


def test_equals_the_slow_reference_on_realistic_boxes():
    shapes, boxes = level_shapes(200, 320), [random_boxes(15, (200, 320)) for _ in range(2)]
    positives = ATSSAssigner()(LEVELS, shapes, boxes)
    assert as_dict(positives, shapes) == assign_by_loops(shapes, STRIDES, boxes)
    assert len(positives) > 100
    # What they learn is what the other rule says of the same locations and boxes.
    everywhere = LocationAssigner([(0, math.inf)] * 5, 0).candidates(LEVELS, shapes, boxes)
    fields = "image", "level", "x", "y", "gt"
    rows = zip(*(getattr(everywhere, f).tolist() for f in fields), strict=True)
    ltrb = dict(zip(rows, everywhere.ltrb.tolist(), strict=True))
    rows = zip(*(getattr(positives, f).tolist() for f in fields), strict=True)
    assert [ltrb[row] for row in rows] == positives.ltrb.tolist()


def test_the_lowest_cost_wins_whatever_its_sign():
    costs = [-0.5, -0.25, 0.0, 1e-30, 0.25, 3e38, -3e38]
    zero = torch.zeros(2, dtype=torch.int64)
    for a in costs:
        for b in costs:
            pair = torch.tensor([a, b])
            candidates = Candidates(zero, zero, zero, zero, torch.arange(2), torch.ones(2, 4), pair)
            (winner,) = lowest_cost_wins(candidates, [(1, 1)], 1).gt.tolist()
            assert winner == (0 if a <= b else 1), (a, b)


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"ASSIGNMENT must be one of .*'location', 'atss'.* 'max'"):
        build_model(tiny_cfg(ASSIGNMENT="max"))
    with pytest.raises(ValueError, match="top_k must be a whole number >= 1, got 0"):
        ATSSAssigner(top_k=0)
    with pytest.raises(ValueError, match=r"must be finite; not so in .* \[1\]"):
        boxes = [torch.zeros(0, 4), torch.tensor([[0.0, 0, math.nan, 1]])]
        ATSSAssigner()(Levels((8,)), [(2, 2)], boxes)


def test_any_number_of_levels_needs_no_ranges():
    cfg = tiny_cfg(ASSIGNMENT="atss", IN_FEATURES=["p3", "p4", "p5", "p6"], TOP_LEVELS=1)
    losses = build_model(cfg).train()([make_input(), make_input((), ())])
    assert all(x.isfinite() for x in losses.values())


@pytest.mark.gpu
def test_gpu_equals_cpu():
    shapes, boxes = level_shapes(320, 480), random_boxes(60, (320, 480))
    on_cpu = ATSSAssigner()(LEVELS, shapes, [boxes, boxes[:5]])
    on_gpu = ATSSAssigner()(LEVELS, shapes, [boxes.cuda(), boxes[:5].cuda()])
    assert as_dict(on_cpu, shapes) == as_dict(on_gpu, shapes)
