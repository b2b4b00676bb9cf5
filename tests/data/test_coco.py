"""COCO files as people make them: each fault is repaired with a warning, or named."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from fcos_d2.config import get_cfg
from fcos_d2.data import load_coco_json, register_custom_datasets
from fcos_d2.data.coco import read_coco, training_file


def make_data(*boxes, **annotation_keys):
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 60, "width": 80}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": 3, "bbox": list(box), "area": 7.0,
             "iscrowd": 0} | annotation_keys
            for i, box in enumerate(boxes or [(1, 2, 30, 40)])
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }  # fmt: skip


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.json"


def read(file, data):
    """What training takes of a file, and whether it is a copy."""
    file.write_text(json.dumps(data))
    taken = Path(training_file(read_coco("a", str(file), "")))
    return json.loads(taken.read_text()), taken != file


def test_a_good_file_is_left_as_it_is(file, caplog):
    data = make_data((1, 2, 30, 40), (0.5, 0, 10, 10))
    assert read(file, data) == (data, False)
    assert not caplog.records


@pytest.mark.parametrize(
    "box, problem",
    [
        ((1, 2, 0, 40), "1 with a box without area"),
        ((1, 2, -5, 40), "1 with a negative width or height"),
        ((1, math.nan, 5, 40), "1 with NaN or infinity"),
        ((1, 2, math.inf, 40), "1 with NaN or infinity"),
    ],
)
def test_bad_boxes_are_left_out_and_named(file, caplog, box, problem):
    data, is_changed = read(file, make_data((1, 2, 3, 4), box))
    assert [a["id"] for a in data["annotations"]] == [1] and is_changed
    (record,) = caplog.records
    assert problem in record.message and "annotation 2 of image 1" in record.message
    assert str(file) in record.message


def test_annotations_of_missing_images_are_left_out_and_named(file, caplog):
    data = make_data((1, 2, 3, 4), (1, 2, 3, 4))
    data["annotations"][1]["image_id"] = 99
    assert len(read(file, data)[0]["annotations"]) == 1
    assert "1 of images that the file does not list (annotation 2 of image 99)" in caplog.text


def test_many_bad_boxes_are_one_short_warning(file, caplog):
    read(file, make_data(*[(1, 1, 0, 0)] * 1000))
    (record,) = caplog.records
    assert "1000 with a box without area" in record.message and len(record.message) < 1000


@pytest.mark.parametrize("key", ["id", "area", "iscrowd"])
def test_what_the_evaluation_needs_is_filled_in(file, key):
    data = make_data((1, 2, 3, 4), (5, 6, 7, 8))
    for annotation in data["annotations"]:
        del annotation[key]
    repaired, is_changed = read(file, data)
    assert is_changed
    expected = {"id": [1, 2], "area": [12, 56], "iscrowd": [0, 0]}[key]
    assert [a[key] for a in repaired["annotations"]] == expected


@pytest.mark.parametrize("ids", [[0, 1], [4, 4]])
def test_ids_that_pycocotools_mistakes_are_numbered_anew(file, ids):
    data = make_data((1, 2, 3, 4), (5, 6, 7, 8))
    for annotation, number in zip(data["annotations"], ids, strict=True):
        annotation["id"] = number
    assert [a["id"] for a in read(file, data)[0]["annotations"]] == [1, 2]


def change(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    if value is None:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("images",), None, "it has no list 'images'"),
        (("categories",), None, "it has no list 'categories'"),
        (("categories",), [], "has no categories"),
        (("images", 0, "width"), None, r"images\[0\] has no width"),
        (("images", 0, "file_name"), None, r"images\[0\] has no file_name"),
        (("categories", 0, "name"), None, r"categories\[0\] has no name"),
        (("annotations", 0, "bbox"), None, r"annotations\[0\] has no bbox"),
        (("annotations", 0, "bbox"), [1, 2, 3], r"annotation 1 has a bbox .*: \[1, 2, 3\]"),
        (("annotations", 0, "bbox"), [1, 2, 3, "4"], "annotation 1 has a bbox that is not"),
        (("annotations", 0, "bbox"), 5, "annotation 1 has a bbox that is not"),
        (("annotations", 0, "bbox"), [1, 2, 3, 10**400], "annotation 1 has a bbox that is not"),
        (("annotations", 0, "image_id"), [1], r"annotations\[0\] has the image_id \[1\]"),
        (("images", 0, "id"), {}, r"images\[0\] has the id \{\}"),
        (("images", 0, "height"), 0, r"images\[0\] has the height 0: it must be in whole pixels"),
        (("images", 0, "width"), "80", r"images\[0\] has the width '80'"),
        (("images", 0, "file_name"), 7, r"images\[0\] has the file_name 7, which is no text"),
        (("categories", 0, "name"), 5, r"categories\[0\] has the name 5, which is no text: put it"),
        (("annotations", 0, "category_id"), 9, r"annotation 1 has category_id 9, .*list: \[3\]"),
        (("annotations", 0), "text", r"annotations\[0\] has no image_id, category_id, bbox"),
        (("images",), [{"id": 1, "file_name": "a", "height": 1, "width": 1}] * 2,
         r"images\[0\] and images\[1\] have the same id 1"),
    ],
)  # fmt: skip
def test_faults_are_errors_that_name_the_entry(file, path, value, message):
    data = make_data()
    change(data, path, value)
    with pytest.raises(ValueError, match=message) as error:
        read(file, data)
    assert str(file) in str(error.value)


def test_a_file_that_is_cut_short(file):
    file.write_text(json.dumps(make_data())[:-20])
    for function in (lambda file: read_coco("a", file, ""), load_coco_json):
        with pytest.raises(ValueError, match=r"a\.json is not a JSON file, or is cut short"):
            function(file)


def test_repaired_file_is_loaded_and_evaluated(file, tmp_path):
    """As a whole: without area, iscrowd and id the evaluation itself would raise a KeyError."""
    data = make_data((10, 10, 30, 40), (5, 5, 0, 0))
    for annotation in data["annotations"]:
        del annotation["area"], annotation["iscrowd"], annotation["id"]
    file.write_text(json.dumps(data))
    before = file.read_text()
    cfg = get_cfg()
    entry = {"FORMAT": "coco", "JSON": str(file), "IMAGES": str(tmp_path)}
    cfg.DATASETS.CUSTOM.repaired = type(cfg)(entry)
    register_custom_datasets(cfg)
    try:
        (record,) = DatasetCatalog.get("repaired")
        assert [a["bbox"] for a in record["annotations"]] == [[10, 10, 30, 40]]
        evaluator = COCOEvaluator("repaired", output_dir=str(tmp_path / "out"))
        evaluator.reset()
        detections = Instances((60, 80))
        detections.pred_boxes = Boxes(np.array([[10.0, 10, 40, 50]]))
        detections.scores = detections.pred_boxes.tensor.new_tensor([0.9])
        detections.pred_classes = detections.scores.long()
        evaluator.process([record], [{"instances": detections}])
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
        assert DatasetCatalog.get("repaired") == [record]  # a second time too
    finally:
        DatasetCatalog.remove("repaired")
        MetadataCatalog.remove("repaired")
    assert file.read_text() == before
