"""The comparison of two lists of detections."""

import numpy as np
import pytest

from fcos_d2.export.check import compare
from fcos_d2.modeling.post_processing import FCOSPostProcessor

# The second box overlaps the first one with an IoU of 60 * 100 / (100 * 100) = 0.6.
BOXES = np.array([[0, 0, 100, 100], [0, 0, 60, 100], [200, 0, 210, 10]], np.float32)
SCORES = np.array([0.9, 0.8, 0.7], np.float32)
CLASSES = np.array([1, 1, 0])
ALL = (BOXES, SCORES, CLASSES)


def take(*indices):
    return tuple(x[list(indices)] for x in ALL)


def post_processor(nms_thresh=0.5, limit=100, clip_boxes="before_nms"):
    return FCOSPostProcessor(
        nms_thresh=nms_thresh, max_detections_per_image=limit, clip_boxes=clip_boxes
    )


def test_the_same_in_any_order():
    assert compare(ALL, ALL, post_processor()) == 0
    assert compare(ALL, take(2, 0, 1), post_processor()) == 0
    assert compare(take(), take(), post_processor()) == 0
    assert compare(ALL, take(), post_processor()) == np.inf


def test_differences_are_relative_above_1():
    boxes = BOXES.copy()
    boxes[2, 0] += 2
    assert compare(ALL, (boxes, SCORES, CLASSES), post_processor()) == pytest.approx(0.01)
    boxes = BOXES.copy()
    boxes[2, 1] += 0.25
    assert compare(ALL, (boxes, SCORES, CLASSES), post_processor()) == pytest.approx(0.25)
    scores = SCORES + np.array([0, 0.125, 0], np.float32)
    assert compare(ALL, (BOXES, scores, CLASSES), post_processor()) == pytest.approx(0.125)


def test_another_class_or_none_is_a_large_difference():
    for other in ((BOXES, SCORES, CLASSES[::-1]), take(0, 1), take(0, 2), take()):
        assert compare(ALL, other, post_processor()) > 0.01
        assert compare(other, ALL, post_processor()) > 0.01


@pytest.mark.parametrize("swapped", [False, True])
def test_what_rounding_decides(swapped):
    def difference(a, b, **options):
        return compare(*((b, a) if swapped else (a, b)), post_processor(**options))

    assert difference(ALL, take(0, 2), nms_thresh=0.6) == 0  # an IoU of just that
    assert difference(ALL, take(0, 2), nms_thresh=0.61) > 0.01
    assert difference(ALL, take(1, 2), nms_thresh=0.61) > 0.01
    # The last places of a full list, and those that clipping may have left out of one.
    a, b = take(0, 1), (BOXES[[0, 2]], np.array([0.9, 0.80001], np.float32), CLASSES[[0, 2]])
    assert difference(a, b, limit=2) == 0
    assert difference(a, b, limit=3, clip_boxes="after_nms") == 0
    assert difference(a, b, limit=3) > 0.01
    assert difference((a[0], a[1] - 0.01, a[2]), a, limit=2) > 0.005  # the others still count
