"""train_net.py as a user runs it, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from helpers import LIGHT, free_port, several_processes

from fcos_d2 import model_zoo
from fcos_d2.config import load_cfg

ROOT = Path(__file__).parents[1]
CONFIG = "configs/quick_schedules/fcos_R_18_FPN_shapes.yaml"
SMALL = [
    *LIGHT, "MODEL.FCOS.NUM_CLS_CONVS", "1", "MODEL.FCOS.NUM_BOX_CONVS", "1",
    "SOLVER.IMS_PER_BATCH", "2", "MODEL.FCOS.LOSS_NORMALIZER", "ema_fg",
]  # fmt: skip


@pytest.fixture
def train_net(shapes_folder, tmp_path):
    """Starts train_net.py with its output in tmp_path/output."""
    ours = os.environ | {"DETECTRON2_DATASETS": str(shapes_folder), "OMP_NUM_THREADS": "1"}

    def start(*args, opts=(), launcher=(), env=None):
        command = [sys.executable, *launcher, "train_net.py", "--config-file", CONFIG, *args]
        command += [*SMALL, "OUTPUT_DIR", str(tmp_path / "output"), *map(str, opts)]
        # A pipe that nobody reads would stop the process once it is full.
        printed = tmp_path / f"printed_{len(started)}.txt"
        with printed.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=ours | (env or {}), stdout=file, stderr=subprocess.STDOUT
            )
        process.printed = printed
        started.append(process)
        return process

    started = []
    yield start
    for process in started:
        process.kill()


def finish(process, timeout=300, exit_code=0):
    process.wait(timeout)
    output = process.printed.read_text()
    assert process.returncode == exit_code, output[-3000:]
    return output


def wait_for(process, file, seconds=300):
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@several_processes
def test_two_processes_stop_by_a_signal_and_one_goes_on(train_net, tmp_path):
    folder = tmp_path / "output"
    long = ["SOLVER.MAX_ITER", 10000, "SOLVER.CHECKPOINT_PERIOD", 2]
    process = train_net("--num-gpus", "2", "--dist-url", "auto", opts=long)
    wait_for(process, folder / "model_0000001.pth")
    process.send_signal(signal.SIGTERM)
    output = finish(process, timeout=60, exit_code=143)
    assert "World size: 2" in output
    # Those without boxes are left out before.
    assert output.count("shapes_train: 542 images, 1583 boxes; ") == 1
    last = torch.load(folder / (folder / "last_checkpoint").read_text())["iteration"]
    assert f"Stopped by a signal after iteration {last}" in output

    # A low threshold: after so few iterations no score is high, and AP is NaN without detections.
    opts = ["SOLVER.MAX_ITER", last + 3, "MODEL.FCOS.SCORE_THRESH_TEST", 0.001]
    output = finish(train_net("--resume", opts=opts))
    assert f"Starting training from iteration {last + 1}" in output
    metrics = {}
    for line in (folder / "metrics.json").open():
        metrics |= json.loads(line)
    assert {"bbox/AP", "loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"} <= metrics.keys()
    assert metrics["fcos/positives_per_image"] > 0
    assert list(folder.glob("events.out.tfevents*"))  # TensorBoard
    assert f"The report: {folder / 'report' / 'index.html'}" in output
    numbers = json.loads((folder / "report" / "report.json").read_text())
    assert numbers["ap"]["output"]["AP"] == pytest.approx(metrics["bbox/AP"], abs=1e-9)
    assert torch.load(folder / "model_final.pth")["iteration"] == last + 2


def slurm(rank, port):
    return {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank),
            "SLURM_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "7", "MASTER_PORT": port}  # fmt: skip


@several_processes
@pytest.mark.parametrize("how", ["torchrun", "slurm", "two machines"])
def test_processes_that_others_start_are_one_run(train_net, tmp_path, how):
    """Each has a share of the batch and of the test set, and one of them writes."""
    opts, port = ["SOLVER.MAX_ITER", 2], free_port()
    if how == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
        outputs = [finish(train_net(opts=opts, launcher=torchrun))]
    elif how == "slurm":
        processes = [train_net(opts=opts, env=slurm(rank, port)) for rank in (0, 1)]
        outputs = [finish(process) for process in processes]
    else:
        url = ["--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{port}"]
        processes = [train_net(*url, "--machine-rank", str(r), opts=opts) for r in (0, 1)]
        outputs = [finish(process) for process in processes]
    output = "".join(outputs)
    assert "World size: 2" in output
    assert output.count("Saving checkpoint to") == 2  # model_final and model_best
    assert output.count("Evaluation results for bbox") == 1
    assert len(list((tmp_path / "output").glob("events.out.tfevents*"))) == 1


@several_processes
def test_two_processes_end_early_after_the_same_step(train_net, tmp_path):
    folder = tmp_path / "output"
    early = ["SOLVER.MAX_ITER", 100, "TEST.EVAL_PERIOD", 1, "TEST.PATIENCE", 2, "TEST.LOSS", True]
    early += ["MODEL.FCOS.SCORE_THRESH_TEST", 0.99]  # which nothing reaches: AP is NaN
    output = finish(train_net("--num-gpus", "2", "--dist-url", "auto", opts=early))
    assert output.count("The training ends early, after iteration 1: bbox/AP had no new best") == 1
    assert torch.load(folder / "model_final.pth")["iteration"] == 1
    assert "Starting training from iteration 2" in finish(train_net("--resume", opts=early))
    assert torch.load(folder / "model_final.pth")["iteration"] == 1
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    (last,) = [row for row in rows if row["iteration"] == 1]

    # The losses are those of one process, on the same images.
    opts = ["MODEL.WEIGHTS", folder / "model_final.pth", "TEST.LOSS", True]
    output = finish(train_net("--eval-only", opts=opts))
    assert f"total_loss {last['test/total_loss']:.4g}\n" in output


def test_killed_run_resumes_and_its_weights_predict(train_net, tmp_path):
    folder = tmp_path / "output"
    process = train_net(opts=["SOLVER.MAX_ITER", 10000, "SOLVER.CHECKPOINT_PERIOD", 2])
    wait_for(process, folder / "model_0000003.pth")
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = (folder / "last_checkpoint").read_text()
    saved = torch.load(folder / last)
    begin = saved["iteration"] + 1
    saved["model"]["loss.ema_num_positives"].fill_(1e6)  # to be told apart from a fresh 100
    torch.save(saved, folder / last)

    output = finish(
        train_net(
            "--resume",
            opts=["SOLVER.MAX_ITER", begin + 2, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", ()],
        )
    )
    assert f"Starting training from iteration {begin}" in output
    final = torch.load(folder / "model_final.pth")
    assert final["iteration"] == begin + 1
    assert final["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == begin + 2
    # Two more steps of momentum 0.9 from the saved value.
    assert final["model"]["loss.ema_num_positives"] == pytest.approx(0.81e6, rel=1e-3)

    cfg = load_cfg(str(folder / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.001
    image = cv2.imread(str(next((tmp_path.parent).rglob("shapes/val/0001.png"))))
    detections = DefaultPredictor(cfg)(image)["instances"]
    assert detections.image_size == image.shape[:2]
    assert len(detections) > 0


def test_eval_only(train_net, tmp_path):
    cfg = model_zoo.get_config("quick_schedules/fcos_R_18_FPN_shapes.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(SMALL)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    process = train_net("--eval-only", opts=["MODEL.WEIGHTS", tmp_path / "model.pth",
                                             "MODEL.FCOS.SCORE_THRESH_TEST", 0.001,
                                             "TEST.AUG.ENABLED", True,
                                             "TEST.AUG.MIN_SIZES", (128, 160)])  # fmt: skip
    output = finish(process)
    assert output.count("Evaluation results for bbox") == 2  # plain and augmented
    assert not (tmp_path / "output" / "metrics.json").exists()


def test_rgb_and_bgr_models_see_the_same_picture():
    """A model whose first layer is flipped with its input format predicts the same."""
    predictors = {}
    for channel_order in ("BGR", "RGB"):
        cfg = model_zoo.get_config("quick_schedules/fcos_R_18_FPN_shapes.yaml")
        cfg.MODEL.DEVICE = "cpu"
        cfg.INPUT.FORMAT = channel_order
        cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.0
        torch.manual_seed(0)
        predictors[channel_order] = DefaultPredictor(cfg)
    weight = predictors["RGB"].model.backbone.bottom_up.stem.conv1.weight
    with torch.no_grad():
        weight.copy_(weight.flip(1))
    image = (torch.rand(96, 128, 3) * 255).byte().numpy()
    bgr, rgb = (predictors[c](image)["instances"] for c in ("BGR", "RGB"))
    torch.testing.assert_close(bgr.scores, rgb.scores)
    torch.testing.assert_close(bgr.pred_boxes.tensor, rgb.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
