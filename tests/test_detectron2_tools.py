"""Detectron2's tools, unmodified, on our configs, as a user runs them."""

import json
import os
from pathlib import Path

import detectron2
import pytest
import torch
from helpers import make_input, run_with_d2_env

from fcos_d2 import model_zoo

NAME = "quick_schedules/fcos_R_18_FPN_shapes.yaml"
SHAPES = model_zoo.get_config_file(NAME)
NAMED = os.environ.get("DETECTRON2_REPOSITORY")
# An editable install has all of them beside the package, and a wheel some.
REPOSITORY = Path(NAMED) if NAMED else Path(detectron2.__file__).parents[1]
NUM_IMAGES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shapes_folder):
    """Where the tools run: with the first images of the shapes, under datasets/."""
    folder = tmp_path_factory.mktemp("tools")
    shapes = folder / "datasets" / "shapes"
    shapes.mkdir(parents=True)
    for split in ("train", "val"):
        (shapes / split).symlink_to(shapes_folder / "shapes" / split)
        content = json.loads((shapes_folder / "shapes" / f"{split}.json").read_text())
        content["images"] = content["images"][:NUM_IMAGES]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        (shapes / f"{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Runs a tool of the repository and returns what it printed."""

    def run(tool, *args, **variables):
        if not NAMED and not (REPOSITORY / tool).is_file():
            pytest.skip(f"needs {tool}: name a clone of Detectron2 in DETECTRON2_REPOSITORY")
        variables = {
            "DETECTRON2_DATASETS": str(folder / "datasets"), "FCOS_D2_CONFIG": SHAPES
        } | variables  # fmt: skip
        result = run_with_d2_env(REPOSITORY / tool, *args, folder=folder, **variables)
        return result.stdout + result.stderr

    return run


@pytest.fixture(scope="module")
def trained(run, folder):
    """A run of train_net.py: its folder, which holds a model and results."""
    opts = ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "OUTPUT_DIR", "trained"]
    output = run("tools/train_net.py", "--config-file", SHAPES, *opts)
    assert "Evaluation results for shapes_val in csv format" in output
    return folder / "trained"


def model_of(run_folder):
    weights = str(run_folder / "model_final.pth")
    return model_zoo.get(NAME, weights=weights, device="cpu").eval()


def test_analyze_model(run, trained):
    tasks = ["--tasks", "parameter", "flop", "activation", "--num-inputs", 2]
    output = run(
        "tools/analyze_model.py", *tasks, "--config-file", SHAPES,
        "MODEL.WEIGHTS", trained / "model_final.pth",
    )  # fmt: skip
    parameters = sum(p.numel() for p in model_of(trained).parameters())
    assert f"| {parameters / 1e6:.1f}M " in output
    assert "Total GFlops: 0." in output
    assert "Total (Million) Activations: " in output


def test_plain_train_net(run, folder):
    # Losses are written from the seventh iteration on.
    opts = ["SOLVER.MAX_ITER", 7, "SOLVER.IMS_PER_BATCH", 1, "OUTPUT_DIR", "plain"]
    output = run("tools/plain_train_net.py", "--config-file", SHAPES, *opts)
    assert "loss_fcos_cls" in output and "copypaste: AP,AP50" in output
    assert (folder / "plain" / "model_final.pth").is_file()


def test_benchmark(run):
    output = run(
        "tools/benchmark.py", "--task", "eval", "--config-file", SHAPES,
        "INPUT.MIN_SIZE_TEST", 32, "MODEL.FCOS.NUM_CLS_CONVS", 0, "MODEL.FCOS.NUM_BOX_CONVS", 0,
    )  # fmt: skip
    assert "300 iters in" in output


def test_visualize_data(run, folder):
    run(
        "tools/visualize_data.py", "--source", "annotation", "--config-file", SHAPES,
        "--output-dir", "data",
    )  # fmt: skip
    assert len(list((folder / "data").iterdir())) == NUM_IMAGES


def test_visualize_json_results(run, folder, trained):
    run(
        "tools/visualize_json_results.py", "--dataset", "shapes_val", "--conf-threshold", 0.1,
        "--input", "trained/inference/coco_instances_results.json", "--output", "results",
        FCOS_D2_CONFIG=str(trained / "config.yaml"),
    )  # fmt: skip
    assert len(list((folder / "results").iterdir())) == NUM_IMAGES


def test_demo(run, folder, trained):
    # It imports its neighbour predictor.py as vision.fair.detectron2.demo.predictor.
    package = folder / "package" / "vision" / "fair" / "detectron2"
    package.mkdir(parents=True)
    (package / "demo").symlink_to(REPOSITORY / "demo")
    paths = [str(folder / "package"), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, paths))
    output = run(
        "demo/demo.py", "--config-file", SHAPES, "--input", "datasets/shapes/val/0001.png",
        "--output", "drawn.png", "--opts", "MODEL.WEIGHTS", trained / "model_final.pth",
        "MODEL.FCOS.SCORE_THRESH_TEST", 0.05, "MODEL.FCOS.SCORE_THRESH_ON", "score",
        PYTHONPATH=path,
    )  # fmt: skip
    # Hardly trained: all class probabilities are below 0.05, but not all scores.
    assert "detected 100 instances" in output
    assert (folder / "drawn.png").is_file()


def test_export_model(run, folder, trained):
    run(
        "tools/deploy/export_model.py", "--config-file", SHAPES, "--output", "exported",
        "--export-method", "tracing", "--format", "torchscript",
        "MODEL.WEIGHTS", trained / "model_final.pth", "MODEL.FCOS.SCORE_THRESH_TEST", 0.001,
    )  # fmt: skip
    traced = torch.jit.load(folder / "exported" / "model.ts")
    model = model_of(trained)
    model.post_processor.score_thresh = 0.001
    record = make_input(size=(96, 160))
    with torch.no_grad():
        expected = model([record])[0]["instances"]
        boxes, classes, scores, size = traced(record["image"])
    assert len(expected) > 10 and size.tolist() == [96, 160]
    torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scores, expected.scores)
    assert torch.equal(classes, expected.pred_classes)


def test_lazyconfig_train_net(run, folder):
    output = run(
        "tools/lazyconfig_train_net.py", "--config-file", SHAPES.replace(".yaml", ".py"),
        "train.max_iter=2", "train.output_dir=lazy", "dataloader.train.total_batch_size=2",
    )  # fmt: skip
    assert "copypaste: AP,AP50" in output
    assert (folder / "lazy" / "model_final.pth").is_file()
