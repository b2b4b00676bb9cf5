"""hotcoco's arrays against those of pycocotools, bit by bit."""

import contextlib
import io
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocotools.cocoeval import COCOeval
from report_cases import make_results, make_truth

from fcos_d2.report import BoxEvaluation
from fcos_d2.report.evaluation import CURVE_IOUS, MATCH_IOU
from fcos_d2.report.matching import copy_sides, evaluate

DISC, SQUARE, TRIANGLE = 10, 20, 30
# Areas of 32 and 96 squared, just below, just above, and of nothing.
SIZES = [(32, 32), (16, 64), (96, 96), (32, 31.999), (32, 32.001), (96.001, 96), (7, 9), (0, 5)]
boxes = st.tuples(
    st.integers(0, 3),
    st.sampled_from([DISC, SQUARE]),  # no triangles: a class without boxes
    st.integers(0, 20),
    st.integers(0, 20),
    st.sampled_from(SIZES),
    st.booleans(),
)
moves = st.integers(-3, 3) | st.floats(-3, 3)
detections = st.tuples(
    st.sampled_from([DISC, SQUARE, TRIANGLE]) | st.none(),  # None: that of the box
    st.tuples(moves, moves, moves, moves),
    st.sampled_from([0.1, 0.5, 0.50001, 0.9]),  # ties
)


@st.composite
def cases(draw):
    """Each box with the detections near it; some images have none, one may have more than 100."""
    truth, found = [], []
    for image, category, x, y, size, crowd in draw(st.lists(boxes, min_size=1, max_size=12)):
        truth.append((image, category, x, y, *size, crowd))
        repeats = draw(st.sampled_from([1, 1, 1, 60]))
        for of_class, move, score in repeats * draw(st.lists(detections, max_size=4)):
            near = np.maximum(np.add((x, y, *size), move), 0).tolist()
            found.append((image, of_class or category, *near, score))
    assume(found)
    random = draw(st.randoms(use_true_random=False))
    random.shuffle(truth)
    random.shuffle(found)
    return make_truth(truth, images=5), make_results(found)


def pycocotools_of(truth, detections, **params):
    evaluation = COCOeval(truth, detections, "bbox")
    vars(evaluation.params).update(params)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def assert_same_matches(ours, theirs):
    """``theirs``: results of images, in the order of the images."""
    joined = {
        "detections": [x["dtIds"] for x in theirs],
        "scores": [x["dtScores"] for x in theirs],
        "right": [x["dtMatches"][0] != 0 for x in theirs],
        "detection_ignored": [x["dtIgnore"][0] for x in theirs],
        "boxes": [x["gtIds"] for x in theirs],
        "found_by": [x["gtMatches"][0] for x in theirs],
        "box_ignored": [x["gtIgnore"] for x in theirs],
    }
    for name, values in joined.items():
        expected = np.concatenate([np.zeros(0), *values])
        np.testing.assert_array_equal(getattr(ours, name), expected, err_msg=name)


@settings(max_examples=60)
@given(cases())
def test_everything_is_pycocotools(case):
    truth, results = case
    ours = BoxEvaluation(truth, results)
    theirs = pycocotools_of(truth, ours.detections)
    assert_precisions_are_equal(ours, theirs)
    images = len(theirs.params.imgIds)
    for number, category in enumerate(theirs.params.catIds):
        # The list goes class by class, area by area, image by image.
        of_class = theirs.evalImgs[4 * number * images :][:images]
        assert_same_matches(ours.matches(category), list(filter(None, of_class)))


def assert_precisions_are_equal(ours, theirs):
    for area, name in enumerate(theirs.params.areaRngLbl):
        for iou, precision in zip(theirs.params.iouThrs, theirs.eval["precision"], strict=True):
            for number, category in enumerate(theirs.params.catIds):
                of_class = precision[:, number, area, -1]
                expected = 100 * of_class.mean() if of_class.max() > -1 else None
                assert ours.average_precision(iou, name, category) == expected


@settings(max_examples=60)
@given(cases())
def test_everything_without_classes_is_pycocotools(case):
    truth, results = case
    ours = BoxEvaluation(truth, results)
    most = {"useCats": 0, "iouThrs": np.array(CURVE_IOUS), "maxDets": [100, 10**4]}
    theirs = pycocotools_of(truth, ours.detections, **most)
    for iou, precision in zip(CURVE_IOUS, theirs.eval["precision"], strict=True):
        recalls, ours_of_iou = ours.precision_recall(iou)
        np.testing.assert_array_equal(recalls, theirs.params.recThrs, strict=True)
        np.testing.assert_array_equal(ours_of_iou, precision[:, 0, 0, 0].clip(0))
    images = len(theirs.params.imgIds)
    assert_same_matches(ours.agnostic_matches, list(filter(None, theirs.evalImgs[:images])))


def test_the_arrays_are_equal():
    """Precision, recall and scores, at every number of detections."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 40, (60, 2))
    truth = make_truth([(i % 5, DISC + 10 * (i % 2), *xy, 20, 20, i % 9 == 0)
                        for i, xy in enumerate(corners.tolist())], images=6)  # fmt: skip
    found = [(i % 5, DISC + 10 * (i % 3), *xy, 20, 20, float(rng.integers(9)) / 9)
             for i, xy in enumerate((corners[:, None] + rng.integers(-4, 5, (60, 12, 2)))
                                    .reshape(-1, 2).tolist())]  # fmt: skip
    detections = BoxEvaluation(truth, make_results(found)).detections
    ours, theirs = evaluate(copy_sides(truth, detections)), pycocotools_of(truth, detections)
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(ours.eval[name], theirs.eval[name], err_msg=name)


def test_ids_may_be_names_and_in_any_order(case):
    truth, results = case
    plain = BoxEvaluation(truth, results)
    entries = [*truth.dataset["annotations"], *results]
    for entry in entries:
        entry["image_id"] = f"image {entry['image_id']}"
        entry["category_id"] -= 2**40
    for image in truth.dataset["images"]:
        image["id"] = f"image {image['id']}"
    for category in truth.dataset["categories"]:
        category["id"] -= 2**40
    truth.dataset["images"].reverse()
    truth.dataset["categories"].reverse()
    truth.createIndex()
    other = BoxEvaluation(truth, results)
    assert_same = partial(np.testing.assert_array_equal, strict=True)
    for category in plain.class_names:
        for ours, theirs in zip(
            other.matches(category - 2**40), plain.matches(category), strict=True
        ):
            assert_same(ours, theirs)
    assert other.average_precision() == plain.average_precision()
    assert_same(other.precision_recall(MATCH_IOU)[1], plain.precision_recall(MATCH_IOU)[1])


def test_a_score_that_is_no_number_is_refused():
    truth = make_truth([(0, DISC, 0, 0, 10, 10, False)])
    with pytest.raises(ValueError, match="NaN score"):
        BoxEvaluation(truth, make_results([(0, DISC, 0, 0, 10, 10, float("nan"))]))


def test_boxes_of_unlisted_images_and_classes_are_not_seen(case):
    truth, results = case
    plain = BoxEvaluation(truth, results)
    box = {"bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0}
    truth.dataset["annotations"] += [
        {"id": 1000, "image_id": 99, "category_id": DISC, **box},
        {"id": 1001, "image_id": 0, "category_id": 99, **box},
    ]
    truth.createIndex()
    other = BoxEvaluation(truth, results)
    assert other.average_precision() == plain.average_precision()
    for ours, theirs in zip(other.agnostic_matches, plain.agnostic_matches, strict=True):
        np.testing.assert_array_equal(ours, theirs)
