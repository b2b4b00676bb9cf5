"""The report's numbers against Detectron2's evaluator and a recount by hand."""

import copy
import json
import math

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from report_cases import make_results, make_truth
from torch import tensor

from fcos_d2.report import BoxEvaluation

NAMES = {"AP": {}, "AP50": {"iou": 0.5}, "AP75": {"iou": 0.75}}
NAMES |= {f"AP{area[0]}": {"area": area} for area in ("small", "medium", "large")}


@pytest.fixture
def evaluator_of(tmp_path):
    """Detectron2's evaluator of a ground truth."""

    def make(truth):
        (tmp_path / "truth.json").write_text(json.dumps(truth.dataset))
        ids = {c["id"]: i for i, c in enumerate(truth.dataset["categories"])}
        DatasetCatalog.register("report_test", list)
        MetadataCatalog.get("report_test").set(
            json_file=str(tmp_path / "truth.json"),
            thing_classes=[c["name"] for c in truth.dataset["categories"]],
            thing_dataset_id_to_contiguous_id=ids,
        )
        return COCOEvaluator("report_test", distributed=False, output_dir=str(tmp_path))

    return make


def test_average_precision_is_the_evaluators(case, evaluator_of, tmp_path):
    truth, results = case
    evaluator = evaluator_of(truth)
    evaluator.reset()
    for image in truth.dataset["images"]:
        found = [r for r in results if r["image_id"] == image["id"]]
        instances = Instances((image["height"], image["width"]))
        boxes = tensor([r["bbox"] for r in found]).reshape(-1, 4)
        instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        instances.scores = tensor([r["score"] for r in found])
        instances.pred_classes = tensor([r["category_id"] // 10 - 1 for r in found]).long()
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    expected = evaluator.evaluate()["bbox"]
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    ours = BoxEvaluation(truth, results)
    values = {name: ours.average_precision(**of) for name, of in NAMES.items()}
    values |= {
        f"AP-{name}": ours.average_precision(category=category)
        for category, name in ours.class_names.items()
    }
    assert len(values) == 9
    for name, value in values.items():
        other = expected[name]
        assert value is None if math.isnan(other) else value == pytest.approx(other, abs=1e-9), name


def test_curves_without_classes_are_those_of_one_class(case):
    truth, results = case
    ours = BoxEvaluation(truth, results)
    data = copy.deepcopy(truth.dataset)
    data["categories"] = data["categories"][:1]
    # Of equal scores the one of the first class comes first.
    results = sorted(copy.deepcopy(results), key=lambda r: r["category_id"])
    data["annotations"].sort(key=lambda a: a["category_id"])
    for entry in (*data["annotations"], *results):
        entry["category_id"] = 10
    one = make_truth([])
    one.dataset = data
    one.createIndex()
    one = BoxEvaluation(one, results)
    for iou in (0.5, 0.75, 0.9):
        recall, precision = ours.precision_recall(iou)
        np.testing.assert_array_equal(recall, np.linspace(0, 1, 101))
        assert 100 * precision.mean() == pytest.approx(one.average_precision(iou=iou), abs=1e-9)


def matches_by_hand(truth, results, threshold, category):
    """Right detections, detections and boxes, by the rules of COCO, at an IoU of 0.5."""
    right = found = boxes = 0
    for image in truth.imgs:
        of_class = [a for a in truth.imgToAnns[image] if a["category_id"] == category]
        boxes += sum(not a["iscrowd"] for a in of_class)
        free = list(of_class)
        kept = [r for r in results if (r["image_id"], r["category_id"]) == (image, category)]
        for r in sorted(kept, key=lambda r: -r["score"]):
            if r["score"] < threshold:
                continue
            ious = [(iou(r["bbox"], a["bbox"], a["iscrowd"]), a) for a in free]
            plain = [(v, a["id"], a) for v, a in ious if not a["iscrowd"] and v >= 0.5]
            if plain:
                best = max(plain)[2]  # the last of several that overlap alike
                free.remove(best)
                right, found = right + 1, found + 1
            elif not any(a["iscrowd"] and v >= 0.5 for v, a in ious):
                found += 1
    return right, found, boxes


def iou(a, b, crowd):
    a, b = (Boxes(tensor([[x, y, x + w, y + h]]).double()) for x, y, w, h in (a, b))
    value = pairwise_iou(a, b)
    # Of crowds the share of the detection that lies in them.
    return float(value * (a.area() + b.area()) / (1 + value) / a.area() if crowd else value)


def test_score_curves_are_a_recount_at_each_score(case):
    truth, results = case
    ours = BoxEvaluation(truth, results)
    total = np.zeros(3)
    for category in ours.class_names:
        curve = ours.score_curve(category)
        assert curve.boxes == matches_by_hand(truth, results, 0, category)[2]
        assert (np.diff(curve.scores) < 0).all()
        for i, score in enumerate(curve.scores):
            right, found, boxes = matches_by_hand(truth, results, score, category)
            assert curve.precision[i] == pytest.approx(right / found)
            assert curve.recall[i] == pytest.approx(right / boxes if boxes else 0)
            assert curve.f1[i] == pytest.approx(2 * right / (found + boxes))
        total += matches_by_hand(truth, results, 0, category)
    every = ours.score_curve()
    right, found, boxes = total
    assert (every.boxes, every.recall[-1]) == (boxes, pytest.approx(right / boxes))
    assert every.precision[-1] == pytest.approx(right / found)


def test_the_best_threshold_keeps_the_best_detections():
    # F1 after each detection: 2·1/(1+3), 2·2/(2+3) = 0.8, 2·2/(3+3), 2·2/(4+3)
    truth = make_truth([(0, 10, x, 0, 10, 10, False) for x in (0, 20, 40)])
    found = [(0, 0.9), (20, 0.7), (60, 0.5), (80, 0.3)]
    results = make_results([(0, 10, x, 0, 10, 10, score) for x, score in found])
    curve = BoxEvaluation(truth, results).score_curve(10)
    assert curve.f1[curve.best] == pytest.approx(0.8)
    assert curve.threshold == pytest.approx(0.6)  # between 0.7 and 0.5


def test_nothing_detected_and_nothing_annotated():
    truth = make_truth([(0, 10, 0, 0, 10, 10, False)])
    nothing = BoxEvaluation(truth, [])
    assert nothing.average_precision() == 0 and nothing.average_precision(category=20) is None
    assert nothing.score_curve().threshold is None
    found = make_results([(0, 10, 0, 0, 10, 10, 0.5)])
    empty = BoxEvaluation(make_truth([]), found)
    assert empty.average_precision() is None and empty.score_curve().threshold is None
    assert empty.precision_recall(0.5)[1].max() == 0


@pytest.mark.parametrize("other", [(9, 10), (0, 11)])
def test_results_of_another_data_set_are_refused(other):
    results = make_results([(0, 10, 0, 0, 1, 1, 0.5), (*other, 0, 0, 1, 1, 0.5)])
    with pytest.raises(ValueError, match=r"Result 1 is of image .* of another data set"):
        BoxEvaluation(make_truth([]), results)
