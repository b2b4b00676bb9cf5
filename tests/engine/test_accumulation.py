"""SOLVER.ACCUMULATE: a step in several parts learns as from one large batch."""

import pytest
import torch
from accumulation_worker import CASES, step
from detectron2.engine import launch
from detectron2.modeling import build_model
from helpers import free_port, make_input, several_processes, tiny_cfg

from fcos_d2.engine import Trainer
from fcos_d2.engine.step_trainer import StepTrainer

# The parts of a case have different numbers of positives, some none: divided by its own, each would
# give other gradients.
KEYS = {
    "centerness": {},
    "moving average": {"LOSS_NORMALIZER": "ema_fg"},
    "joint": {"QUALITY": "joint", "CLS_LOSS_TYPE": "varifocal", "BOX_LOSS_WEIGHTING": "none"},
    "iou": {"LOSS_NORMALIZER": "ema_fg", "QUALITY": "iou", "BOX_LOSS_WEIGHTING": "none"},
}


def assert_same_steps(steps, others):
    for i, (ours, theirs) in enumerate(zip(steps, others, strict=True)):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4, abs=1e-7), i
        for what in ("gradients", "averaged weights"):
            for name, value in theirs[what].items():
                torch.testing.assert_close(
                    ours[what][name], value, rtol=1e-3, atol=1e-6, msg=f"{i} {what} {name}"
                )
        what = "average of positives"
        assert ours[what] == pytest.approx(theirs[what], rel=1e-6), i


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_parts_equal_one_large_batch(keys, tmp_path):
    whole, halves, quarters = (tmp_path / str(n) for n in (1, 2, 4))
    step(keys, 1, whole), step(keys, 2, halves), step(keys, 4, quarters)
    whole = torch.load(whole)
    assert_same_steps(torch.load(halves), whole)
    assert_same_steps(torch.load(quarters), whole)


@several_processes
def test_parts_of_two_processes_equal_one_large_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    keys = KEYS["moving average"]
    step(keys, 1, tmp_path / "one")
    launch(step, 2, dist_url=f"tcp://127.0.0.1:{free_port()}", args=(keys, 1, tmp_path / "two"))
    launch(step, 2, dist_url=f"tcp://127.0.0.1:{free_port()}", args=(keys, 2, tmp_path / "parts"))
    one, two, parts = (torch.load(tmp_path / name) for name in ("one", "two", "parts"))
    assert_same_steps(parts, one)
    # The gradients are shared once a step, as without parts.
    assert [x["reductions"] for x in parts] == [x["reductions"] for x in two]
    assert len(CASES) == len(parts) and all(x["reductions"] > 0 for x in parts)


def test_positives_are_counted_as_in_the_forward_pass(monkeypatch):
    """For images of sizes that no stride divides, with a box that reaches beyond one of them."""
    model = build_model(tiny_cfg()).train()
    parts = [
        [make_input(size=(65, 97)), make_input(((3.0, 2.0, 20.0, 90.0),), size=(131, 40))],
        [make_input(((1.0, 1.0, 70.0, 80.0),), size=(33, 70)), make_input((), (), size=(50, 50))],
    ]
    counts = []
    forward = model.loss.forward
    monkeypatch.setattr(
        model.loss, "forward", lambda x, targets, *args: (
            counts.append(len(targets)) or forward(x, targets, *args)
        )
    )  # fmt: skip
    normalizers = model.loss_normalizers(parts)
    for part in parts:
        model(part, normalizers)
    assert min(counts) > 0 and counts[0] != counts[1]
    assert normalizers.num_positives.item() == sum(counts) / 2  # their mean is over two parts


class OtherModel(torch.nn.Module):
    """The loss is the mean of its numbers times the weight: a model that knows of no parts."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, numbers):
        return {"loss": self.weight * sum(numbers) / len(numbers)}


def test_other_models_learn_from_the_mean_of_the_parts(caplog):
    model = OtherModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = StepTrainer(model, iter([[1.0, 2.0, 4.0, 9.0]]), optimizer, "cpu", None, accumulate=2)
    assert "OtherModel learns from the mean" in caplog.text
    trainer.iter = 0
    trainer.run_step()
    # Means of the parts 1.5 and 6.5, their mean 4: the weight goes from 2 to -2, the loss was 8.
    assert model.weight.item() == -2
    assert trainer._steps[0][2] == {"loss": 8.0}


def test_the_loss_scale_moves_once_a_step():
    model = build_model(tiny_cfg()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = iter([[make_input(seed=i) for i in range(4)]])
    trainer = StepTrainer(model, data, optimizer, "cpu", None, accumulate=4)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    trainer.iter = 0
    trainer.run_step()
    assert trainer.grad_scaler.get_scale() == 16  # doubled once


@pytest.mark.parametrize("parts", [0, 3])
def test_parts_of_different_sizes_are_refused(cfg, parts):
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE = 4, parts
    with pytest.raises(ValueError, match=rf"ACCUMULATE {parts} .*choose one of \[1, 2, 4\]"):
        Trainer(cfg)
