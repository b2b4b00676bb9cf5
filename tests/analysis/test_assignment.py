"""Recall and ambiguous samples against numbers by hand and against slow loops."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from helpers import ALIGNED, LEVELS, RANGES, SIMOTA, STRIDES, assign_by_loops, tiny_cfg
from helpers import level_shapes as expected_level_shapes

from fcos_d2.analysis import AssignmentStatistics, analyze_assignment
from fcos_d2.analysis.assignment import SIZES
from fcos_d2.analysis.assignment_charts import save_assignment_charts
from fcos_d2.analysis.positives import level_shapes, resize_for_test
from fcos_d2.data import load_coco_json, load_dataset


def one_level_cfg(**fcos_keys):
    """Stride 32 alone, every location in a box, images as they are.

    An image of 64 x 64 has four locations: (16, 16), (48, 16), (16, 48), (48, 48).
    """
    keys = {
        "IN_FEATURES": ["p5"],
        "TOP_LEVELS": 0,
        "REGRESSION_RANGES": [[0, math.inf]],
        "CENTER_SAMPLING_RADIUS": 0.0,
    }
    cfg = tiny_cfg(**keys | fcos_keys)
    cfg.MODEL.FPN.IN_FEATURES = ["res5"]
    cfg.INPUT.MIN_SIZE_TEST = 0
    return cfg


def record(boxes, classes=None, size=(64, 64), crowd=()):
    classes = [0] * len(boxes) if classes is None else classes
    return {
        "height": size[0],
        "width": size[1],
        "annotations": [
            {
                "bbox": list(box),
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": c,
                "iscrowd": int(i in crowd),
            }
            for i, (box, c) in enumerate(zip(boxes, classes, strict=True))
        ],
    }


def analyze(cfg, *records, **arguments) -> AssignmentStatistics:
    return analyze_assignment(cfg, records, **arguments)


@pytest.mark.parametrize("second_class, between", [(1, 1), (0, 0)])
def test_two_boxes_by_hand(second_class, between):
    # The first box holds all four locations, the second, smaller one (48, 16) only, and wins it.
    # Both areas are medium: 64 * 64 and 32 * 32, which is where small ends.
    boxes = [(0, 0, 64, 64), (32, 0, 64, 32)]
    statistics = analyze(one_level_cfg(), record(boxes, [0, second_class]))
    (level,) = statistics.levels
    assert (level.name, level.stride) == ("p5", 32)
    assert (level.positives, level.ambiguous, level.ambiguous_classes) == (4, 1, between)
    assert (statistics.best_possible_recall, statistics.ambiguous) == (1.0, 0.25)
    assert statistics.ambiguous_classes == between / 4
    assert [(s.boxes, s.recalled, s.positives) for s in statistics.sizes] == [
        (0, 0, 0), (2, 2, 4), (0, 0, 0),
    ]  # fmt: skip
    assert [s.recall for s in statistics.sizes] == [None, 1.0, None]


def test_a_box_whose_only_location_goes_to_a_smaller_one_is_not_recalled():
    # Both boxes hold (16, 16) alone; 12 * 12 is smaller than 22 * 22. The third holds nothing.
    boxes = [(8, 8, 30, 30), (10, 10, 22, 22), (0, 0, 10, 10)]
    statistics = analyze(one_level_cfg(), record(boxes))
    assert (statistics.boxes, statistics.recalled, statistics.positives) == (3, 1, 1)
    assert statistics.best_possible_recall == 1 / 3
    assert (statistics.ambiguous, statistics.ambiguous_classes) == (1.0, 0.0)


def test_sizes_are_those_of_the_original_image():
    # Four times as large at the test resize: 80 x 80, medium there, and 128 x 128, large there.
    cfg = one_level_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 128
    statistics = analyze(cfg, record([(0, 0, 20, 20), (0, 0, 32, 32)], size=(32, 64)))
    # The first holds the locations at 16 and 48, 2 * 2 of them (80 is on its side); the second
    # those at 16, 48, 80 and 112, 4 * 4 without these 4.
    assert [s.boxes for s in statistics.sizes] == [1, 1, 0]
    assert [s.positives for s in statistics.sizes] == [4, 12, 0]


@pytest.mark.parametrize(
    "key, value, positives",
    [
        # The locations are 16 pixels, half a stride, from the centre: within, strictly, or not.
        ("CENTER_SAMPLING_RADIUS", 0.6, 4),
        ("CENTER_SAMPLING_RADIUS", 0.5, 0),
        # Locations at 0 and 32: of these only (32, 32) is inside.
        ("LOCATION_OFFSET", 0.0, 1),
        # The farthest side is 48 pixels away.
        # The box lies in the squares of 8 strides around the nine nearest locations: all IoUs are
        # the same, and four of the locations are inside.
        ("ASSIGNMENT", "atss", 4),
        ("REGRESSION_RANGES", [[0, 48]], 4),
        ("REGRESSION_RANGES", [[0, 47]], 0),
    ],
)
def test_the_config_decides(key, value, positives):
    statistics = analyze(one_level_cfg(**{key: value}), record([(0, 0, 64, 64)]))
    assert statistics.positives == positives
    assert statistics.recalled == (positives > 0)
    assert statistics.ambiguous == (0.0 if positives else None)
    assert statistics.settings[key.lower()] == value


@pytest.mark.parametrize("keys", [SIMOTA, ALIGNED], ids=lambda keys: keys["ASSIGNMENT"])
def test_rules_that_see_predictions_have_no_statistics(keys):
    name = keys["ASSIGNMENT"]
    message = f"'{name}' chooses by what a model predicts: without a model there are no positives"
    with pytest.raises(ValueError, match=message):
        analyze(one_level_cfg(**keys), record([(0, 0, 64, 64)]))


def test_crowds_are_left_out_unless_asked_for():
    boxes = [(0, 0, 64, 64), (32, 0, 64, 32)]
    image = record(boxes, [0, 1], crowd=[1])
    without = analyze(one_level_cfg(), image)
    assert (without.boxes, without.crowd_left_out, without.ambiguous) == (1, 1, 0.0)
    kept = analyze(one_level_cfg(), image, include_crowd=True)
    assert (kept.boxes, kept.crowd_left_out, kept.ambiguous) == (2, 0, 0.25)


def test_boxes_without_area_are_left_out_and_counted():
    # No width; no height; outside of the image, so nothing is left when it is clipped.
    boxes = [(5, 5, 5, 30), (5, 5, 30, 5), (70, 5, 90, 30), (0, 0, 64, 64)]
    statistics = analyze(one_level_cfg(), record(boxes))
    assert (statistics.boxes, statistics.no_area_left_out, statistics.recalled) == (1, 3, 1)


def test_nothing_to_count(tmp_path):
    statistics = analyze(one_level_cfg(), record([]), {"height": 64, "width": 64})
    assert (statistics.images, statistics.boxes, statistics.positives) == (2, 0, 0)
    numbers = json.loads(json.dumps(statistics.to_dict(), allow_nan=False))
    assert numbers["best_possible_recall"] is None and numbers["ambiguous"] is None
    assert "best possible recall" in statistics.table()
    assert len(save_assignment_charts(statistics, tmp_path)) == 3


@pytest.mark.parametrize("short, longest", [(128, 1333), (800, 1333), (600, 640), (0, 1333)])
@pytest.mark.parametrize("height, width", [(480, 640), (640, 427), (333, 333), (101, 1000)])
def test_resize_is_detectron2s(short, longest, height, width):
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = short, longest
    _, size = resize_for_test(cfg, height, width)
    augmentation = T.ResizeShortestEdge([short, short], longest, "choice")
    pixels = np.zeros((height, width, 3), np.uint8)
    assert size == augmentation.get_transform(pixels).apply_image(pixels).shape[:2]


def test_boxes_and_cells_are_those_of_the_detector(shapes_folder, monkeypatch):
    """Through Detectron2's mapper and a network that runs, against sizes alone."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 100  # not a multiple of 32
    model = build_model(cfg)
    resize = T.ResizeShortestEdge([100, 100], cfg.INPUT.MAX_SIZE_TEST, "choice")
    mapper = DatasetMapper(is_train=True, augmentations=[resize], image_format="BGR")
    calls = []
    candidates = type(model.assigner).candidates

    def spy(self, levels, shapes, boxes):
        calls.append((levels, shapes, boxes))
        return candidates(self, levels, shapes, boxes)

    monkeypatch.setattr(type(model.assigner), "candidates", spy)
    for image in load_coco_json_with_files(shapes_folder)[:6]:
        mapped = mapper(image)
        features = model.backbone(model.preprocess_image([mapped]).tensor)
        analyze(cfg, image)
        levels, shapes, (boxes,) = calls.pop()
        assert list(shapes) == [tuple(features[f].shape[-2:]) for f in model.head_in_features]
        assert levels == model.levels == LEVELS
        assert torch.equal(boxes, mapped["instances"].gt_boxes.tensor)


