import pytest
import torch
from detectron2.config import get_cfg as detectron2_get_cfg

import fcos_d2


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_is_cpu_where_there_is_no_gpu():
    assert fcos_d2.get_cfg().MODEL.DEVICE == "cpu"
