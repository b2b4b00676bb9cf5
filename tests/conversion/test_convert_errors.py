"""The error for a checkpoint that does not fit lists everything that is wrong."""

import re

import numpy as np
import pytest
import torch
from test_convert_layouts import PLAIN, make_cfg, mmdet, mmdet_tood, numbered

from fcos_d2.conversion import convert


@pytest.mark.parametrize("source", PLAIN)
def test_missing_extra_and_misshaped_names_are_all_reported(source):
    _, rows, config, _ = PLAIN[source]
    good = numbered(rows)
    cfg = make_cfg(config)
    rng = np.random.default_rng(0)
    missing, misshaped = (rows[i] for i in rng.choice(len(rows), 2, replace=False))
    with pytest.raises(ValueError, match="Names of the model that the checkpoint lacks") as e:
        convert({k: v for k, v in good.items() if k != missing[0]}, source, cfg)
    assert missing[1] in str(e.value)
    with pytest.raises(ValueError, match="have no place in the model") as e:
        convert({**good, "backbone.made.up": torch.zeros(1), "ema": torch.zeros(1)}, source, cfg)
    assert "backbone.made.up" in str(e.value) and "\n  ema" in str(e.value)
    with pytest.raises(ValueError, match="whose shapes differ") as e:
        convert({**good, misshaped[0]: torch.zeros(7, 3)}, source, cfg)
    assert f"{misshaped[0]}: (7, 3), the model has {misshaped[2] or (1,)}" in str(e.value)


@pytest.mark.parametrize("source", PLAIN)
@pytest.mark.parametrize("shape", [(), (7,), (7, 3), (2, 2, 2, 2)])
@pytest.mark.parametrize(
    "ours",
    [
        "backbone.bottom_up.res2.0.conv1.norm.weight",
        "backbone.bottom_up.res2.0.conv1.norm.running_var",
        "backbone.top_block.p6.weight",
        "head.cls_logits.weight",
        "head.cls_logits.bias",
        "head.cls_tower.0.weight",
        "head.cls_tower.1.weight",
    ],
)
def test_any_shape_is_reported_with_the_sources_name(source, shape, ours):
    _, rows, config, _ = PLAIN[source]
    if source == "mmdet-tood":  # of its one tower
        ours = ours.replace("cls_tower", "share_tower")
    theirs = next(row[0] for row in rows if row[1] == ours)
    with pytest.raises(ValueError, match="does not fit the config") as e:
        convert({**numbered(rows), theirs: torch.zeros(shape)}, source, make_cfg(config))
    assert theirs in str(e.value) and str(shape) in str(e.value)


@pytest.mark.parametrize("row", range(0, len(mmdet()), 17))
def test_each_missing_tensor_is_an_error(row):
    rows = mmdet()
    state_dict = numbered(rows)
    del state_dict[rows[row][0]]
    with pytest.raises(ValueError, match=re.escape(rows[row][1])):
        convert(state_dict, "mmdet", make_cfg())


@pytest.mark.parametrize("source", PLAIN)
def test_another_config_is_an_error(source):
    _, rows, _, _ = PLAIN[source]
    with pytest.raises(ValueError, match="does not fit the config") as e:
        convert(numbered(rows), source, make_cfg("COCO-Detection/fcos_R_101_FPN_2x.yaml"))
    assert "backbone.bottom_up.res4.22.conv3.norm.running_var" in str(e.value)
    with pytest.raises(ValueError, match="shapes differ") as e:
        convert(numbered(rows), source, make_cfg(NUM_CLASSES=20))
    assert "(20, 256, 3, 3)" in str(e.value)
    # The source sets the numbers of convolutions of TOOD, which are the same in all its configs.
    fewer = ["MODEL.FCOS.NUM_SHARE_CONVS", 5] if source == "mmdet-tood" else []
    with pytest.raises(ValueError, match="no place in the model"):
        convert(numbered(rows), source, make_cfg(NUM_CLS_CONVS=3), fewer)


@pytest.mark.parametrize("source", PLAIN)
@pytest.mark.parametrize("other", PLAIN)
def test_a_checkpoint_of_another_source_is_recognised(source, other):
    if source == other:
        return
    with pytest.raises(ValueError, match=f"It looks like one of '{other}'"):
        convert(numbered(PLAIN[other][1]), source, make_cfg())


def test_unknown_sources_and_contents():
    with pytest.raises(ValueError, match=r"source must be one of \['adelaidet'"):
        convert({}, "yolo", make_cfg())
    with pytest.raises(ValueError, match=r"Its first names: conv1\.weight"):
        convert({"conv1.weight": torch.zeros(1)}, "fcos", make_cfg())
    with pytest.raises(ValueError, match="Its first names: none"):
        convert({}, "fcos", make_cfg())
    with pytest.raises(ValueError, match="are not tensors: epoch, names"):
        convert({"conv1.weight": torch.zeros(1), "epoch": 3, "names": []}, "fcos", make_cfg())


@pytest.mark.parametrize(
    "name, reason", [("atss", "predicts offsets from anchors"), ("vfnet", "star-shaped")]
)
def test_detectors_that_predict_something_else_are_named(name, reason):
    """Their towers have the names of FCOS's."""
    state_dict = {
        k.replace("bbox_head.conv_", f"bbox_head.{name}_"): x for k, x in numbered(mmdet()).items()
    }
    for source in ("mmdet", "mmdet-gfl"):
        with pytest.raises(ValueError, match=f"of mmdetection, which .*{reason}.*: it cannot be"):
            convert(state_dict, source, make_cfg())


@pytest.mark.parametrize("key", ["config", "cfg"])
def test_the_anchors_of_tood_are_in_its_config_alone(key):
    """Both kinds have the same names and shapes, and mmdetection saves the text of its config."""
    state_dict = numbered(mmdet_tood())
    text = "bbox_head=dict(\n        type='TOODHead',\n        anchor_type='{}',"
    free = {"state_dict": state_dict, "meta": {key: text.format("anchor_free")}}
    convert(free, "mmdet-tood", make_cfg())
    based = {"state_dict": state_dict, "meta": {key: text.format("anchor_based")}}
    with pytest.raises(ValueError, match=r"predicts offsets from anchors .*: it cannot be"):
        convert(based, "mmdet-tood", make_cfg())


def test_two_names_for_one_tensor_are_an_error():
    rows = mmdet()
    both_names = {**numbered(rows), "bbox_head.fcos_cls.bias": torch.zeros(80)}
    with pytest.raises(ValueError, match=r"no place in the model:\n  bbox_head.fcos_cls.bias$"):
        convert(both_names, "mmdet", make_cfg())
