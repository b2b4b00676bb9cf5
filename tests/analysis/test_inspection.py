"""Where detections came from, beside slow loops and numbers by hand; and how it is drawn."""

import dataclasses
import math

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg as detectron2_cfg
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode
from helpers import RANGES, STRIDES, assign_by_loops, level_shapes, make_detector, tiny_cfg
from torchvision.ops import box_iou

from fcos_d2 import Predictor
from fcos_d2.analysis import inspect_image, locate_positives, scores_and_ious
from fcos_d2.analysis.box_figures import origins_figure, positives_figure
from fcos_d2.analysis.heat_maps import class_figure, quality_figure
from fcos_d2.analysis.score_quality import (
    ScoresAndIoUs,
    rank_correlation,
    read_record_image,
    scores_figure,
)
from fcos_d2.data import find_record
from fcos_d2.modeling import HeadOutputs

# The shorter side becomes 128: (50, 61) is (128, 156) to the network, and (128, 160) with padding.
# So one pixel of the network input is 61 / 156 by 50 / 128 pixels of the image.
SIZE, INPUT_SIZE = (50, 61), (128, 156)
SCALE = (61 / 156, 50 / 128)


def predictor_of(**fcos_keys):
    """A predictor of the tiny detector, with other keys of MODEL.FCOS; and its config."""
    cfg = tiny_cfg(BOX_LOSS_WEIGHTING="none", **fcos_keys)
    predictor = Predictor(cfg)
    predictor.model.load_state_dict(make_detector(cfg).state_dict())
    return predictor, cfg


