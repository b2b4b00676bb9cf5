"""What ``fcos export`` refuses; test_onnx.py has what it does."""

import sys

import pytest
import torch
from detectron2.modeling import build_model

from fcos_d2 import load_cfg, model_zoo
from fcos_d2.data import register_custom_datasets
from fcos_d2.export.__main__ import load_model, main
from fcos_d2.model_zoo import get_config_file

TINY = get_config_file("quick_schedules/fcos_R_18_FPN_shapes.yaml")


@pytest.fixture
def export(monkeypatch, tmp_path):
    """Runs the command, which must fail, and returns its message."""

    def run(config, *opts):
        argv = ["export", "--config-file", config, "--output", str(tmp_path / "x.onnx"), *opts]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as error:
            main()
        assert not (tmp_path / "x.onnx").exists()
        return str(error.value)

    return run


def test_help_has_an_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "fcos export --config-file configs/" in capsys.readouterr().out


def test_without_weights(export):
    assert export(TINY) == "error: Name the weights to export: MODEL.WEIGHTS FILE"


def test_weights_that_do_not_exist_or_do_not_fit(export, tmp_path):
    assert "missing.pth" in export(TINY, "MODEL.WEIGHTS", str(tmp_path / "missing.pth"))
    model = model_zoo.get("quick_schedules/fcos_R_18_FPN_shapes.yaml", "", "cpu")
    file = str(tmp_path / "weights.pth")
    torch.save(model.backbone.state_dict(prefix="backbone."), file)
    assert "tensors are not in the file" in export(TINY, "MODEL.WEIGHTS", file)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("Ablations/retinanet_R_50_FPN_1x.yaml", "RetinaNet"),
        ("FCOS-RPN/fcos_rpn_R_50_FPN_1x.yaml", "ProposalNetwork"),
    ],
)
def test_other_detectors(export, config, name):
    message = export(get_config_file(config), "DATASETS.TEST", "()")
    assert f"Only META_ARCHITECTURE 'FCOS' can be exported, not '{name}'" in message


def test_wrong_config(export, tmp_path):
    assert "missing.yaml' does not exist" in export(str(tmp_path / "missing.yaml"))
    assert "pairs of key and value" in export(TINY, "MODEL.WEIGHTS")
    assert "Non-existent" in export(TINY, "MODEL.FCOS.NO_KEY", "1")


@pytest.fixture
def weights(tmp_path):
    """A file of weights for TINY, with the names that it says."""

    def save(names=None):
        cfg = load_cfg(TINY)
        cfg.MODEL.DEVICE = "cpu"
        data = {"model": build_model(cfg).state_dict()} | ({"class_names": names} if names else {})
        torch.save(data, tmp_path / "model.pth")
        return str(tmp_path / "model.pth")

    return save


def test_class_names_of_another_number(export, weights, datasets_folder):
    message = export(TINY, "MODEL.WEIGHTS", weights(), "DATASETS.TEST", "('coco_2017_val',)")
    assert "The model has 3 classes, but these 80 names" in message
    assert "Set DATASETS.TRAIN and DATASETS.TEST" in message


def test_class_names(weights, datasets_folder, shapes_folder, monkeypatch):
    cfg = load_cfg(TINY)
    cfg.MODEL.WEIGHTS = weights()
    assert load_model(cfg)[1:] == (None, None)  # without the data
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    register_custom_datasets(cfg)
    assert load_model(cfg)[1] == ["disc", "square", "triangle"]
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN = ()
    assert load_model(cfg)[1] is None
    cfg.MODEL.WEIGHTS = weights(["a", "b", "c"])
    assert load_model(cfg)[1:] == (["a", "b", "c"], None)
    data = torch.load(cfg.MODEL.WEIGHTS)
    torch.save(data | {"category_ids": [2, 7, 8]}, cfg.MODEL.WEIGHTS)
    assert load_model(cfg)[1:] == (["a", "b", "c"], [2, 7, 8])
