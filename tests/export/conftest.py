"""Files exported once for all tests here: an export takes several seconds."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import GFLV2, TOOD, make_detector, tiny_cfg

from fcos_d2.export import to_onnx

ROOT = Path(__file__).parents[2]
NAMES = ["red", "green", "blue"]


def p3_to_p5(**fcos_keys):
    cfg = tiny_cfg(IN_FEATURES=["p3", "p4", "p5"], TOP_LEVELS=0, **fcos_keys)
    cfg.MODEL.FCOS.REGRESSION_RANGES = [[0, 64], [64, 128], [128, float("inf")]]
    return cfg


def p4_only(**fcos_keys):
    cfg = tiny_cfg(IN_FEATURES=["p4"], TOP_LEVELS=0, REGRESSION_RANGES=[[0, 9999]], **fcos_keys)
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    return cfg


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """(cfg, model, file, stdout) of ``python -m fcos_d2.export``, as a user runs it.

    Group norms, ReLU, centerness, P3 to P7, float32.
    """
    folder = tmp_path_factory.mktemp("command")
    cfg = tiny_cfg()
    model = make_detector(cfg)
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    torch.save(model.state_dict(), cfg.MODEL.WEIGHTS)
    (folder / "config.yaml").write_text(cfg.dump())
    file = folder / "new" / "model.onnx"
    result = subprocess.run(
        [
            sys.executable, "-m", "fcos_d2.export", "--config-file", folder / "config.yaml",
            "--output", file, "DATASETS.TEST", "('colours',)",
            "DATASETS.CUSTOM.colours", f"{{FORMAT: voc, ROOT: x, SPLIT: test, CLASSES: {NAMES}}}",
        ],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return cfg, model, file, result.stdout


def export(folder, cfg, **options):
    model = make_detector(cfg)
    return model, folder / "model.onnx", to_onnx(model, folder / "model.onnx", **options)


@pytest.fixture(scope="session")
def batch_norm(tmp_path_factory):
    """(model, file, difference): batch norms, exp, IoU, P3 to P5, uint8, and other scores."""
    cfg = p3_to_p5(
        NORM="BN", BOX_ACTIVATION="exp", QUALITY="iou", BOX_LOSS_WEIGHTING="none",
        SCORE_FUSION="product", SCORE_THRESH_ON="score", SCORE_THRESH_TEST=0.025,
        CLIP_BOXES="after_nms", TOPK_CANDIDATES_TEST=60,
    )  # fmt: skip
    cfg.INPUT.FORMAT = "RGB"
    cfg.TEST.DETECTIONS_PER_IMAGE = 60
    return export(tmp_path_factory.mktemp("batch_norm"), cfg, input_type="uint8")


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """(model, file, difference): the maps of P4. The model was in training mode."""
    folder, model = tmp_path_factory.mktemp("raw"), make_detector(p4_only())
    before = copy.deepcopy(model.state_dict())
    difference = to_onnx(model.train(), folder / "model.onnx", raw=True)
    assert model.training and all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    return model.eval(), folder / "model.onnx", difference


@pytest.fixture(scope="session")
def gfl(tmp_path_factory):
    """(model, file, difference): distributions, and a class score that knows their shapes."""
    return export(tmp_path_factory.mktemp("gfl"), tiny_cfg(**GFLV2, TOP_RELU=False))


@pytest.fixture(scope="session")
def task_aligned(tmp_path_factory):
    """(model, file, difference): TOOD's head, with deformable convolutions of four groups."""
    cfg = tiny_cfg(**TOOD, USE_DEFORMABLE=True)
    return export(tmp_path_factory.mktemp("task_aligned"), cfg)


@pytest.fixture(scope="session")
def deformable(tmp_path_factory):
    """(model, file, difference): deformable layers in the head, computed centerness, P4 alone."""
    cfg = p4_only(QUALITY="computed", BOX_LOSS_WEIGHTING="none", USE_DEFORMABLE=True)
    return export(tmp_path_factory.mktemp("deformable"), cfg)
