"""tools/visualize_fcos.py as a user runs it, but in this process, which is faster."""

import json
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import make_detector

ROOT = Path(__file__).parents[2]
NAME = "pictures_of_the_tool"  # no other test registers this data set
TINY = ("MODEL.FCOS.NUM_CLS_CONVS", 1, "MODEL.FCOS.NUM_BOX_CONVS", 1, "MODEL.DEVICE", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights, and two images, numbers 17 and 18, with a box each."""
    folder = tmp_path_factory.mktemp("tool")
    torch.save(make_detector().state_dict(), folder / "model.pth")
    images, annotations = [], []
    for i in (17, 18):
        pixels = np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), pixels)
        images.append({"id": i, "file_name": f"{i}.png", "height": 60, "width": 80})
        annotations.append(
            {"id": i, "image_id": i, "category_id": 1, "bbox": [9, 9, 40, 40], "area": 1600}
        )
    categories = [{"id": i, "name": f"kind {i}"} for i in (1, 2, 3)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "data.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def tool(folder, monkeypatch):
    """Runs the tool; returns what it exits with, None without an error."""

    def run(*args, opts=(), weights=True):
        custom = f"DATASETS.CUSTOM.{NAME}"
        opts = [*TINY, f"{custom}.FORMAT", "coco", f"{custom}.IMAGES", folder, f"{custom}.JSON",
                folder / "data.json", *opts]  # fmt: skip
        if weights:
            opts += ["MODEL.WEIGHTS", folder / "model.pth"]
        config = ROOT / "configs/quick_schedules/fcos_R_18_FPN_shapes.yaml"
        argv = ["visualize_fcos.py", "--config-file", config, *args, *opts]
        monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
        try:
            runpy.run_path(str(ROOT / "tools" / "visualize_fcos.py"), run_name="__main__")
        except SystemExit as error:
            return error.code

    return run


def assert_drawn(output, names):
    assert {p.name for p in output.iterdir()} == {f"{name}.png" for name in names}
    for name in names:
        pixels = cv2.imread(str(output / f"{name}.png"))
        assert min(pixels.shape[:2]) > 200 and pixels.min() < 50 and pixels.max() == 255


def test_an_image_of_ones_own(tool, folder, tmp_path, capsys):
    assert tool("--input", folder / "17.png", "--output", tmp_path, "--threshold", 0.1) is None
    assert_drawn(tmp_path, ["quality", "classes", "detections"])
    printed = capsys.readouterr().out
    assert "left top right bottom" in printed and "p3 (8)" in printed
    assert printed.count("wrote ") == 3


def test_an_image_with_its_ground_truth(tool, tmp_path, capsys):
    options = ("--dataset", NAME, "--image-id", 18, "--output", tmp_path)
    assert tool(*options) is None
    assert_drawn(tmp_path, ["quality", "classes", "detections", "positives"])


def test_a_rule_that_sees_predictions_has_no_positives_to_draw(tool, tmp_path, capsys):
    options = ("--dataset", NAME, "--image-id", 18, "--output", tmp_path)
    assert tool(*options, opts=("MODEL.FCOS.ASSIGNMENT", "simota")) is None
    assert_drawn(tmp_path, ["quality", "classes", "detections"])
    assert "No positives.png: MODEL.FCOS.ASSIGNMENT 'simota' chooses" in capsys.readouterr().out


def test_a_data_set_without_quality(tool, tmp_path, capsys):
    opts = ("MODEL.FCOS.QUALITY", "none", "MODEL.FCOS.BOX_LOSS_WEIGHTING", "none")
    options = ("--dataset", NAME, "--max-images", 1, "--output", tmp_path)
    assert tool(*options, opts=opts) is None
    assert_drawn(tmp_path, ["scores"])
    captured = capsys.readouterr()
    assert "scores.png shows class probability alone" in captured.out and "1/1" in captured.err


def test_an_image_without_quality(tool, folder, tmp_path, capsys):
    opts = ("MODEL.FCOS.QUALITY", "none", "MODEL.FCOS.BOX_LOSS_WEIGHTING", "none")
    assert tool("--input", folder / "17.png", "--output", tmp_path, opts=opts) is None
    assert_drawn(tmp_path, ["classes", "detections"])
    assert "No quality.png: MODEL.FCOS.QUALITY is 'none'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        ((), "Nothing to draw. Add --input IMAGE"),
        (("--image-id", 3), "add --dataset NAME"),
        (("--input", "a.png", "--dataset", NAME), "needs --image-id N"),
        (("--dataset", NAME, "--max-images", 0), "--max-images must be at least 1, got 0"),
        (("--dataset", "nowhere"), "No data set 'nowhere' is registered"),
        (("--dataset", NAME, "--image-id", 3), r"no image with the image_id '3'"),
        (("--input", "nowhere.png"), "No such file"),
    ],
)
def test_errors_are_one_line(tool, tmp_path, args, message):
    error = tool(*args, "--output", tmp_path / "new")
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "new").exists()


def test_other_models(tool, tmp_path):
    options = ("--dataset", NAME, "--output", tmp_path)
    error = tool(*options, opts=("MODEL.META_ARCHITECTURE", "RetinaNet"))
    assert error == "error: MODEL.META_ARCHITECTURE must be 'FCOS', got 'RetinaNet'"
    error = tool(*options, opts=("MODEL.FCOS.NUM_CLASSES", 4))
    assert "MODEL.FCOS.NUM_CLASSES is 4, but the data set" in error
    assert "names no weights: add MODEL.WEIGHTS FILE" in tool(*options, weights=False)