def load_coco_json_with_files(folder):
    records = load_coco_json(folder / "shapes" / "val.json")
    names = {
        x["id"]: x["file_name"]
        for x in json.loads((folder / "shapes" / "val.json").read_text())["images"]
    }
    for x in records:
        x["file_name"] = str(folder / "shapes" / "val" / names[x["image_id"]])
    return records


@pytest.mark.parametrize("height, width", [(33, 65), (128, 160), (641, 320)])
def test_level_shapes(height, width):
    model = build_model(tiny_cfg())
    features = model.backbone(model.preprocess_image(
        [{"image": torch.zeros(3, height, width)}]).tensor)  # fmt: skip
    assert level_shapes(model.backbone, model.levels, height, width) == tuple(
        tuple(features[f].shape[-2:]) for f in model.head_in_features
    )


def random_records(number, sizes, seed=0):
    rng = np.random.default_rng(seed)
    records = []
    for i in range(number):
        height, width = sizes[i % len(sizes)]
        corner = rng.uniform(0, 0.8, (rng.integers(0, 9), 2)) * (width, height)
        end = corner + rng.uniform(3, 190, corner.shape)
        boxes = np.concatenate([corner, end], axis=1).clip(0, (width, height) * 2)
        boxes = boxes.astype(np.float32).tolist()
        records.append(record(boxes, rng.integers(0, 2, len(boxes)).tolist(), (height, width)))
    return records