def random_image(size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_every_class_has_a_name():
    predictor, _ = predictor_of()
    predictor.metadata = Metadata(thing_classes=["disc"])  # of data sets with fewer classes
    names = inspect_image(predictor, random_image()).class_names
    assert names == ["disc", "class 1", "class 2"]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"SCORE_FUSION": "product", "CLIP_BOXES": "after_nms"},
        {"SCORE_THRESH_ON": "score", "SCORE_THRESH_TEST": 0.15},
        {"QUALITY": "computed"},
        {"QUALITY": "none"},
        {"LOCATION_OFFSET": 0.0},
    ],
    ids=str,
)
def test_detections_and_origins(keys):
    predictor, cfg = predictor_of(**keys)
    image = random_image()
    detections = inspect_image(predictor, image).detections
    expected = predictor(image)["instances"]
    assert torch.equal(detections.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(detections.scores, expected.scores)
    assert torch.equal(detections.pred_classes, expected.pred_classes)
    assert len(detections) > 5 and len(detections.level.unique()) > 1

    outputs = head_outputs(predictor, image)
    for i in range(len(detections)):
        d = detections[i]
        level, location, ltrb, p, q = origin_by_loops(outputs, cfg, d)
        assert int(d.level) == level
        assert d.locations[0].tolist() == pytest.approx(location, abs=1e-3)
        assert d.ltrb[0].tolist() == pytest.approx(ltrb, abs=1e-3)
        assert float(d.class_probability) == pytest.approx(p, abs=1e-5)
        assert float(d.quality) == pytest.approx(q, abs=1e-5)


@torch.no_grad()
def head_outputs(predictor, image):
    resized = predictor.resize.get_transform(image).apply_image(image)
    assert resized.shape[:2] == INPUT_SIZE
    pixels = torch.from_numpy(resized.transpose(2, 0, 1).copy())
    return predictor.model.head_outputs(predictor.model.preprocess_image([{"image": pixels}]))


def origin_by_loops(outputs, cfg, detection):
    """Level, location, ltrb, class probability and quality of the cell that says the same."""
    number, score = int(detection.pred_classes), float(detection.scores)
    found = []
    for level, stride in enumerate(STRIDES):
        logits, ltrbs = outputs.class_logits[level][0, number], outputs.ltrb[level][0]
        for y in range(logits.shape[0]):
            for x in range(logits.shape[1]):
                p = sigmoid(float(logits[y, x]))
                if p < 0.04:
                    continue
                offset = cfg.MODEL.FCOS.LOCATION_OFFSET
                location = (x + offset) * stride * SCALE[0], (y + offset) * stride * SCALE[1]
                left, top, right, bottom = ltrbs[:, y, x].tolist()
                ltrb = left * SCALE[0], top * SCALE[1], right * SCALE[0], bottom * SCALE[1]
                box = [location[0] - ltrb[0], location[1] - ltrb[1],
                       location[0] + ltrb[2], location[1] + ltrb[3]]  # fmt: skip
                box = [min(max(v, 0), s) for v, s in zip(box, (61, 50, 61, 50), strict=True)]
                q = 1.0
                if outputs.quality_logits is not None:
                    q = sigmoid(float(outputs.quality_logits[level][0, 0, y, x]))
                elif cfg.MODEL.FCOS.QUALITY == "computed":
                    horizontal = min(left, right) / (max(left, right) or math.nan)
                    q = math.sqrt(horizontal * min(top, bottom) / (max(top, bottom) or math.nan))
                expected = p * q
                if cfg.MODEL.FCOS.SCORE_FUSION == "sqrt" and cfg.MODEL.FCOS.QUALITY != "none":
                    expected = math.sqrt(expected)
                boxes = zip(box, detection.pred_boxes.tensor[0].tolist(), strict=True)
                difference = max(abs(a - b) for a, b in boxes)
                if difference < 1e-3 and abs(expected - score) < 1e-4:
                    found.append((level, location, ltrb, p, q))
    (origin,) = found
    return origin


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def hot(monkeypatch):
    """An inspection of a head whose outputs are written by hand: one cell says something.

    It is in column 5 and row 2 of the second level, whose stride is 16.
    """

    def make(**keys):
        predictor, _ = predictor_of(**keys)
        shapes = level_shapes(128, 160)
        logits = [torch.full((1, 3, *s), -10.0) for s in shapes]
        ltrb = [torch.ones(1, 4, *s) for s in shapes]
        quality = [torch.full((1, 1, *s), -10.0) for s in shapes]
        logits[1][0, 2, 2, 5] = 2
        ltrb[1][0, :, 2, 5] = torch.tensor([20.0, 10, 30, 60])
        quality[1][0, 0, 2, 5] = 0
        outputs = HeadOutputs(logits, ltrb, quality)
        monkeypatch.setattr(predictor.model, "head_outputs", lambda images: outputs)
        return inspect_image(predictor, random_image())

    return make


def test_large_images_are_drawn_with_fewer_pixels(hot):
    photo = np.zeros((2500, 5000, 3), np.uint8)
    photo[1000, 2000] = 255
    inspection = dataclasses.replace(hot(), image=photo)
    for figure in (class_figure(inspection), origins_figure(inspection)):
        drawn = figure.axes[0].get_images()[0]
        # 5000 / 1200 is more than 4: each fifth pixel.
        assert drawn.get_array().shape[:2] == (500, 1000)
        assert np.argwhere(drawn.get_array() > drawn.get_array().min())[0][:2].tolist() == [
            200,
            400,
        ]
        assert tuple(drawn.get_extent()) == (0, 5000, 2500, 0)


# (s / 2 + x * s, s / 2 + y * s) = (8 + 80, 8 + 32); without the offset (80, 32).
@pytest.mark.parametrize("offset, location", [(0.5, (88, 40)), (0.0, (80, 32))])
def test_one_hot_cell_is_drawn_at_its_place(hot, offset, location):
    inspection = hot(LOCATION_OFFSET=offset)
    x, y = location[0] * 61 / 156, location[1] * 50 / 128
    left, top, right, bottom = 20 * 61 / 156, 10 * 50 / 128, 30 * 61 / 156, 60 * 50 / 128
    assert inspection.detections.scores.tolist() == pytest.approx([math.sqrt(sigmoid(2) * 0.5)])

    (axes,) = origins_figure(inspection).axes
    (arrows,) = [c for c in axes.collections if hasattr(c, "U")]
    np.testing.assert_allclose(arrows.XY, [[x, y]] * 4, rtol=1e-5)
    np.testing.assert_allclose(arrows.U, [-left, 0, right, 0], rtol=1e-5)
    np.testing.assert_allclose(arrows.V, [0, -top, 0, bottom], rtol=1e-5)
    (dot,) = [c for c in axes.collections if not hasattr(c, "U")]
    np.testing.assert_allclose(dot.get_offsets(), [[x, y]], rtol=1e-5)
    (box,) = axes.patches
    np.testing.assert_allclose(box.get_xy(), [x - left, y - top], rtol=1e-5)
    np.testing.assert_allclose(box.get_width(), left + right, rtol=1e-5)
    np.testing.assert_allclose(box.get_height(), top + bottom, rtol=1e-5)
    (label,) = axes.texts
    assert label.get_text() == "class 2 0.66 p4"  # sqrt(0.8808 * 0.5) = 0.6636
    assert "1 of 1 detections" in axes.get_title()
    assert axes.get_xlabel() == "p4 · stride 16: 1"


@pytest.mark.parametrize("offset, location", [(0.5, (88, 40)), (0.0, (80, 32))])
def test_heat_maps_lie_around_their_locations(hot, offset, location):
    inspection = hot(LOCATION_OFFSET=offset)
    # The last axes are the colour bar. Rows of classes: the highest, then the detected one.
    classes = class_figure(inspection)
    quality = quality_figure(inspection, "centerness")
    assert [len(f.axes) for f in (classes, quality)] == [11, 6]
    assert [classes.axes[i].get_ylabel() for i in (0, 5)] == ["highest class", "class 2"]
    assert quality.axes[5].get_ylabel() == "centerness"
    for figure, number, value in ((classes, 1, 2), (classes, 6, 2), (quality, 1, 0)):
        axes = figure.axes[number]
        photo, heat = axes.get_images()
        assert photo.get_extent() == [0, 61, 50, 0] or photo.get_extent() == (0, 61, 50, 0)
        assert axes.get_xlim() == (0, 61) and axes.get_ylim() == (50, 0)
        values = heat.get_array()
        assert values.shape == (8, 10)
        hottest = np.unravel_index(values.argmax(), values.shape)
        assert hottest == (2, 5) and values[2, 5] == pytest.approx(sigmoid(value))
        left, right, bottom, top = heat.get_extent()
        assert left + 5.5 * (right - left) / 10 == pytest.approx(location[0] * 61 / 156)
        assert top + 2.5 * (bottom - top) / 8 == pytest.approx(location[1] * 50 / 128)
    titles = [axes.get_title() for axes in quality.axes[:5]]
    assert titles == [f"p{i} · stride {s}" for i, s in enumerate(STRIDES, 3)]
    dots = [axes.collections[0].get_offsets() for axes in quality.axes[:5]]
    assert [len(d) for d in dots] == [0, 1, 0, 0, 0]
    np.testing.assert_allclose(
        dots[1], [[location[0] * 61 / 156, location[1] * 50 / 128]], rtol=1e-5
    )


def record_of(boxes, classes, size=SIZE, **more):
    return more | {
        "height": size[0],
        "width": size[1],
        "annotations": [
            {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": c}
            for box, c in zip(boxes, classes, strict=True)
        ],
    }


@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_positives_against_loops(radius):
    predictor, cfg = predictor_of(CENTER_SAMPLING_RADIUS=radius)
    generator = np.random.default_rng(1)
    corners = generator.uniform(0, 0.6, (8, 2)) * (61, 50)
    boxes = np.hstack([corners, corners + generator.uniform(5, 40, (8, 2))])
    boxes[0] = [0.2, 0.2, 1, 1]  # owns nothing: the first location is at 4, it ends at 2.56
    boxes = boxes.clip(0, (61, 50, 61, 50))
    found = locate_positives(cfg, predictor.model, record_of(boxes, [0] * 8))
    np.testing.assert_allclose(found.boxes, boxes, atol=1e-4)

    resized = torch.from_numpy((boxes / (SCALE * 2)).astype(np.float32))
    shapes = level_shapes(128, 160)
    owners = assign_by_loops(shapes, STRIDES, RANGES, radius, [resized])
    eligible = [assign_by_loops(shapes, STRIDES, RANGES, radius, [box[None]]) for box in resized]
    expected = {}
    for (image, level, cell), gt in owners.items():
        y, x = divmod(cell, shapes[level][1])
        s = STRIDES[level]
        location = (s / 2 + x * s) * SCALE[0], (s / 2 + y * s) * SCALE[1]
        ambiguous = sum((image, level, cell) in e for e in eligible) > 1
        expected[(level, *(round(v, 2) for v in location))] = gt, ambiguous
    rows = zip(found.level, found.locations, found.gt, found.ambiguous, strict=True)
    got = {
        (int(level), *(round(v, 2) for v in location.tolist())): (int(gt), bool(ambiguous))
        for level, location, gt, ambiguous in rows
    }
    assert got == expected
    assert any(a for _, a in got.values()) and 0 not in {gt for gt, _ in got.values()}

    figure = positives_figure(inspect_image(predictor, random_image()), found)
    levels = sorted({level for level, *_ in expected})
    assert len(figure.axes) == len(levels) > 1
    for axes, level in zip(figure.axes, levels, strict=True):
        here = {key: value for key, value in expected.items() if key[0] == level}
        ambiguous = {key[1:] for key, (_, a) in here.items() if a}
        assert f"{len(here)} positives, {len(ambiguous)} ambiguous" in axes.get_title()
        drawn = [{tuple(np.round(v, 2)) for v in c.get_offsets()} for c in axes.collections]
        expected_sets = [{key[1:] for key in here} - ambiguous, ambiguous]
        assert drawn == [s for s in expected_sets if s]
        assert "class 0: none" in [t.get_text() for t in axes.texts]


def test_nothing_detected_and_nothing_annotated(tmp_path):
    predictor, cfg = predictor_of(SCORE_THRESH_TEST=0.999)
    inspection = inspect_image(predictor, random_image())
    assert len(inspection.detections) == len(inspection.candidates) == 0
    positives = locate_positives(cfg, predictor.model, record_of([], []))
    figures = [
        quality_figure(inspection, "iou"),
        class_figure(inspection),
        origins_figure(inspection),
        positives_figure(inspection, positives),
    ]
    for figure in figures:
        figure.savefig(tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.fixture
def records(tmp_path):
    """Three images with boxes of classes 0 and 1, and one without."""
    found = []
    for i in range(4):
        file = tmp_path / f"{i}.png"
        cv2.imwrite(str(file), random_image(seed=i))
        boxes = [(3, 4, 40, 30), (10.5, 2, 60, 49), (20, 20, 41, 47)] if i < 3 else []
        classes = [0, 1, i % 2][: len(boxes)]
        found.append(record_of(boxes, classes, file_name=str(file), image_id=i))
    return found


@pytest.mark.parametrize("keys", [{}, {"QUALITY": "none"}], ids=str)
def test_scores_and_ious(records, keys):
    predictor, cfg = predictor_of(TOPK_CANDIDATES_TEST=10**6, **keys)
    points = scores_and_ious(predictor, cfg, records)
    assert points.images == 4
    model, expected = predictor.model, []
    for record in records:
        outputs = head_outputs(predictor, cv2.imread(record["file_name"]))
        (found,) = model.post_processor.candidates(outputs, model.levels, [INPUT_SIZE])
        found.pred_boxes.clip(INPUT_SIZE)
        for box, number, score in zip(
            found.pred_boxes.tensor, found.pred_classes.tolist(), found.scores.tolist(), strict=True
        ):
            iou = 0.0
            for a in record["annotations"]:
                if a["category_id"] == number:
                    truth = torch.tensor(a["bbox"]) / torch.tensor(SCALE * 2)
                    iou = max(iou, float(box_iou(box[None], truth[None])))
            expected.append((score, iou))
    assert len(expected) > 40 and max(iou for _, iou in expected) > 0.2, expected
    got = zip(points.score.tolist(), points.iou.tolist(), strict=True)
    np.testing.assert_allclose(sorted(got), sorted(expected), atol=1e-4)
    if keys:
        assert torch.equal(points.score, points.class_probability)
    else:
        torch.testing.assert_close(points.product.sqrt(), points.score)


def test_score_plot_has_a_panel_for_each_kind_of_score():
    # Ranks of four, two of them swapped: 1 - 6 * (1 + 1) / (4 * 15) = 0.8. Quality puts them right.
    iou = torch.tensor([0.1, 0.3, 0.5, 0.9])
    probability = torch.tensor([0.2, 0.6, 0.5, 0.8])
    quality = torch.tensor([0.5, 0.5, 1.0, 1.0])
    points = ScoresAndIoUs(1, probability, quality, (probability * quality).sqrt(), iou)
    axes = scores_figure(points, "centerness", "sqrt").axes
    assert len(axes) == 3
    assert [a.get_title()[:21] for a in axes] == [f"rank correlation {c}" for c in
                                                  ("0.80", "1.00", "1.00")]  # fmt: skip
    for a, scores in zip(axes, (probability, points.product, points.score), strict=True):
        np.testing.assert_allclose(a.collections[0].get_offsets(), torch.stack([scores, iou], 1))
    assert len(scores_figure(points, "centerness", "product").axes) == 2
    assert len(scores_figure(points, "none", "sqrt").axes) == 1
    empty = ScoresAndIoUs(0, *torch.zeros(4, 0))
    assert "rank correlation -" in scores_figure(empty, "iou", "product").axes[0].get_title()


def test_rank_correlation():
    a, b = torch.tensor([3.0, 1, 2]), torch.tensor([9.0, 1, 4])
    assert rank_correlation(a, b) == pytest.approx(1)
    assert rank_correlation(a, -b) == pytest.approx(-1)
    # Ranks 1.5, 1.5, 3 and 1, 2, 3, all less 2: 1.5 / sqrt(1.5 * 2) = 0.866
    tied = rank_correlation(torch.tensor([5.0, 5, 7]), torch.tensor([1.0, 2, 3]))
    assert tied == pytest.approx(0.8660254)
    assert rank_correlation(a, torch.ones(3)) is None
    assert rank_correlation(a[:1], b[:1]) is None


def test_errors(records):
    predictor, _ = predictor_of(QUALITY="none")
    inspection = inspect_image(predictor, random_image())
    with pytest.raises(ValueError, match=r"no heat map of quality: MODEL\.FCOS.QUALITY is 'none'"):
        quality_figure(inspection, "none")
    assert find_record(records, "2") is records[2]
    with pytest.raises(ValueError, match=r"no image with the image_id '7'.*\[0, 1, 2, 3\]"):
        find_record(records, "7")
    with pytest.raises(ValueError, match=r"0\.png, got \(61, 50\), expect \(60, 50\)"):
        read_record_image(records[0] | {"width": 60})
    retinanet = detectron2_cfg()
    retinanet.MODEL.META_ARCHITECTURE = "RetinaNet"
    retinanet.MODEL.DEVICE = "cpu"
    retinanet.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    retinanet.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    retinanet.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    retinanet.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    retinanet.MODEL.WEIGHTS = ""
    with pytest.raises(ValueError, match="Pictures are made of FCOS, not of RetinaNet"):
        inspect_image(Predictor(retinanet), random_image())
