"""SOLVER.EMA: the average of the weights, and what checkpoints and evaluations make of it."""

import copy

import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.utils.env import seed_all_rng
from test_resuming import EVALUATION, run, state

from fcos_d2.checkpoint import read_checkpoint
from fcos_d2.engine import Trainer
from fcos_d2.engine.averaging import WeightAverage


@pytest.fixture
def cfg(cfg):
    cfg.SOLVER.EMA.DECAY = 0.9
    cfg.MODEL.RESNETS.NORM = "BN"
    return cfg


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: EVALUATION))


def test_the_average_is_that_of_its_definition():
    """The weights after one step; then min(decay, (1 + n) / (10 + n)) of the average stays."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    average = WeightAverage(model, decay=0.25)
    expected = None
    for n in range(5):
        for x in (*model.parameters(), *model.buffers()):
            x.data = torch.rand(x.shape) if x.is_floating_point() else x.data + 3
        average.update_parameters(model)
        now = {k: x.clone() for k, x in model.state_dict().items()}
        # (1 + n) / (10 + n) is 2/11 and 3/12 = 0.25, then more than the decay.
        keep = {0: 0.0, 1: 2 / 11}.get(n, 0.25)
        expected = {k: keep * (expected or now)[k] + (1 - keep) * x for k, x in now.items()}
        expected["1.num_batches_tracked"] = now["1.num_batches_tracked"]
        torch.testing.assert_close(average.module.state_dict(), expected)
    assert not torch.allclose(expected["0.weight"], now["0.weight"])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decays_that_cannot_be(decay):
    with pytest.raises(ValueError, match=r"SOLVER\.EMA\.DECAY must be from 0 .*, got"):
        WeightAverage(torch.nn.Identity(), decay)


def test_precise_batch_norm_is_refused(cfg):
    cfg.TEST.PRECISE_BN.ENABLED = True
    with pytest.raises(ValueError, match=r"set TEST\.PRECISE_BN\.ENABLED False, or SOLVER\.EMA"):
        Trainer(cfg)


def test_the_average_moves_after_the_statistics_and_before_they_are_used(cfg):
    names = [type(hook).__name__ for hook in Trainer(cfg)._hooks]
    # Statistics of batch norm differ between processes until they are averaged.
    i = names.index("AverageWeights")
    assert names[i - 1] == "AverageBatchNormStatistics"
    assert {"PeriodicCheckpointer", "EvalHook", "BestCheckpointer"} <= set(names[i:])


@pytest.mark.usefixtures("no_evaluation")
def test_a_resumed_run_is_the_run_that_was_never_stopped(cfg, tmp_path):
    cfg.SEED = 3
    runs = {}
    for name, stops in {"stopped": (3, 5), "undisturbed": ()}.items():
        cfg.OUTPUT_DIR = str(tmp_path / name)
        (tmp_path / name).mkdir()
        seed_all_rng(1)  # initial weights
        for i, stop in enumerate(stops):
            run(cfg, resume=i > 0, killed_before=stop)
        runs[name] = run(cfg, resume=bool(stops))
    averages = [[*x.average.module.state_dict().values(), *state(x)] for x in runs.values()]
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))
    assert runs["stopped"].average.n_averaged == 6
    raw, average = runs["stopped"].model, runs["stopped"].average.module
    assert not torch.equal(raw.head.cls_logits.weight, average.head.cls_logits.weight)
    for name in ("model_final.pth", "model_0000005.pth"):
        saved = read_checkpoint(str(tmp_path / "stopped" / name))
        assert all(torch.equal(x, saved["model"][k]) for k, x in average.state_dict().items())
        assert all(torch.equal(x, saved["raw_model"][k]) for k, x in raw.state_dict().items())


def test_the_average_is_evaluated_and_kept_as_best(cfg, tmp_path, monkeypatch):
    evaluated = []

    def evaluate(cls, cfg, model, evaluators=None):
        evaluated.append(copy.deepcopy(model.state_dict()))
        return EVALUATION

    monkeypatch.setattr(Trainer, "test", classmethod(evaluate))
    cfg.TEST.EVAL_PERIOD = 2
    run(cfg)
    assert len(evaluated) == 3
    best = read_checkpoint(str(tmp_path / "model_best.pth"))
    assert best["best_iter"] == 1
    assert all(torch.equal(x, evaluated[0][k]) for k, x in best["model"].items())
    assert any(not torch.equal(x, evaluated[0][k]) for k, x in best["raw_model"].items())
    # Whoever reads a checkpoint takes what was evaluated.
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    model = DefaultPredictor(cfg).model
    assert all(torch.equal(x, evaluated[2][k]) for k, x in model.state_dict().items())


@pytest.mark.usefixtures("no_evaluation")
def test_an_average_that_begins_or_ends_with_a_resumed_run(cfg, tmp_path, caplog):
    caplog.set_level("INFO", "fcos_d2")
    run(cfg, killed_before=2)
    with_average = read_checkpoint(str(tmp_path / "model_0000001.pth"))
    cfg.SOLVER.EMA.DECAY = 0.0
    trainer = Trainer(cfg)
    trainer.resume_or_load()
    assert trainer.average is None
    raw = with_average["raw_model"]
    assert all(torch.equal(x, raw[k]) for k, x in trainer.model.state_dict().items())
    assert "the average of the checkpoint is dropped" in caplog.text
    run(cfg, resume=True, killed_before=4)
    assert "raw_model" not in read_checkpoint(str(tmp_path / "model_0000003.pth"))

    cfg.SOLVER.EMA.DECAY = 0.9
    trainer = Trainer(cfg)
    trainer.resume_or_load()
    assert "the checkpoint has no average" in caplog.text
    assert trainer.average.n_averaged == 0
    average, model = trainer.average.module.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(x, average[k]) for k, x in model.items())


@pytest.mark.usefixtures("no_evaluation")
def test_a_buffer_that_the_config_adds_on_resuming(cfg):
    cfg.MODEL.FCOS.LOSS_NORMALIZER = "fg"
    run(cfg, killed_before=2)
    cfg.MODEL.FCOS.LOSS_NORMALIZER = "ema_fg"
    assert run(cfg, resume=True).average.module.loss.ema_num_positives > 0


@pytest.mark.usefixtures("no_evaluation")
def test_a_new_run_starts_from_the_average(cfg, tmp_path):
    run(cfg, MAX_ITER=4, STEPS=())
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    saved = read_checkpoint(cfg.MODEL.WEIGHTS)
    cfg.OUTPUT_DIR = str(tmp_path / "new")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    for model in (trainer.model, trainer.average.module):
        assert all(torch.equal(x, saved["model"][k]) for k, x in model.state_dict().items())
    assert trainer.average.n_averaged == 0
