"""tools/check_dataset.py as a user runs it, and the levels that boxes go to."""

import json
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.structures import BoxMode
from helpers import assert_plots, tiny_cfg

from fcos_d2.analysis import analyze_assignment, analyze_boxes

ROOT = Path(__file__).parents[2]
CONFIG = "configs/quick_schedules/fcos_R_18_FPN_shapes.yaml"


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def check_dataset(shapes_folder, monkeypatch, capsys):
    """Runs the tool in this process, which is faster."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    monkeypatch.chdir(ROOT)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["check_dataset.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path("tools/check_dataset.py", run_name="__main__")
        code, (stdout, stderr) = end.value.code, capsys.readouterr()
        # Python itself prints a text, and ends with 1.
        return Result(1, stdout, code) if isinstance(code, str) else Result(code, stdout, stderr)

    return run


def test_the_data_sets_of_a_config(check_dataset, shapes_folder, tmp_path):
    result = check_dataset(
        "--config-file", CONFIG, "--json", tmp_path / "a.json", "--plot", tmp_path / "plots"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["counts"]["error"] == 0
    assert list(content["statistics"]) == ["shapes_train", "shapes_val"]
    annotations = json.loads((shapes_folder / "shapes" / "val.json").read_text())["annotations"]
    annotated = {a["image_id"] for a in annotations}
    empty = [f for f in content["findings"]["shapes_val"] if f["kind"] == "image without boxes"]
    assert [f["image"] for f in empty] == [i for i in range(1, 121) if i not in annotated]
    numbers = content["statistics"]["shapes_val"]
    assert numbers["images"] == 120 and set(numbers["boxes"]) == {"disc", "square", "triangle"}
    by_level = {level: sum(bins.values()) for level, bins in numbers["sizes"].items()}
    assert sum(by_level.values()) == sum(numbers["boxes"].values())
    assert "120/120" in result.stderr  # the progress bar
    names = {"classes.png", "sizes_shapes_train.png", "sizes_shapes_val.png"}
    assert_plots(tmp_path / "plots", names)


def test_a_rule_that_sees_predictions_sends_boxes_to_no_level(check_dataset, tmp_path):
    config = CONFIG.replace("fcos_R_18", "simota_R_18")
    options = "--config-file", config, "--no-images", "--dataset", "shapes_val"
    result = check_dataset(*options, "--json", tmp_path / "a.json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No levels and no boxes without a location: 'simota'" in result.stdout
    content = json.loads((tmp_path / "a.json").read_text())
    assert list(content["statistics"]["shapes_val"]["sizes"]) == ["boxes"]


def test_errors_and_the_cleaned_copy(check_dataset, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((30, 40, 3), np.uint8))
    images = [{"id": i, "file_name": f"{n}.png", "height": 30, "width": 40} for i, n in ((1, "a"),
              (2, "gone"))]  # fmt: skip
    boxes = [[1, 1, 10, 10], [1, 1, 0, 10]]
    content = {
        "images": images,
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": b} for i, b in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "a $x^2$ & <b> \ud800"}],
    }
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(content))
    out, found = tmp_path / "new" / "out.json", tmp_path / "found.json"
    before = file.read_bytes()
    arguments = ("--data", file, "--fix", out, "--json", found, "--plot", tmp_path)
    result = check_dataset(*arguments)
    assert result.returncode == 1, result.stderr
    assert "2 errors" in result.stdout
    errors = [
        f for f in json.loads(found.read_text())["findings"]["all"] if f["severity"] == "error"
    ]
    assert [(f["kind"], f["file"], f["annotation"]) for f in errors] == [
        ("a box without area", str(file), 2),
        ("no image", str(tmp_path / "gone.png"), None),
    ]
    fixed = json.loads(out.read_text())
    assert [i["file_name"] for i in fixed["images"]] == ["a.png"]
    assert [a["id"] for a in fixed["annotations"]] == [1]
    # A file that exists stays as it is, above all the original.
    for existing in (out, file):
        result = check_dataset("--data", file, "--no-images", "--fix", existing)
        assert result.returncode == 1 and "Name another file for --fix" in result.stderr
    assert file.read_bytes() == before and json.loads(out.read_text()) == fixed


@pytest.mark.parametrize("arguments", [["--data", "{}"], ["--data", "{}", "--config-file", CONFIG]])
def test_augmented_images_of_a_folder(check_dataset, shapes_folder, tmp_path, arguments):
    out = tmp_path / "new" / "a.png"
    arguments = [a.format(shapes_folder / "shapes") for a in arguments]
    changes = ("INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.SIZE", "96")
    result = check_dataset(*arguments, "--no-images", "--augmented", out, *changes)
    assert result.returncode == 0, result.stderr
    assert f"wrote {out}" in result.stdout
    assert cv2.imread(str(out)).std() > 20


def test_augmented_images_of_a_config(check_dataset, tmp_path):
    """The seed makes the picture, and each data set another one."""
    pictures = []
    for seed, name in ((1, "shapes_train"), (1, "shapes_train"), (2, "shapes_train"),
                       (1, "shapes_val")):  # fmt: skip
        arguments = ("--config-file", CONFIG, "--no-images", "--dataset", name)
        out = tmp_path / "a.jpg"
        assert check_dataset(*arguments, "--augmented", out, "SEED", seed).returncode == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] and len(set(pictures)) == 3


def test_what_cannot_be_drawn(check_dataset, shapes_folder, tmp_path):
    data = ("--data", shapes_folder / "shapes", "--no-images")
    result = check_dataset(*data, "--augmented", tmp_path / "a.jpg", "INPUT.COLOR", "1.5")
    assert result.returncode == 1 and "INPUT.COLOR must be" in result.stderr
    assert "images" not in result.stdout  # before anything is checked
    result = check_dataset(*data, "--augmented", tmp_path / "a.gif")
    assert result.returncode == 2 and "must end in .jpg or .png" in result.stderr
    shutil.copytree(shapes_folder / "shapes", tmp_path / "bad")
    (tmp_path / "bad" / "train" / "0100.png").unlink()
    out = tmp_path / "a.jpg"
    result = check_dataset("--data", tmp_path / "bad", "--split", "train", "--augmented", out)
    assert result.returncode == 1 and not out.exists()
    assert "no image" in result.stdout and "1 of 542 images" in result.stderr


def test_what_cannot_be_read_at_all(check_dataset, tmp_path):
    (tmp_path / "a.json").write_text('{"images": [')
    result = check_dataset("--data", tmp_path / "a.json")
    assert result.returncode == 1
    assert "a.json is not a JSON file, or is cut short" in result.stderr
    assert "Traceback" not in result.stderr


def test_boxes_of_each_level():
    """Beside analyze_assignment, and two boxes whose levels are plain to see."""
    boxes = [[0, 0, 40, 40], [60, 60, 61, 61], [0, 0, 128, 128], [10, 10, 50, 50]]
    record = {
        "height": 128,
        "width": 128,
        "annotations": [
            {"bbox": b, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": int(i == 3)}
            for i, b in enumerate(boxes)
        ],
    }
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 128
    empty = {"height": 128, "width": 128, "annotations": []}
    found = analyze_boxes(cfg, [empty, record])
    assert found.boxes == ((1, 0), (1, 1), (1, 2))  # a crowd is left out
    assert found.sides.tolist() == [40, 1, 128]
    # 1 pixel at (60, 60) has no location: they are at 4, 12, ... of P3, 8, 24, ... of P4, 16, 48.
    # (60, 60) itself is one of P3, but on the edge, not inside.
    assert found.unowned == [(1, 1)]
    by_level = analyze_assignment(cfg, [empty, record]).levels
    assert found.positives.sum(dim=0).tolist() == [level.positives for level in by_level]
    assert found.positives[0, 0] > 0 and found.positives[2, 0] == 0
    nothing = analyze_boxes(cfg, [])
    assert nothing.boxes == () and nothing.positives.shape[1] == len(nothing.level_names)
