"""Two processes, as train_net.py --num-gpus 2 runs them: over NCCL on GPUs, over GLOO on CPU."""

import pytest
import torch
from ddp_worker import training_step
from detectron2.engine import launch
from detectron2.modeling import build_model
from helpers import ALIGNED, GFLV2, SIMOTA, TOOD, free_port, several_processes, tiny_cfg

pytestmark = several_processes

ONE = (((10.0, 8.0, 50.0, 40.0),), (1,))
TWO = (((2.0, 4.0, 30.0, 60.0), (40.0, 10.0, 90.0, 50.0)), (0, 2))
NONE = ((), ())
CASES = [(ONE, TWO), (NONE, TWO), (ONE, NONE), (NONE, NONE)]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"LOSS_NORMALIZER": "ema_fg", "QUALITY": "iou", "BOX_LOSS_WEIGHTING": "none"},
        {"COMPILE": True},
        GFLV2,
        SIMOTA,
        ALIGNED | {"LOSS_NORMALIZER": "ema_fg"},
        TOOD,
    ],
    ids=[
        "centerness",
        "iou, moving average",
        "compiled",
        "GFLv2",
        "SimOTA",
        "task-aligned",
        "TOOD",
    ],
)
def test_two_processes_equal_one(tmp_path, monkeypatch, keys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cfg = tiny_cfg(**keys)
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    torch.save(build_model(cfg).state_dict(), tmp_path / "model.pth")

    def args(name, keys):
        return CASES, keys, str(tmp_path / "model.pth"), str(tmp_path / name)

    training_step(*args("one", {**keys, "COMPILE": False}))
    launch(training_step, 2, dist_url=f"tcp://127.0.0.1:{free_port()}", args=args("two", keys))
    one, one_state = torch.load(tmp_path / "one")
    two, two_state = torch.load(tmp_path / "two")
    for i, ((losses, gradients), (losses2, gradients2)) in enumerate(zip(one, two, strict=True)):
        for key, value in losses.items():
            assert losses2[key] == pytest.approx(value, rel=1e-4, abs=1e-7), (i, key)
        for key, value in gradients.items():
            torch.testing.assert_close(gradients2[key], value, rtol=1e-3, atol=1e-6, msg=key)
    # The moving average: a run may go on with another number of processes.
    assert one_state == two_state
