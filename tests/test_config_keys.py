"""Each key of MODEL.FCOS reaches the part that it is for, through the whole model's config."""

import pytest
import torch
from detectron2.modeling import build_model
from helpers import ALIGNED, SIMOTA, TOOD, tiny_cfg

from fcos_d2.config import get_cfg

# Key: (value that is not the default, other keys it needs, what then shows in the model).
KEYS = {
    "NUM_CLASSES": (7, {}, lambda m: (m.num_classes, m.head.cls_logits.out_channels) == (7, 7)),
    "IN_FEATURES": (
        ["p3", "p4"],
        {"TOP_LEVELS": 0, "REGRESSION_RANGES": [[0, 64], [64, 999]]},
        lambda m: (m.head_in_features, m.levels.strides, len(m.head.scales))
        == (["p3", "p4"], (8, 16), 2),
    ),
    "TOP_LEVELS": (
        1,
        {"IN_FEATURES": ["p3", "p4", "p5", "p6"], "REGRESSION_RANGES": [[0, 9]] * 4},
        lambda m: not hasattr(m.backbone.top_block, "p7"),
    ),
    "TOP_IN_FEATURE": ("res5", {}, lambda m: m.backbone.top_block.p6.in_channels == 512),
    "TOP_RELU": (False, {}, lambda m: type(m.backbone.top_block).__name__ == "LinearP6P7"),
    "HEAD": (
        "task_aligned", TOOD, lambda m: type(m.head).__name__ == "TaskAlignedHead",
    ),
    "NUM_CLS_CONVS": (3, {}, lambda m: len(m.head.cls_tower) == 9),
    "NUM_BOX_CONVS": (3, {}, lambda m: len(m.head.bbox_tower) == 9),
    "NUM_SHARE_CONVS": (2, {}, lambda m: len(m.head.share_tower) == 6),
    "NORM": ("BN", {}, lambda m: type(m.head.cls_tower[1]).__name__ == "PerLevelNorm"),
    "USE_DEFORMABLE": (True, {}, lambda m: hasattr(m.head.cls_tower[0], "offset")),
    "USE_SCALE": (False, {}, lambda m: m.head.scales is None),
    # ln(0.2 / 0.8) = -1.386
    "PRIOR_PROB": (0.2, {}, lambda m: abs(m.head.cls_logits.bias[0].item() + 1.386) < 1e-3),
    "BOX_ACTIVATION": ("exp", {}, lambda m: m.head.box_activation == "exp"),
    "REG_MAX": (
        7, {"BOX_ACTIVATION": "distribution"}, lambda m: m.head.bbox_pred.out_channels == 4 * 8,
    ),
    "DISTRIBUTION_QUALITY": (
        True,
        {"BOX_ACTIVATION": "distribution", "QUALITY": "joint", "CLS_LOSS_TYPE": "varifocal",
         "BOX_LOSS_WEIGHTING": "none"},
        lambda m: m.head.box_quality is not None,
    ),
    "QUALITY": (
        "iou",
        {"BOX_LOSS_WEIGHTING": "none"},
        lambda m: m.loss.quality == "iou" and m.head.ctrness is not None,
    ),
    "BIFPN_REPEATS": None,  # only of the BiFPN: test_bifpn.py
    "PROPOSAL_NUM_CLASSES": None,  # only of the proposal generator: test_proposal_generator.py
    "LOCATION_OFFSET": (0.0, {}, lambda m: m.levels.offset == 0),
    "SCORE_THRESH_ON": ("score", {}, lambda m: m.post_processor.score_thresh_on == "score"),
    "QUALITY_ON": ("cls", {}, lambda m: m.head.quality_on == "cls"),
    "ASSIGNMENT": ("atss", {}, lambda m: type(m.assigner).__name__ == "ATSSAssigner"),
    "REGRESSION_RANGES": (
        [[0, 9]] * 5, {}, lambda m: m.assigner.regression_ranges == [(0.0, 9.0)] * 5,
    ),
    "CENTER_SAMPLING_RADIUS": (0.7, {}, lambda m: m.assigner.radius == 0.7),
    "CLS_LOSS_TYPE": (
        "varifocal",
        {"QUALITY": "joint", "BOX_LOSS_WEIGHTING": "none"},
        lambda m: m.loss.cls_loss_type == "varifocal",
    ),
    "FOCAL_LOSS_ALPHA": (0.4, {}, lambda m: m.loss.focal_loss_alpha == 0.4),
    "FOCAL_LOSS_GAMMA": (1.5, {}, lambda m: m.loss.focal_loss_gamma == 1.5),
    "BOX_LOSS_TYPE": ("diou", {}, lambda m: m.loss.box_loss_type == "diou"),
    "BOX_LOSS_WEIGHTING": ("none", {}, lambda m: m.loss.box_loss_weighting == "none"),
    "LOSS_NORMALIZER": ("ema_fg", {}, lambda m: m.loss.ema_num_positives is not None),
    "CLS_LOSS_WEIGHT": (2.0, {}, lambda m: m.loss.cls_loss_weight == 2.0),
    "BOX_LOSS_WEIGHT": (3.0, {}, lambda m: m.loss.box_loss_weight == 3.0),
    "QUALITY_LOSS_WEIGHT": (4.0, {}, lambda m: m.loss.quality_loss_weight == 4.0),
    "DISTRIBUTION_LOSS_WEIGHT": (5.0, {}, lambda m: m.loss.distribution_loss_weight == 5.0),
    "SCORE_THRESH_TEST": (0.2, {}, lambda m: m.post_processor.score_thresh == 0.2),
    "TOPK_CANDIDATES_TEST": (50, {}, lambda m: m.post_processor.topk_candidates == 50),
    "NMS_THRESH_TEST": (0.5, {}, lambda m: m.post_processor.nms_thresh == 0.5),
    "PRECISION_TEST": ("bfloat16", {}, lambda m: m.runtime.dtype_test == torch.bfloat16),
    "COMPILE": (True, {}, lambda m: m.runtime.compile),
    "CLIP_BOXES": ("after_nms", {}, lambda m: m.post_processor.clip_boxes == "after_nms"),
    "SCORE_FUSION": ("product", {}, lambda m: m.post_processor.score_fusion == "product"),
}  # fmt: skip


