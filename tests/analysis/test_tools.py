"""The tools as a user runs them, mostly in processes of their own."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_plots

ROOT = Path(__file__).parents[2]
CONFIG = "configs/quick_schedules/fcos_R_18_FPN_shapes.yaml"


@pytest.fixture
def tool(shapes_folder):
    env = os.environ | {"DETECTRON2_DATASETS": str(shapes_folder), "OMP_NUM_THREADS": "1"}

    def run(name, *args):
        command = [sys.executable, f"tools/{name}.py", "--config-file", CONFIG, *map(str, args)]
        return subprocess.run(
            command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=300
        )

    return run


def test_dataset_and_json_give_the_same(tool, shapes_folder, tmp_path):
    by_name = tool(
        "analyze_assignment", "--dataset", "shapes_val", "--json", tmp_path / "name.json",
        "--plot", tmp_path / "plots",
    )  # fmt: skip
    assert by_name.returncode == 0, by_name.stderr
    file = shapes_folder / "shapes" / "val.json"
    by_file = tool("analyze_assignment", "--coco-json", file, "--json", tmp_path / "file.json")
    assert by_file.returncode == 0, by_file.stderr
    numbers = json.loads((tmp_path / "name.json").read_text())
    assert numbers == json.loads((tmp_path / "file.json").read_text())
    assert numbers["images"] == 120
    assert numbers["boxes"] == len(json.loads(file.read_text())["annotations"])
    assert f"{100 * numbers['best_possible_recall']:.2f} %" in by_name.stdout
    assert "120/120" in by_name.stderr  # the progress bar
    names = {"recall_by_size.png", "positives_per_level.png", "ambiguity.png"}
    assert_plots(tmp_path / "plots", names)


def test_overrides_of_the_config(tool, shapes_folder, tmp_path):
    # The first box becomes a crowd, to show that --include-crowd works too.
    data = json.loads((shapes_folder / "shapes" / "val.json").read_text())
    data["annotations"][0]["iscrowd"] = 1
    (tmp_path / "crowd.json").write_text(json.dumps(data))
    result = tool(
        "analyze_assignment", "--coco-json", tmp_path / "crowd.json", "--include-crowd",
        "--json", tmp_path / "new" / "out.json", "MODEL.FCOS.CENTER_SAMPLING_RADIUS", "0.0",
        "INPUT.MIN_SIZE_TEST", "256",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "new" / "out.json").read_text())
    assert numbers["settings"]["center_sampling_radius"] == 0
    assert numbers["settings"]["min_size_test"] == 256
    assert numbers["left_out"]["crowd"] == 0
    assert numbers["boxes"] == len(data["annotations"])


def test_analyze_model(tool):
    result = tool("analyze_model", "--size", "128", "96", "MODEL.FCOS.NUM_CLASSES", "80")
    assert result.returncode == 0, result.stderr
    assert "One image of 128 x 96 pixels" in result.stdout
    # 9 * (80 + 4) / (80 + 4 + 1) = 8.894: the paper's "9 times fewer"
    outputs = next(x for x in result.stdout.splitlines() if x.startswith("outputs"))
    assert outputs.split()[-1] == "8.89"


@pytest.fixture
def run_in_process(monkeypatch):
    """Runs analyze_assignment.py in this process, which is faster; returns what it exits with."""

    def run(*args):
        argv = ["analyze_assignment.py", "--config-file", str(ROOT / CONFIG), *map(str, args)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as e:
            runpy.run_path(str(ROOT / "tools" / "analyze_assignment.py"), run_name="__main__")
        return e.value.code

    return run


def test_errors_are_one_line(run_in_process, tmp_path):
    (tmp_path / "voc.json").write_text("{}")
    message = run_in_process("--coco-json", tmp_path / "voc.json")
    assert message.startswith("error: ") and "voc.json is not a COCO annotation file" in message
    assert "No such file" in run_in_process("--coco-json", tmp_path / "nowhere.json")


@pytest.mark.parametrize("sources", [(), ("--dataset", "x", "--coco-json", "y")])
def test_exactly_one_source(run_in_process, sources, capsys):
    assert run_in_process(*sources) == 2
    message = capsys.readouterr().err
    assert "--dataset" in message and "--coco-json" in message
