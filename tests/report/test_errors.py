import numpy as np
import pytest
from report_cases import make_results, make_truth

from fcos_d2.report import BoxEvaluation, confusion_matrix, find_errors

DISC, SQUARE, TRIANGLE = 10, 20, 30
TRUTH = [
    (0, DISC, 0, 0, 10, 10, False),
    (0, SQUARE, 20, 0, 10, 10, False),
    (0, TRIANGLE, 40, 0, 10, 10, False),
    (0, DISC, 60, 0, 10, 20, False),
    (1, SQUARE, 0, 0, 40, 40, True),
]
# Boxes of 10 x 10, moved by d: IoU (10 - d) / (10 + d), so 2/3 for 2, 0.25 for 6, 1/19 for 9.
RESULTS = [
    (0, DISC, 0, 0, 10, 10, 0.9),  # right
    (0, DISC, 2, 0, 10, 10, 0.8),  # twice
    (0, TRIANGLE, 22, 0, 10, 10, 0.7),  # wrong class: of the square, which is missed
    (0, TRIANGLE, 46, 0, 10, 10, 0.6),  # poor box: of the triangle, which is missed
    (0, SQUARE, 79, 80, 10, 10, 0.55),  # background
    (0, DISC, 60, 0, 10, 20, 0.2),  # right, but below the threshold: the box is missed
    (1, SQUARE, 5, 5, 10, 10, 0.95),  # in a crowd: neither right nor wrong
    (1, DISC, 5, 5, 10, 10, 0.5),  # no disc there, and crowds are not ground truth: background
]


@pytest.fixture
def evaluation():
    return BoxEvaluation(make_truth(TRUTH), make_results(RESULTS))


def test_each_kind(evaluation):
    errors = find_errors(evaluation, 0.4)
    found = {(e.kind, e.category, e.score, round(e.iou, 3), e.other) for e in errors}
    assert found == {
        ("twice", DISC, 0.8, 0.667, DISC),
        ("wrong class", TRIANGLE, 0.7, 0.667, SQUARE),
        ("poor box", TRIANGLE, 0.6, 0.25, TRIANGLE),
        ("background", SQUARE, 0.55, 0.0, None),
        ("background", DISC, 0.5, 0.0, None),
        ("missed", SQUARE, None, 0.667, TRIANGLE),
        ("missed", TRIANGLE, None, 0.25, TRIANGLE),
        ("missed", DISC, None, 0.0, None),
    }
    assert [e.score for e in errors if e.score] == [0.8, 0.7, 0.6, 0.55, 0.5]
    assert next(e for e in errors if e.kind == "missed").box == (60, 0, 70, 20)  # the largest


def test_confusion_by_hand(evaluation):
    expected = np.zeros((4, 4))
    expected[0, 0] = 1
    expected[0, 3] = 1  # the disc below the threshold
    expected[1, 2] = 1  # the square taken for a triangle
    expected[2, 3] = 1  # the triangle that was found too poorly
    expected[3, 0] = 1  # the disc found twice
    expected[3, 1] = expected[3, 2] = 1  # on background, and the poor box
    # The detections in the crowd count nowhere, of whatever class.
    np.testing.assert_array_equal(confusion_matrix(evaluation, 0.4), expected)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_sums(case, threshold):
    truth, results = case
    evaluation = BoxEvaluation(truth, results)
    matrix = confusion_matrix(evaluation, threshold)
    for number, category in enumerate(evaluation.class_names):
        boxes = [a for a in truth.anns.values() if a["category_id"] == category]
        assert matrix[number].sum() == sum(not a["iscrowd"] for a in boxes)
        found = [r for r in results if r["category_id"] == category and r["score"] >= threshold]
        # Fewer where some lie in crowds.
        assert matrix[:, number].sum() <= len(found)
    assert matrix[-1, -1] == 0

    errors = find_errors(evaluation, threshold)
    missed = sum(error.kind == "missed" for error in errors)
    curve = evaluation.score_curve()
    at = (curve.scores >= threshold).sum() - 1
    if at >= 0:
        right = round(curve.recall[at] * curve.boxes)
        assert missed == curve.boxes - right
        if right:
            assert len(errors) - missed == round(right / curve.precision[at]) - right


@pytest.mark.parametrize("first", [0, 2**60 + 1])
def test_ids_of_boxes_may_be_0_or_large(first):
    truth = make_truth(TRUTH)
    for annotation in truth.dataset["annotations"]:
        annotation["id"] += first - 1
    truth.createIndex()
    moved = BoxEvaluation(truth, make_results(RESULTS))
    plain = BoxEvaluation(make_truth(TRUTH), make_results(RESULTS))
    np.testing.assert_array_equal(confusion_matrix(moved, 0.4), confusion_matrix(plain, 0.4))
    assert find_errors(moved, 0.4) == find_errors(plain, 0.4)


def test_more_than_100_detections_of_an_image():
    # COCO takes 100 of each class.
    found = [(0, (DISC, SQUARE)[i % 2], 60, 60, 10, 10, 1 - i / 1000) for i in range(150)]
    found.append((0, TRIANGLE, 40, 0, 10, 10, 0.5))
    evaluation = BoxEvaluation(make_truth(TRUTH), make_results(found))
    kinds = [error.kind for error in find_errors(evaluation, 0.4)]
    assert sorted(kinds) == ["background"] * 150 + ["missed"] * 3
    matrix = confusion_matrix(evaluation, 0.4)
    assert matrix[-1].tolist() == [75, 75, 0, 0] and matrix[2, 2] == 1
    # The curves are COCO's, of the best 100.
    assert evaluation.precision_recall(0.5)[1].max() == 0


def test_no_detections():
    evaluation = BoxEvaluation(make_truth(TRUTH), [])
    assert [e.kind for e in find_errors(evaluation, 0.5)] == ["missed"] * 4
    np.testing.assert_array_equal(confusion_matrix(evaluation, 0.5).sum(0), [0, 0, 0, 4])