def test_every_key_is_listed_here():
    assert get_cfg().MODEL.FCOS.keys() == KEYS.keys()


@pytest.mark.parametrize("key", [key for key, value in KEYS.items() if value])
def test_key_reaches_its_part(key):
    value, needed, shows = KEYS[key]
    assert not shows(build_model(tiny_cfg())), "the value must differ from the default"
    assert shows(build_model(tiny_cfg(**(needed | {key: value}))))


@pytest.mark.parametrize(
    "keys, rule", [(SIMOTA, "SimOTAAssigner"), (ALIGNED, "TaskAlignedAssigner")]
)
def test_rules_that_see_predictions(keys, rule):
    cfg = tiny_cfg(**keys)
    cfg.SOLVER.ATSS_ITERS = 9 if keys is ALIGNED else 0
    model = build_model(cfg)
    assert type(model.assigner).__name__ == rule
    assert getattr(model.assigner, "atss_iters", 0) == cfg.SOLVER.ATSS_ITERS
    assert (model.loss.until_aligned is not None) == (keys is ALIGNED)


def test_computed_centerness():
    model = build_model(tiny_cfg(QUALITY="computed", BOX_LOSS_WEIGHTING="none"))
    assert model.head.ctrness is None and model.post_processor.quality == "computed"


def test_detections_per_image_is_detectron2s_key():
    cfg = tiny_cfg()
    cfg.TEST.DETECTIONS_PER_IMAGE = 7
    assert build_model(cfg).post_processor.max_detections_per_image == 7
