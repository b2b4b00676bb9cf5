import math

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.fcos import FCOS as DetectronFCOS
from helpers import (
    LEVELS,
    RANGES,
    STRIDES,
    as_dict,
    assign_by_loops,
    box,
    level_shapes,
    make_instances,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fcos_d2.modeling import Levels, LocationAssigner
from fcos_d2.modeling.assignment.candidates import cell_numbers, check_classes, make_targets


def assign(boxes, radius=0.0, shapes=((4, 4),), strides=(8,), ranges=((0, math.inf),)):
    """Assignment of one image, as {(image, level, cell): box}."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return as_dict(LocationAssigner(ranges, radius)(Levels(strides), shapes, [boxes]), shapes)


def test_all_cells_inside_a_box():
    # A 4x4 grid of stride 8 has its locations at 4, 12, 20, 28. The box (8, 8, 24, 24) holds
    # 12 and 20 on both axes: columns and rows 1 and 2, cells 4*1+1, 4*1+2, 4*2+1, 4*2+2.
    assert assign([[8, 8, 24, 24]]) == {(0, 0, c): 0 for c in (5, 6, 9, 10)}


def test_location_on_the_border_is_outside():
    # Locations 12 and 28 lie on the sides of the box (12, 12, 28, 28); only 20 is inside.
    assert assign([[12, 12, 28, 28]]) == {(0, 0, 10): 0}


def test_center_sampling_takes_the_middle():
    # The centre of (0, 0, 32, 32) is 16. With radius 0.75 * 8 = 6 pixels: 12 and 20, not 4 or 28.
    assert assign([[0, 0, 32, 32]], radius=0.75) == {(0, 0, c): 0 for c in (5, 6, 9, 10)}


def test_center_sampling_window_is_open():
    # Centre 16, radius 0.5 * 8 = 4 pixels: |12 - 16| = |20 - 16| = 4 is not less than 4.
    assert assign([[0, 0, 32, 32]], radius=0.5) == {}


def test_smallest_box_wins_an_ambiguous_location():
    # Both boxes hold the location (12, 12), cell 5; the second has 10 * 10 = 100 < 1024 px².
    owners = assign([[0, 0, 32, 32], [7, 7, 17, 17]])
    assert owners[0, 0, 5] == 1
    assert owners[0, 0, 6] == 0


def test_of_equal_areas_the_first_wins():
    # 16 x 8 and 8 x 16 = 128 px² both; they share the location (12, 12).
    assert assign([[8, 8, 24, 16], [8, 8, 16, 24]])[0, 0, 5] == 0
    assert assign([[8, 8, 16, 24], [8, 8, 24, 16]])[0, 0, 5] == 0


def test_areas_are_told_apart_above_float32_integers():
    # Areas of 1.0002e8 and 1e8 px²: beyond 2^24, where 1e8 - area would lose what tells them apart.
    big, bigger = [-5000, -5000, 5000, 5000], [-5001, -5000, 5001, 5000]
    assert set(assign([bigger, big]).values()) == {1}
    assert set(assign([big, bigger]).values()) == {0}


@pytest.mark.parametrize("size, levels", [(126.0, {0}), (128.0, {0, 1}), (130.0, {1})])
def test_range_bounds_are_inclusive(size, levels):
    # At stride 8 and 16 a square of 128 px around the location (8 * 8.5 = 68 = 16 * 4.25) ...
    # has max(ltrb) = 64 exactly at its centre when that is a location of both levels. Strides 8
    # and 8 here, so that both levels have the location (68, 68): cell (8, 8).
    box = [68 - size / 2, 68 - size / 2, 68 + size / 2, 68 + size / 2]
    owners = assign(
        [box], radius=0.1, shapes=((20, 20),) * 2, strides=(8, 8), ranges=((0, 64), (64, 128))
    )
    assert owners == {(0, level, 8 * 20 + 8): 0 for level in levels}


def test_candidates_list_ambiguous_locations_once_a_box():
    boxes = torch.tensor([[0.0, 0, 16, 16], [0, 0, 8, 8], [24, 24, 32, 32]])
    assigner = LocationAssigner([(0, math.inf)], 0)
    candidates = assigner.candidates(Levels((8,)), [(4, 4)], [boxes[:2], boxes[2:]])
    # The first box holds the cells (0, 0), (1, 0), (0, 1), (1, 1), the second (0, 0) too; the
    # third, of the second image, the cell (3, 3), which is number 16 + 15 of the batch.
    columns = (candidates.image, candidates.x, candidates.y, candidates.gt)
    entries = sorted(zip(*(c.tolist() for c in columns), strict=True))
    assert entries == [
        (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 0), (1, 3, 3, 2),
    ]  # fmt: skip
    assert sorted(cell_numbers(candidates, [(4, 4)], 2).tolist()) == [0, 0, 1, 4, 5, 31]


def test_no_boxes_and_boxes_without_area():
    assert assign([]) == {}
    assert assign([[4, 4, 4, 20], [12, 12, 12, 12]]) == {}


def test_empty_images_between_others():
    assigner = LocationAssigner([(0, math.inf)], 0)
    box = torch.tensor([[0.0, 0, 8, 8]])
    boxes = [torch.zeros(0, 4), box, torch.zeros(0, 4), box]
    positives = assigner(Levels((8,)), [(2, 2)], boxes)
    assert as_dict(positives, [(2, 2)]) == {(1, 0, 0): 0, (3, 0, 0): 1}


coordinate = st.one_of(
    st.floats(-300, 900, width=32),
    st.sampled_from([0.0, 64.0, 128.0, 256.0, 20.0, 4.0, -20000.0, 30000.0]),
    st.integers(0, 600).map(float),
)


@settings(max_examples=150)
@given(
    st.lists(st.lists(box(coordinate), max_size=5), min_size=1, max_size=2),
    st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.7]),
    st.sampled_from([(100, 140), (64, 256), (257, 90)]),
    st.sampled_from([0.5, 0.0, 0.25]),
)
def test_equals_the_slow_reference(images, radius, size, offset):
    shapes = level_shapes(*size)
    boxes = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in images]
    # A second copy of each box makes ties.
    boxes = [torch.cat([b, b.flip(0)]) for b in boxes]
    levels = Levels(tuple(STRIDES), offset)
    positives = LocationAssigner(RANGES, radius)(levels, shapes, boxes)
    expected = assign_by_loops(shapes, STRIDES, RANGES, radius, boxes, offset)
    assert as_dict(positives, shapes) == expected
    assert positives.level.tolist() == sorted(positives.level.tolist())


@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_equals_the_slow_reference_on_realistic_boxes(radius):
    shapes = level_shapes(320, 480)
    sizes = torch.exp(torch.rand(2, 25, 2) * 5 + 1)  # 3 to 400 pixels
    centers = torch.rand(2, 25, 2) * torch.tensor([480.0, 320.0])
    boxes = list(torch.cat([centers - sizes / 2, centers + sizes / 2], dim=2))
    positives = LocationAssigner(RANGES, radius)(LEVELS, shapes, boxes)
    assert as_dict(positives, shapes) == assign_by_loops(shapes, STRIDES, RANGES, radius, boxes)
    assert len(positives) > 100


def test_equals_detectron2s_fcos():
    # Away from Detectron2's edge cases: fractional coordinates, so that no distance is exactly on
    # a range bound, and areas that differ by much more than 8 px² and stay below 1e8.
    shapes = level_shapes(512, 640)
    sizes = torch.exp(torch.linspace(2.5, 6.1, 40))[:, None] * torch.tensor([1.0, 1.07])
    centers = torch.rand(40, 2) * torch.tensor([640.0, 512.0])
    boxes = torch.cat([centers - sizes / 2, centers + sizes / 2], dim=1)
    classes = torch.arange(40) % 7

    peer = DetectronFCOS.__new__(DetectronFCOS)
    torch.nn.Module.__init__(peer)
    peer.center_sampling_radius, peer.num_classes = 1.5, 7
    generator = DefaultAnchorGenerator(
        sizes=[[s] for s in STRIDES], aspect_ratios=[1.0], strides=STRIDES
    )
    anchors = generator([torch.zeros(1, 1, h, w) for h, w in shapes])
    labels, matched = peer.label_anchors(
        anchors, [make_instances(boxes.tolist(), classes.tolist())]
    )

    positives = LocationAssigner(RANGES, 1.5)(LEVELS, shapes, [boxes])
    cell = cell_numbers(positives, shapes, 1)
    assert sorted(cell.tolist()) == (labels[0] < 7).nonzero()[:, 0].tolist()
    assert torch.equal(labels[0][cell], classes[positives.gt])
    assert torch.equal(matched[0][cell], boxes[positives.gt])


@pytest.mark.parametrize("radius, per_box", [(0.0, 130), (1.5, 40)])
def test_boxes_propose_few_cells_whatever_the_size_of_the_image(radius, per_box):
    # With centre sampling a window is at most 4 x 4 cells, on the two or three levels that a box
    # can be on. Without it, a window under the upper bound of 8 strides is at most 9 x 9 cells,
    # again on two levels, and P7 has 70 cells in all. A location looks at 1000 boxes otherwise.
    shapes = level_shapes(800, 1216)
    sizes = torch.exp(torch.rand(1000, 2) * 4 + 2.5)  # 12 to 665 pixels
    centers = torch.rand(1000, 2) * torch.tensor([1216.0, 800.0])
    boxes = torch.cat([centers - sizes / 2, centers + sizes / 2], dim=1)
    proposals = LocationAssigner(RANGES, radius)._propose(LEVELS, shapes, boxes)
    assert 1000 < len(proposals[0]) <= per_box * 1000
    assert len(proposals[0]) < sum(h * w for h, w in shapes) * 1000 / 100


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"lower must be below upper, got \[64, 32\]"):
        LocationAssigner([(64, 32)], 1.5)
    for ranges in ([(-1, 64)], [(64, 128), (0, 64)], [(0, 64), (0, 32)]):
        with pytest.raises(ValueError, match="are not negative, and go from small to large"):
            LocationAssigner(ranges, 1.5)
    for ranges in ([64, 128], [(0, 64, 128)], [("a", "b")]):
        with pytest.raises(ValueError, match=r"must be \[lower, upper\] for each level"):
            LocationAssigner(ranges, 1.5)
    with pytest.raises(ValueError, match="must be >= 0, got inf"):
        LocationAssigner([(0, 64)], math.inf)
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        LocationAssigner([(0, 64)], -1)
    with pytest.raises(ValueError, match="1 REGRESSION_RANGES for the 2 levels"):
        LocationAssigner([(0, 64)], 1.5)(Levels((8, 16)), [(2, 2), (1, 1)], [torch.zeros(0, 4)])
    boxes = [torch.zeros(0, 4), torch.tensor([[0.0, 0, math.nan, 1]])]
    with pytest.raises(ValueError, match=r"must be finite; not so in .* \[1\]"):
        LocationAssigner([(0, 64)], 1.5)(Levels((8,)), [(2, 2)], boxes)


@pytest.mark.parametrize("wrong, found", [(3, "from 1 to 3"), (-1, "from -1 to 1")])
def test_a_wrong_class_beside_a_right_one_is_found(wrong, found):
    right = make_instances([[0, 0, 9, 9]], [2])
    both = make_instances([[0, 0, 9, 9]] * 2, [1, wrong])
    check_classes([right, make_instances([], [])], 3)
    with pytest.raises(ValueError, match=f"Image number 1 of the batch has classes {found}, but"):
        check_classes([right, both], 3)


def test_targets_are_those_of_the_owners():
    shapes = level_shapes(96, 128)
    instances = [
        make_instances([[5, 6, 60, 50], [20, 10, 90, 60]], [2, 0]),
        make_instances([], []),
        make_instances([[3, 3, 120, 90]], [1]),
    ]
    targets = make_targets(LocationAssigner(RANGES, 1.5), LEVELS, shapes, instances)
    owners = assign_by_loops(shapes, STRIDES, RANGES, 1.5, [x.gt_boxes.tensor for x in instances])
    boxes = torch.cat([x.gt_boxes.tensor for x in instances]).tolist()
    classes = [2, 0, 1]
    expected = {}
    for (image, level, cell), gt in owners.items():
        y, x = divmod(cell, shapes[level][1])
        px, py = (x + 0.5) * STRIDES[level], (y + 0.5) * STRIDES[level]
        x0, y0, x1, y1 = boxes[gt]
        expected[image, level, x, y] = (classes[gt], px - x0, py - y0, x1 - px, y1 - py)
    level = torch.arange(5).repeat_interleave(torch.tensor(targets.per_level))
    columns = (targets.image, level, targets.x, targets.y, targets.classes)
    entries = zip(*(c.tolist() for c in columns), targets.ltrb.tolist(), strict=True)
    assert {(i, lv, x, y): (c, *ltrb) for i, lv, x, y, c, ltrb in entries} == expected
    assert len(targets) == len(expected) > 10


@pytest.mark.gpu
@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_gpu_equals_cpu(radius):
    shapes = level_shapes(320, 480)
    corners = torch.rand(60, 2, 2) * 400
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    assigner = LocationAssigner(RANGES, radius)
    on_cpu = assigner(LEVELS, shapes, [boxes, boxes[:5]])
    on_gpu = assigner(LEVELS, shapes, [boxes.cuda(), boxes[:5].cuda()])
    assert as_dict(on_cpu, shapes) == as_dict(on_gpu, shapes)