def count_by_loops(records, radius):
    """The definitions of the module, location by location."""
    count = Counter()
    for image in records:
        shapes = expected_level_shapes(
            *(math.ceil(image[k] / 32) * 32 for k in ("height", "width"))
        )
        boxes = torch.tensor([a["bbox"] for a in image["annotations"]]).reshape(-1, 4)
        classes = [a["category_id"] for a in image["annotations"]]
        eligible = {}
        for number, box in enumerate(boxes):
            for cell in assign_by_loops(shapes, STRIDES, RANGES, radius, [box[None]]):
                eligible.setdefault(cell, []).append(number)
        owners = assign_by_loops(shapes, STRIDES, RANGES, radius, [boxes])
        assert owners.keys() == eligible.keys()
        recalled = set(owners.values())
        for number, (x0, y0, x1, y1) in enumerate(boxes.double().tolist()):
            area = (x1 - x0) * (y1 - y0)
            name = "small" if area < 1024 else "medium" if area < 9216 else "large"
            count[name, "boxes"] += 1
            count[name, "recalled"] += number in recalled
            count[name, "positives"] += list(owners.values()).count(number)
        for (_, level, _), numbers in eligible.items():
            count[level, "positives"] += 1
            count[level, "ambiguous"] += len(numbers) > 1
            count[level, "ambiguous_classes"] += len({classes[n] for n in numbers}) > 1
    return count


@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_random_boxes_against_loops(radius):
    cfg = tiny_cfg(CENTER_SAMPLING_RADIUS=radius)
    cfg.INPUT.MIN_SIZE_TEST = 0
    records = random_records(12, [(64, 96), (70, 64), (160, 190)])
    expected = count_by_loops(records, radius)
    statistics = analyze(cfg, *records)
    for i, level in enumerate(statistics.levels):
        for key in ("positives", "ambiguous", "ambiguous_classes"):
            assert getattr(level, key) == expected[i, key], (level.name, key)
    for size in statistics.sizes:
        for key in ("boxes", "recalled", "positives"):
            assert getattr(size, key) == expected[size.name, key], (size.name, key)
    # The sample is not trivial: each kind of number occurs, and differs from the next.
    assert 0 < statistics.ambiguous_classes < statistics.ambiguous < 1
    assert 0 < statistics.best_possible_recall < 1
    assert all(expected[name, "boxes"] > 0 for name in SIZES)


def test_a_batch_gives_the_sum_of_its_images():
    cfg = tiny_cfg(CENTER_SAMPLING_RADIUS=0.0)
    # 40 of the first size, more than a batch of 32; the others in between are fewer.
    records = random_records(60, [(64, 96), (64, 96), (64, 96), (64, 96), (96, 64), (48, 48)])
    together = analyze(cfg, *records)
    alone = [analyze(cfg, x) for x in records]
    for group in ("levels", "sizes"):
        for i, part in enumerate(getattr(together, group)):
            for key, value in vars(part).items():
                if key not in ("name", "stride", "recall"):
                    assert value == sum(getattr(getattr(x, group)[i], key) for x in alone)
    assert together.images == 60
    assert together.boxes == sum(len(x["annotations"]) for x in records)


def test_only_fcos():
    cfg = tiny_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    with pytest.raises(ValueError, match="must be 'FCOS', got 'RetinaNet'"):
        analyze(cfg, record([]))


def test_record_without_size():
    with pytest.raises(ValueError, match=r"image 'a\.jpg' has no height and width"):
        analyze(tiny_cfg(), {"file_name": "a.jpg", "annotations": []})


def test_unknown_dataset():
    cfg = tiny_cfg()
    cfg.DATASETS.CUSTOM = type(cfg)()
    with pytest.raises(ValueError, match=r"No data set 'nowhere'.*'coco_2017_val'"):
        load_dataset(cfg, "nowhere")


IMAGE = {"id": 1, "height": 30, "width": 40}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not a JSON file"),
        ([1], "is not a COCO annotation file: it has no list 'images'"),
        ({"images": []}, "it has no list 'annotations'"),
        ({"images": [{"id": 1}], "annotations": []}, r"images\[0\] has no height, width"),
        ({"images": [IMAGE], "annotations": [{"image_id": 1, "category_id": 1}]},
         r"annotations\[0\] has no bbox"),
    ],
)  # fmt: skip
def test_what_is_not_coco_is_said(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_coco_json(file)


def test_annotations_without_image_are_left_out_with_a_warning(tmp_path, caplog):
    annotations = [{"image_id": i, "category_id": 7, "bbox": [1, 2, 30, 20]} for i in (1, 2)]
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"images": [IMAGE], "annotations": annotations}))
    (image,) = load_coco_json(file)
    assert [a["category_id"] for a in image["annotations"]] == [7]
    assert "1 of images that the file does not list (annotations[1] of image 2)" in caplog.text
