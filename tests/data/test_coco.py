"""COCO files as people make them: each fault is repaired with a warning, or named."""

import gc
import json
import math
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json as load_with_detectron2
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask

from fcos_d2.config import get_cfg
from fcos_d2.data import coco, load_coco_json, register_custom_datasets
from fcos_d2.data.coco import can_be_evaluated, read_coco, write_repaired


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
    """What the evaluation takes of a file, and whether it is a copy."""
    file.write_text(json.dumps(data))
    found = read_coco("a", str(file), "")
    findings = found.dropped()
    if can_be_evaluated(found, findings):
        return data, False
    return json.loads(Path(write_repaired(found, findings)).read_text()), True


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


@pytest.fixture
def register(tmp_path):
    """Writes a file, and registers it as "repaired"."""
    names = []

    def _register(file, data):
        file.write_text(json.dumps(data))
        cfg = get_cfg()
        entry = {"FORMAT": "coco", "JSON": str(file), "IMAGES": str(tmp_path)}
        cfg.DATASETS.CUSTOM.repaired = type(cfg)(entry)
        register_custom_datasets(cfg)
        names.append("repaired")

    yield _register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def all_kinds_of_annotations():
    """Unsorted, with gaps in the ids, and with keys that nothing reads."""
    code = mask.encode(np.asfortranarray(np.eye(60, 80, dtype=np.uint8)))
    polygon = [1, 1, 9, 1, 9, 9]
    segmentations = [
        [polygon, [1.5, 2, 3, 4.25, 5, 6, 7, 8]],
        [polygon, [1, 2, 3, 4], [*polygon, 5]],  # the second and third are no polygons
        [[1, 2, 3, 4]],
        [],
        None,
        {"counts": [100, 50, 60 * 80 - 150], "size": [60, 80]},
        {"counts": code["counts"].decode(), "size": [60, 80]},
    ]
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": 60, "width": 80, "license": 3}
        for i in (30, 4, 17, 5)
    ]
    annotations = [
        {"id": 100 - i, "image_id": (4, 30, 17)[i % 3], "category_id": (90, 3)[i % 2], "area": 7.0,
         "bbox": [i, 2.5, 10, 11] if i % 4 else [i, 2, 10, 11], "iscrowd": i % 5 // 4, "note": "x"}
        for i in range(20)
    ]  # fmt: skip
    for i, annotation in enumerate(annotations):
        if i % 8:
            annotation["segmentation"] = segmentations[i % 8 - 1]
        if i % 6 < 2:
            annotation["keypoints"] = [[], [3, 4, 2, 0, 0, 0]][i % 6]
    categories = [{"id": 90, "name": "z"}, {"id": 3, "name": "a"}, {"id": 7, "name": "m"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def as_floats(record):
    """What scaling needs; in Detectron2's records whole numbers stay whole."""
    for annotation in record["annotations"]:
        annotation["bbox"] = [float(x) for x in annotation["bbox"]]
        if isinstance(annotation.get("segmentation"), list):
            polygons = annotation["segmentation"]
            annotation["segmentation"] = [np.array(p, dtype=np.float64) for p in polygons]
    return record


@pytest.mark.parametrize("missing", [(), ("area", "id")])
def test_records_are_those_of_detectron2(file, tmp_path, register, missing, caplog):
    data = all_kinds_of_annotations()
    (tmp_path / "whole.json").write_text(json.dumps(data))
    for annotation in data["annotations"]:
        for key in missing:
            del annotation[key]
    register(file, data)
    records = DatasetCatalog.get("repaired")
    assert "left out 3 annotation(s) without a polygon of three corners" in caplog.text
    whole = str(tmp_path / "whole.json")
    expected = load_with_detectron2(whole, str(tmp_path), "coco_of_detectron2")
    assert [r["image_id"] for r in records] == [4, 5, 17, 30]
    np.testing.assert_equal(records, [as_floats(record) for record in expected])
    boxes = [a for record in records for a in record["annotations"]]
    assert all(type(x) is float for a in boxes for x in a["bbox"])
    found, theirs = MetadataCatalog.get("repaired"), MetadataCatalog.get("coco_of_detectron2")
    assert found.thing_classes == theirs.thing_classes == ["a", "m", "z"]
    assert found.thing_dataset_id_to_contiguous_id == theirs.thing_dataset_id_to_contiguous_id
    MetadataCatalog.remove("coco_of_detectron2")


@pytest.mark.parametrize(
    "key, value",
    [
        ("segmentation", [1, 2, 3, 4, 5, 6]),
        ("segmentation", [["a"] * 6]),
        ("segmentation", {"counts": [-1], "size": [60, 80]}),
        ("segmentation", {"size": [60, 80]}),
        ("keypoints", ["a", 1, 2]),
        ("ignore", 1),
    ],
)
def test_what_only_loading_finds_is_named(file, register, key, value):
    register(file, make_data((1, 2, 3, 4), **{key: value}))
    with pytest.raises(
        ValueError, match=r"a\.json: (image 1 has a segm|annotation 1 has 'ignore')"
    ):
        DatasetCatalog.get("repaired")


@pytest.mark.parametrize("content", ["{}", None])
def test_garbage_collection_goes_on_afterwards(file, monkeypatch, content):
    file.write_text(content or json.dumps(make_data()))
    states, load = [], json.load
    monkeypatch.setattr(coco.json, "load", lambda f: states.append(gc.isenabled()) or load(f))
    if content:
        with pytest.raises(ValueError, match="has no list 'images'"):
            read_coco("a", str(file), "")
    else:
        read_coco("a", str(file), "")
    assert states == [False] and gc.isenabled()


def test_repaired_file_is_loaded_and_evaluated(file, tmp_path, register):
    """As a whole: without area, iscrowd and id the evaluation itself would raise a KeyError."""
    data = make_data((10, 10, 30, 40), (5, 5, 0, 0))
    for annotation in data["annotations"]:
        del annotation["area"], annotation["iscrowd"], annotation["id"]
    register(file, data)
    before = file.read_text()
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
    assert file.read_text() == before
