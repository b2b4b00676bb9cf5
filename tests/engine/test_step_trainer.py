"""SOLVER.AMP on CPU, and which precision it takes where."""

import re

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import make_input, tiny_cfg

from fcos_d2.data import register_custom_datasets
from fcos_d2.engine import Trainer
from fcos_d2.engine.amp import amp_dtype
from fcos_d2.engine.step_trainer import StepTrainer


@pytest.mark.parametrize(
    ("device", "dtype", "gpu_has_bfloat16", "expected"),
    [
        ("cpu", "auto", False, torch.bfloat16),
        ("cpu", "bfloat16", False, torch.bfloat16),
        ("cuda", "auto", True, torch.bfloat16),
        ("cuda", "auto", False, torch.float16),
        ("cuda:1", "float16", True, torch.float16),
        ("cuda", "bfloat16", False, torch.bfloat16),
    ],
)
def test_dtype(monkeypatch, device, dtype, gpu_has_bfloat16, expected):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_has_bfloat16
    )
    cfg = tiny_cfg()
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.DTYPE = device, dtype
    assert amp_dtype(cfg) == expected
    # Detectron2's RoI heads round boxes in bfloat16, so it has to be asked for.
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    if device == "cuda" and dtype == "auto":
        assert amp_dtype(cfg) == torch.float16


def test_dtype_that_cannot_be():
    cfg = tiny_cfg()
    cfg.SOLVER.AMP.DTYPE = "float16"
    with pytest.raises(ValueError, match=r"'float16' needs a GPU, MODEL\.DEVICE is 'cpu'"):
        amp_dtype(cfg)
    cfg.SOLVER.AMP.DTYPE = "half"
    with pytest.raises(ValueError, match=r"must be one of \['auto', .*'half'"):
        amp_dtype(cfg)


def make_trainer(amp):
    torch.manual_seed(0)
    model = build_model(tiny_cfg()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = StepTrainer(
        model, iter(lambda: [make_input(), make_input(seed=1)], None), optimizer, "cpu", amp
    )
    return trainer


def test_trains_in_bfloat16_as_in_float32():
    half, full = make_trainer(torch.bfloat16), make_trainer(torch.float32)
    seen = set()
    half.model.head.cls_logits.register_forward_hook(lambda m, i, output: seen.add(output.dtype))
    losses = {}
    for trainer in (half, full):
        with EventStorage(0) as storage:
            for trainer.iter in range(12):
                trainer.run_step()
            trainer.gather_metrics()
        losses[trainer] = [loss for loss, _ in storage.history("total_loss").values()]
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    # The first loss is of the same weights, so only rounding differs.
    assert losses[half][0] == pytest.approx(losses[full][0], rel=0.02)
    assert losses[half][-1] < 0.8 * losses[half][0]
    assert losses[half][-1] == pytest.approx(losses[full][-1], rel=0.1)


def test_resumes_from_runs_of_any_precision():
    trainer = make_trainer(torch.bfloat16)
    state = trainer.state_dict()
    for scale in ({}, {"scale": 4.0, "growth_factor": 2.0}, None):
        saved = {k: v for k, v in state.items() if k != "grad_scaler"}
        trainer.load_state_dict(saved if scale is None else {**saved, "grad_scaler": scale})
    # float16 scales its losses: where a run left off, or anew.
    scaler = trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.load_state_dict(state)
    assert scaler.get_scale() == 8.0
    trainer.load_state_dict({**state, "grad_scaler": {**scaler.state_dict(), "scale": 32.0}})
    assert scaler.get_scale() == 32.0


def test_trainer_takes_it_from_the_config(shapes_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    cfg = tiny_cfg()
    cfg.OUTPUT_DIR, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = str(tmp_path), 2, 2
    cfg.SOLVER.AMP.ENABLED, cfg.DATASETS.TEST = True, ()
    register_custom_datasets(cfg)
    trainer = Trainer(cfg)
    assert trainer._trainer.dtype == torch.bfloat16
    trainer.train()
    assert (tmp_path / "model_final.pth").is_file()
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2


def test_metrics_are_those_of_detectron2():
    """Of many steps at once, with the numbers that Detectron2 reads in each step."""
    ours, theirs = make_trainer(None), make_trainer(None)
    theirs = SimpleTrainer(theirs.model, theirs.data_loader, theirs.optimizer)
    histories = []
    for trainer in (ours, theirs):
        with EventStorage(0) as storage:
            for trainer.iter in range(3):
                storage.iter = trainer.iter
                trainer.run_step()
            if trainer is ours:
                trainer.gather_metrics()
                trainer.gather_metrics()  # nothing is written twice
        histories.append({k: h.values() for k, h in storage.histories().items()})
    assert histories[0].keys() == histories[1].keys()
    for name in histories[0].keys() - {"data_time", "rank_data_time"}:
        assert histories[0][name] == histories[1][name]
    assert [iteration for _, iteration in histories[0]["data_time"]] == [0, 1, 2]


def test_a_loss_that_is_not_finite_is_found_with_its_iteration():
    trainer = make_trainer(None)
    with EventStorage(0):
        for trainer.iter in range(4):
            if trainer.iter == 2:
                torch.nn.init.constant_(trainer.model.head.cls_logits.bias, torch.nan)
            trainer.run_step()
        with pytest.raises(FloatingPointError, match="iteration=2"):
            trainer.gather_metrics()


class Greedy(torch.nn.Module):
    """Has memory for two images at once."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return {"loss": self.weight * len(batch)}


def test_a_batch_that_does_not_fit_says_which_numbers_to_try():
    model = Greedy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(images, accumulate):
        trainer = StepTrainer(
            model, iter([[{}] * images]), optimizer, "cpu", dtype=None, accumulate=accumulate
        )
        trainer.iter = 0
        trainer.run_step()

    with pytest.raises(torch.OutOfMemoryError) as error:
        step(12, 1)
    assert str(error.value).startswith("12 image(s) at once do not fit the memory of the device")
    assert "Tried to allocate" in str(error.value.__cause__)
    # It is followed until it fits.
    tried = [1]
    while True:
        try:
            step(12, tried[-1])
        except torch.OutOfMemoryError as error:
            assert "or --batch 6 (the" in str(error)
            tried.append(int(re.search(r"SOLVER\.ACCUMULATE (\d+) \(the same", str(error))[1]))
        else:
            break
    assert tried == [1, 2, 3, 4, 6]  # parts of 12, 6, 4, 3 and 2 images
