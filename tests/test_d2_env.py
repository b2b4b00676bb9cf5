"""What the module for Detectron2's tools changes; test_detectron2_tools.py runs the tools."""

import os
import pickle
import sys

import pytest
import torch
import yacs.config
from detectron2 import model_zoo as detectron2_model_zoo
from detectron2.config import CfgNode, defaults, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from helpers import make_input, run_with_d2_env

from fcos_d2 import model_zoo
from fcos_d2.config import load_cfg
from fcos_d2.d2_env import setup_environment

SHAPES = model_zoo.get_config_file("quick_schedules/fcos_R_18_FPN_shapes.yaml")
CATALOG = type(DatasetCatalog)


@pytest.fixture
def environment(monkeypatch, datasets_folder):
    """The effects of the module, in this process, until the end of the test."""
    monkeypatch.setattr(defaults, "_C", defaults._C.clone())
    for name in ("merge_from_file", "merge_from_list", "freeze"):
        monkeypatch.setattr(CfgNode, name, getattr(CfgNode, name))
    monkeypatch.setattr(CATALOG, "__missing__", None, raising=False)
    registered = set(DatasetCatalog)
    setup_environment()
    yield
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
    assert CfgNode.freeze is yacs.config.CfgNode.freeze
    assert not hasattr(CATALOG, "__missing__")
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
    result = run_with_d2_env("-c", code)
    assert "<class 'fcos_d2.modeling.fcos.FCOS'>" in result.stdout


def test_configs_are_those_of_load_cfg(environment, tmp_path):
    (tmp_path / "base.yaml").write_text(
        f"_BASE_: {SHAPES}\nDATASETS:\n  CUSTOM:\n"
        "    env_cells: {FORMAT: voc, ROOT: cells, SPLIT: val, CLASSES: [a, b]}\n"
    )
    child = tmp_path / "child.yaml"
    child.write_text(
        "_BASE_: base.yaml\nDATASETS:\n  TRAIN: ['env_cells']\n  CUSTOM:\n"
        "    env_cells: {FORMAT: coco, JSON: a.json, IMAGES: images}\n"
    )
    opts = [
        "DATASETS.CUSTOM.env_cells.JSON", "b.json",
        "DATASETS.CUSTOM.env_more", "{FORMAT: voc, ROOT: more, SPLIT: val, CLASSES: [c]}",
        "MODEL.FCOS.REGRESSION_RANGES", "[[0, 64], [64, .inf]]",
        "SOLVER.BASE_LR", "0.5",
    ]  # fmt: skip
    cfg = read_as_tools_do(child, opts)
    expected = load_cfg(str(child), opts)
    assert cfg == expected
    assert dict(cfg.DATASETS.CUSTOM.env_cells) == {
        "FORMAT": "coco", "JSON": "b.json", "IMAGES": "images",
    }  # fmt: skip
    assert {"env_cells", "env_more", "shapes_train"} <= set(DatasetCatalog)
    assert MetadataCatalog.get("env_more").thing_classes == ["c"]
    assert ("cuda" if torch.cuda.is_available() else "cpu") == cfg.MODEL.DEVICE
    cfg.freeze()  # a second time, and after the journey to another process
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_other_configs_are_as_before(environment):
    """Detectron2's models, with our keys beside, and trees that are not Detectron2's."""
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    file = detectron2_model_zoo.get_config_file(name)
    cfg, bare = read_as_tools_do(file), defaults._C.clone()
    del bare.MODEL["FCOS"], bare.DATASETS["CUSTOM"]
    bare.merge_from_file(file)
    bare.merge_from_list(["SOLVER.BASE_LR", 0.01])
    bare.freeze()
    for section in bare:
        ours = {"MODEL": "FCOS", "DATASETS": "CUSTOM", "SOLVER": "AMP"}.get(section)
        if ours is None:
            assert cfg[section] == bare[section]
        else:
            assert {k: v for k, v in cfg[section].items() if k != ours} == {
                k: v for k, v in bare[section].items() if k != ours
            }
    other = CfgNode({"DATASETS": None, "MODEL": {"FCOS": 1}, "A": {"B": 1}})
    other.merge_from_list(["MODEL.FCOS", 3])
    other.merge_from_other_cfg(CfgNode({"A": {"B": 2}}))
    other.freeze()
    assert (other.A.B, other.MODEL.FCOS) == (2, 3)
    get_cfg().DATASETS.freeze()


def test_errors_name_the_entry_and_unknown_data_sets(environment):
    with pytest.raises(ValueError, match=r"CUSTOM\.shapes_val\.FORMAT must be one of"):
        read_as_tools_do(SHAPES, ["DATASETS.CUSTOM.shapes_val.FORMAT", "labelme"])
    with pytest.raises(ValueError, match="come as pairs of key and value"):
        read_as_tools_do(SHAPES, ["SOLVER.BASE_LR"])
    with pytest.raises(KeyError, match="'shapes_typo' is not registered"):
        DatasetCatalog.get("shapes_typo")
    assert "shapes_typo" not in DatasetCatalog


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.9])
def test_threshold_of_demo_is_the_least_score(environment, threshold):
    plain = read_as_tools_do(SHAPES)
    assert plain.MODEL.FCOS.SCORE_THRESH_ON == "class"
    cfg = plain.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = threshold  # these three lines are demo.py's
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = threshold
    cfg.freeze()
    model = build_model(cfg).eval()
    torch.nn.init.normal_(model.head.cls_logits.bias)
    with torch.no_grad():
        scores = {}
        for least in (threshold, 0.0):
            model.post_processor.score_thresh = max(least, 1e-6)
            scores[least] = model([make_input(size=(64, 64))])[0]["instances"].scores
    assert threshold == cfg.MODEL.FCOS.SCORE_THRESH_TEST
    assert len(scores[0.0]) > 10
    expected = scores[0.0][scores[0.0] > threshold]
    torch.testing.assert_close(scores[threshold][: len(expected)], expected)
    assert (scores[threshold] > threshold).all()


def test_data_sets_of_a_run_are_found_from_its_results(environment, shapes_folder, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    run = shapes_folder / "run"
    for results in ("inference/results.json", "inference/env_val/results.json"):
        (run / results).parent.mkdir(parents=True, exist_ok=True)
        name = f"env_{len(results)}"
        cfg = load_cfg(SHAPES)
        cfg.DATASETS.CUSTOM[name] = cfg.DATASETS.CUSTOM.shapes_val
        (run / "config.yaml").write_text(cfg.dump())
        monkeypatch.setattr(sys, "argv", ["tool", f"--input={run / results}", "--output", "x"])
        assert len(DatasetCatalog.get(name)) == 120
        assert MetadataCatalog.get(name).thing_classes == ["disc", "square", "triangle"]
    with pytest.raises(KeyError, match="'env_typo' is not registered"):
        DatasetCatalog.get("env_typo")
