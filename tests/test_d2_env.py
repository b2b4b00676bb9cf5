"""What the module for Detectron2's tools changes; test_detectron2_tools.py runs the tools."""

import os

import pytest
import torch
from detectron2 import model_zoo as detectron2_model_zoo
from detectron2.config import defaults, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import run_with_d2_env

from fcos_d2 import model_zoo
from fcos_d2.config import load_cfg
from fcos_d2.d2_env import setup_environment

SHAPES = model_zoo.get_config_file("quick_schedules/fcos_R_18_FPN_shapes.yaml")


@pytest.fixture
def environment(monkeypatch, datasets_folder):
    """The effects of the module, in this process, until the end of the test."""
    monkeypatch.setattr(defaults, "_C", defaults._C.clone())
    registered = set(DatasetCatalog)
    yield setup_environment
    for name in set(DatasetCatalog) - registered:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def read_as_tools_do(file, opts=()):
    cfg = get_cfg()
    cfg.merge_from_file(str(file))
    cfg.merge_from_list(list(opts))
    cfg.freeze()
    return cfg


@pytest.mark.skipif("DETECTRON2_ENV_MODULE" in os.environ, reason="the module is named")
def test_importing_fcos_d2_alone_changes_nothing():
    cfg = get_cfg()
    assert "FCOS" not in cfg.MODEL and "CUSTOM" not in cfg.DATASETS
    assert cfg.MODEL.DEVICE == "cuda"
    with pytest.raises(KeyError, match="Non-existent config key"):
        cfg.merge_from_file(SHAPES)


@pytest.mark.parametrize("first", ["detectron2", "fcos_d2"])
def test_detectron2_loads_the_module(first):
    code = (
        f"import {first}; from detectron2.config import get_cfg; cfg = get_cfg()\n"
        f"cfg.merge_from_file({SHAPES!r}); cfg.freeze()\n"
        "from detectron2.data import DatasetCatalog; assert 'shapes_val' in DatasetCatalog\n"
        "cfg = cfg.clone(); cfg.defrost(); cfg.MODEL.DEVICE = 'cpu'\n"
        "from detectron2.modeling import build_model; print(type(build_model(cfg)))"
    )
    result = run_with_d2_env("-c", code, FCOS_D2_CONFIG=SHAPES)
    assert "<class 'fcos_d2.modeling.fcos.FCOS'>" in result.stdout


def test_configs_are_those_of_load_cfg(environment, monkeypatch, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text(
        f"_BASE_: {SHAPES}\nDATASETS:\n  TRAIN: ['env_cells']\n  CUSTOM:\n"
        "    env_cells: {FORMAT: voc, ROOT: cells, SPLIT: val, CLASSES: [a, b]}\n"
    )
    monkeypatch.setenv("FCOS_D2_CONFIG", str(child))
    environment()
    opts = ["SOLVER.BASE_LR", "0.5"]
    cfg = read_as_tools_do(child, opts)
    assert cfg == load_cfg(str(child), opts)
    assert ("cuda" if torch.cuda.is_available() else "cpu") == cfg.MODEL.DEVICE
    assert {"env_cells", "shapes_train"} <= set(DatasetCatalog)
    assert MetadataCatalog.get("env_cells").thing_classes == ["a", "b"]
    environment()  # a second time changes nothing
    assert read_as_tools_do(child, opts) == cfg


def test_other_configs_are_as_before(environment):
    """Detectron2's models, with our keys beside."""
    environment()
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    file = detectron2_model_zoo.get_config_file(name)
    cfg, bare = read_as_tools_do(file), defaults._C.clone()
    for section, key in (("MODEL", "FCOS"), ("MODEL", "TIMM"), ("DATASETS", "CUSTOM"),
                         ("SOLVER", "AMP"), ("DATALOADER", "ON_BAD_IMAGE")):  # fmt: skip
        del bare[section][key], cfg[section][key]
    bare.merge_from_file(file)
    assert cfg == bare


def test_a_wrong_config_is_said(environment, monkeypatch, tmp_path):
    monkeypatch.setenv("FCOS_D2_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match=r"none\.yaml.*does not exist"):
        environment()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(
        f"_BASE_: {SHAPES}\nDATASETS: {{CUSTOM: {{shapes_val: {{FORMAT: labelme}}}}}}\n"
    )
    monkeypatch.setenv("FCOS_D2_CONFIG", str(wrong))
    with pytest.raises(ValueError, match=r"CUSTOM\.shapes_val\.FORMAT must be one of"):
        environment()
