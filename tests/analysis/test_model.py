"""Compares counts with sums by hand. The levels of 256 x 256 have 32², 16², 8², 4² and 2² cells."""

import pytest
from detectron2.config import get_cfg as detectron2_cfg
from helpers import tiny_cfg

from fcos_d2.analysis import (
    analyze_model,
    compare_with_retinanet,
    comparison_table,
    retinanet_cfg,
)

CELLS = 1024 + 256 + 64 + 16 + 4
CHANNELS = 64  # of tiny_cfg's FPN and towers
CLASSES = 3


@pytest.fixture(scope="module")
def fcos_and_retinanet():
    return compare_with_retinanet(tiny_cfg(), 250, 200)


def test_outputs(fcos_and_retinanet):
    fcos, retinanet = fcos_and_retinanet
    # Padded to 256 x 224, that is 32 * 28, 16 * 14, 8 * 7, 4 * 4 and 2 * 2 cells.
    assert fcos.input_size == retinanet.input_size == (256, 224)
    cells = 896 + 224 + 56 + 16 + 4
    assert fcos.outputs == cells * (CLASSES + 4 + 1)
    assert retinanet.outputs == cells * 9 * (CLASSES + 4)


@pytest.mark.parametrize("quality, maps", [("none", 4), ("iou", 5)])
def test_outputs_without_a_quality_branch(quality, maps):
    statistics = analyze_model(tiny_cfg(QUALITY=quality, BOX_LOSS_WEIGHTING="none"), 256, 256)
    assert statistics.outputs == CELLS * (CLASSES + maps)


def test_ten_more_classes():
    more = compare_with_retinanet(tiny_cfg(NUM_CLASSES=13), 256, 256)
    fewer = compare_with_retinanet(tiny_cfg(), 256, 256)
    for anchors, a, b in zip((1, 9), fewer, more, strict=True):
        # 3x3 filters over 64 channels, with a bias, which is no multiply-add.
        filters = 10 * anchors
        assert b.parameters - a.parameters == filters * (CHANNELS * 9 + 1)
        assert b.multiply_adds - a.multiply_adds == filters * CHANNELS * 9 * CELLS


def test_frozen_normalisation_costs_as_much_as_a_trained_one():
    trained, frozen = tiny_cfg(), tiny_cfg()
    frozen.MODEL.RESNETS.NORM = "FrozenBN"
    a, b = (analyze_model(c, 64, 64) for c in (trained, frozen))
    assert a.multiply_adds == b.multiply_adds
    assert a.not_counted == b.not_counted


def test_deformable_convolutions_are_counted():
    plain, deformable = (
        analyze_model(tiny_cfg(USE_DEFORMABLE=flag), 256, 256) for flag in (False, True)
    )
    # In both towers, the layer costs as much as a plain one, and 27 filters give offsets and mask.
    extra = 2 * 27 * CHANNELS * 9 * CELLS
    assert deformable.multiply_adds - plain.multiply_adds == extra
    assert not any("deform" in op for op in deformable.not_counted)


def test_deformable_backbone_runs_in_retinanet_too():
    cfg = tiny_cfg()
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, False, True]
    plain = cfg.clone()
    plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    deformed, undeformed = (analyze_model(retinanet_cfg(c), 64, 64) for c in (cfg, plain))
    # Three blocks of res5 gain 18 offsets from 512 channels. The image is 2 x 2 cells of res5;
    # the first block's stride is in its first convolution (STRIDE_IN_1X1).
    assert deformed.multiply_adds - undeformed.multiply_adds == 3 * 18 * 512 * 9 * 4


def test_retinanet_has_the_backbone_of_the_config():
    cfg = tiny_cfg(IN_FEATURES=["p4"], TOP_LEVELS=0, REGRESSION_RANGES=[[0, 1e8]])
    cfg.MODEL.FPN.IN_FEATURES = ["res4"]
    fcos, retinanet = compare_with_retinanet(cfg, 256, 256)
    assert fcos.outputs == 16 * 16 * (CLASSES + 5)
    assert retinanet.outputs == CELLS * 9 * (CLASSES + 4)  # RetinaNet stays on P3 to P7
    other = retinanet_cfg(cfg)
    assert other.MODEL.RESNETS.DEPTH == 18
    assert other.MODEL.FPN.OUT_CHANNELS == CHANNELS
    assert other.MODEL.RETINANET.NUM_CLASSES == CLASSES


def test_table_has_the_ratios_and_what_was_not_counted(fcos_and_retinanet):
    table = comparison_table(*fcos_and_retinanet)
    outputs = next(line for line in table.splitlines() if line.startswith("outputs"))
    # 9 * (3 + 4) / (3 + 4 + 1) = 7.875, and its inverse 0.127
    assert outputs.split()[-2:] == ["0.127", "7.88"]
    assert "256 x 224 pixels" in table
    assert "Not counted in FCOS: aten::add " in table
    assert "Not counted in RetinaNet: aten::add " in table


def test_the_config_is_not_modified():
    cfg = tiny_cfg()
    cfg.freeze()
    before = cfg.dump()
    compare_with_retinanet(cfg, 64, 64)
    assert cfg.dump() == before


def test_errors():
    cfg = tiny_cfg()
    with pytest.raises(ValueError, match="size must be positive, got 0 x 64"):
        analyze_model(cfg, 0, 64)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    with pytest.raises(ValueError, match=r"needs a ResNet-FPN.*got 'build_resnet_backbone'"):
        compare_with_retinanet(cfg, 64, 64)
    two_stage = detectron2_cfg()
    with pytest.raises(ValueError, match="'GeneralizedRCNN' is not a dense detector"):
        analyze_model(two_stage, 64, 64)
    with pytest.raises(ValueError, match="must be 'FCOS', got 'GeneralizedRCNN'"):
        compare_with_retinanet(two_stage, 64, 64)
