import pytest
import torch
from detectron2.config import get_cfg as detectron2_get_cfg

import fcos_d2
from fcos_d2.config import load_cfg


def test_adding_the_keys_twice_changes_nothing():
    cfg = detectron2_get_cfg()
    fcos_d2.add_fcos_config(cfg)
    once = cfg.dump()
    cfg.MODEL.FCOS.NUM_CLASSES = 7
    fcos_d2.add_fcos_config(cfg)
    assert cfg.MODEL.FCOS.NUM_CLASSES == 7
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    assert cfg.dump() == once


def test_keys_that_retinanet_has_too_are_named_alike():
    cfg = fcos_d2.get_cfg()
    shared = {
        "NUM_CLASSES", "IN_FEATURES", "PRIOR_PROB", "SCORE_THRESH_TEST", "TOPK_CANDIDATES_TEST",
        "NMS_THRESH_TEST", "FOCAL_LOSS_GAMMA", "FOCAL_LOSS_ALPHA", "NORM",
    }  # fmt: skip
    assert shared <= cfg.MODEL.FCOS.keys() & cfg.MODEL.RETINANET.keys()


def test_dump_and_load_keep_the_infinite_bound(tmp_path):
    cfg = fcos_d2.get_cfg()
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    again = fcos_d2.get_cfg()
    again.merge_from_file(str(tmp_path / "cfg.yaml"))
    assert again.MODEL.FCOS.REGRESSION_RANGES[-1] == [512, float("inf")]
    assert again.MODEL.FCOS == cfg.MODEL.FCOS


def test_missing_keys_are_added_to_those_there():
    cfg = detectron2_get_cfg()
    cfg.MODEL.FCOS = type(cfg)({"NUM_CLASSES": 7, "OF_ANOTHER_PACKAGE": 1})
    cfg.MODEL.TIMM = type(cfg)({"NAME": "resnet18"})
    cfg.DATASETS.CUSTOM = type(cfg)()
    fcos_d2.add_fcos_config(cfg)
    assert (cfg.MODEL.FCOS.NUM_CLASSES, cfg.MODEL.FCOS.OF_ANOTHER_PACKAGE) == (7, 1)
    assert cfg.MODEL.FCOS.keys() >= fcos_d2.get_cfg().MODEL.FCOS.keys()
    assert (cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.PRETRAINED) == ("resnet18", False)
    cfg.merge_from_other_cfg(type(cfg)({"DATASETS": {"CUSTOM": {"a": {"FORMAT": "coco"}}}}))
    assert cfg.DATASETS.CUSTOM.a.FORMAT == "coco"


BASE = """
DATASETS:
  CUSTOM:
    cells: {FORMAT: "voc", ROOT: "cells", SPLIT: "train", CLASSES: ["a", "b"]}
"""


@pytest.fixture
def yaml_file(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    return str(tmp_path / "base.yaml")


def test_custom_data_sets_from_the_command_line(yaml_file):
    opts = [
        "DATASETS.CUSTOM.cells.SPLIT", "val",
        "DATASETS.CUSTOM.cells.CLASSES", "['b']",
        "DATASETS.CUSTOM.mine", "{FORMAT: coco, JSON: a.json, IMAGES: images}",
        "DATASETS.CUSTOM.more.FORMAT", "coco",
        "DATASETS.CUSTOM.more.JSON", "a.json",
        "DATASETS.CUSTOM.more.IMAGES", "a",
        "MODEL.FCOS.REGRESSION_RANGES", "[[0, 64], [64, .inf]]",
        "SOLVER.BASE_LR", "0.5",
    ]  # fmt: skip
    cfg = load_cfg(yaml_file, opts)
    assert dict(cfg.DATASETS.CUSTOM.cells) == {
        "FORMAT": "voc", "ROOT": "cells", "SPLIT": "val", "CLASSES": ["b"],
    }  # fmt: skip
    assert dict(cfg.DATASETS.CUSTOM.mine) == {
        "FORMAT": "coco", "JSON": "a.json", "IMAGES": "images",
    }  # fmt: skip
    assert cfg.DATASETS.CUSTOM.more.FORMAT == "coco"
    assert [[0, 64], [64, float("inf")]] == cfg.MODEL.FCOS.REGRESSION_RANGES
    assert cfg.SOLVER.BASE_LR == 0.5
    for key, value in (("DATASETS.CUSTOM.cells", "val"), ("DATASETS.CUSTOM.a.b.c", "1")):
        with pytest.raises(ValueError, match=r"write DATASETS\.CUSTOM\.NAME\.KEY value"):
            load_cfg(yaml_file, [key, value])


def test_a_key_without_a_value_is_said(yaml_file):
    with pytest.raises(ValueError, match=r"pairs of key and value, .*got \['SOLVER.BASE_LR'\]"):
        load_cfg(yaml_file, ["SOLVER.BASE_LR"])


def test_a_child_changes_an_entry_key_by_key(yaml_file, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("_BASE_: base.yaml\nDATASETS:\n  CUSTOM:\n    cells: {SPLIT: val}\n")
    entry = load_cfg(str(child)).DATASETS.CUSTOM.cells
    assert (entry.SPLIT, entry.ROOT) == ("val", "cells")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_is_cpu_where_there_is_no_gpu():
    assert fcos_d2.get_cfg().MODEL.DEVICE == "cpu"
