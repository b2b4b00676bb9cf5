"""The graph that is exported, run by PyTorch, beside the model: for every way of scoring."""

import pytest
import torch
from helpers import GFL, TOOD, assert_same_detections, make_detector, make_input, tiny_cfg

from fcos_d2.export.graph import DetectionGraph, RawGraph


@torch.no_grad()
def compare(model, sizes=((150, 201), (64, 97), (1, 1), (129, 320))):
    """Assert that the graph detects what the model does. Returns the numbers of detections."""
    graph, counts = DetectionGraph(model), []
    for seed, size in enumerate(sizes):
        images = [make_input(size=size, seed=seed + i)["image"] for i in range(2)]
        outputs = graph(torch.stack(images))
        for image, boxes, scores, classes, count in zip(images, *outputs, strict=True):
            expected = model([{"image": image}])[0]["instances"]
            arrays = (x[:count].numpy() for x in (boxes, scores, classes))
            counts.append(assert_same_detections(*arrays, expected))
    return counts


@pytest.mark.parametrize("head", [GFL, TOOD], ids=["GFL", "task-aligned"])
@pytest.mark.parametrize("thresh_on", ["class", "score"])
def test_a_joint_score(thresh_on, head):
    keys = {"SCORE_THRESH_ON": thresh_on, "SCORE_THRESH_TEST": 0.02, "NMS_THRESH_TEST": 0.9}
    model = make_detector(**head, **keys, TOP_RELU=False)
    graph = RawGraph(model)
    assert not any("quality" in name for name in graph.output_names)
    assert len(graph(torch.zeros(1, 3, 64, 64))) == len(graph.output_names)
    counts = compare(model)
    assert max(counts) > 10 and len(set(counts)) > 2


@pytest.mark.parametrize(
    ("quality", "fusion"),
    [("centerness", "sqrt"), ("iou", "product"), ("computed", "sqrt"), ("none", "sqrt")],
)
@pytest.mark.parametrize("thresh_on", ["class", "score"])
@pytest.mark.parametrize("clip", ["before_nms", "after_nms"])
def test_scores_thresholds_and_clipping(quality, clip, thresh_on, fusion):
    model = make_detector(
        QUALITY=quality, BOX_LOSS_WEIGHTING="none", CLIP_BOXES=clip, SCORE_FUSION=fusion,
        SCORE_THRESH_ON=thresh_on, SCORE_THRESH_TEST=0.05 if fusion == "sqrt" else 0.02,
    )  # fmt: skip
    counts = compare(model)
    assert max(counts) > 10 and len(set(counts)) > 2


def test_more_candidates_than_the_limits():
    cfg = tiny_cfg(TOPK_CANDIDATES_TEST=20)
    cfg.TEST.DETECTIONS_PER_IMAGE = 15
    model = make_detector(cfg)
    model.head.cls_logits.bias.data += 3
    assert compare(model, [(150, 201), (129, 320)]) == [15] * 4


def test_fewer_candidates_than_the_limits():
    cfg = tiny_cfg(TOPK_CANDIDATES_TEST=2)
    cfg.TEST.DETECTIONS_PER_IMAGE = 200
    assert 0 < max(compare(make_detector(cfg))) < 11


@pytest.mark.parametrize("threshold", [0, 1])
def test_everything_and_nothing_is_above_the_threshold(threshold):
    model = make_detector(SCORE_THRESH_TEST=threshold)
    model.post_processor.max_detections_per_image = 50
    assert compare(model, [(40, 70)]) == [0 if threshold == 1 else 50] * 2


@torch.no_grad()
def test_boxes_without_extent_or_end():
    model = make_detector(QUALITY="computed", BOX_LOSS_WEIGHTING="none")
    model.head.bbox_pred.weight[0] = 0
    model.head.bbox_pred.bias[0] = float("inf")
    assert compare(model, [(64, 97)]) == [0, 0]
    model = make_detector(BOX_ACTIVATION="relu")
    model.head.bbox_pred.weight.zero_()
    model.head.bbox_pred.bias.fill_(-1)
    assert compare(model, [(64, 97)]) == [0, 0]


def test_names_of_raw_maps():
    cfg = tiny_cfg(IN_FEATURES=["p3", "p4"], TOP_LEVELS=0, QUALITY="none")
    cfg.MODEL.FCOS.REGRESSION_RANGES = [[0, 64], [64, 999]]
    cfg.MODEL.FCOS.BOX_LOSS_WEIGHTING = "none"
    graph = RawGraph(make_detector(cfg))
    assert graph.output_names == ["class_logits_p3", "class_logits_p4", "ltrb_p3", "ltrb_p4"]
    maps = graph(torch.zeros(1, 3, 33, 64))
    assert [tuple(x.shape) for x in maps] == [
        (1, 3, 8, 8), (1, 3, 4, 4), (1, 4, 8, 8), (1, 4, 4, 4)
    ]  # fmt: skip
