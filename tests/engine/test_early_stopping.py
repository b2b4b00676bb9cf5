import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase

from fcos_d2.engine import Stopped, Trainer

NAN = math.nan


class Killed(HookBase):
    """Ends the process without a chance to save or to write, as a kill does."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            self.trainer._writers.clear()
            raise KeyboardInterrupt


@pytest.fixture
def aps(cfg, monkeypatch):
    """The AP of each evaluation to come, after every second of ten iterations."""
    cfg.TEST.EVAL_PERIOD, cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 2, 10, 100
    cfg.SEED, cfg.DATALOADER.NUM_WORKERS = 1, 0
    left = []
    monkeypatch.setattr(
        Trainer, "test", classmethod(lambda *args: {"bbox": {"AP": left.pop(0), "AP50": 1.0}})
    )
    return left


@pytest.fixture
def no_steps(monkeypatch):
    """Where only the order of things matters."""

    def run_step(trainer):
        trainer.last_step = trainer.iter
        trainer.storage.put_scalar("total_loss", 1.0)

    monkeypatch.setattr(Trainer, "run_step", run_step)


def run(cfg, patience, resume=False, killed_before=None, weights=None):
    cfg = cfg.clone()
    cfg.TEST.PATIENCE = patience
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    if weights is not None:
        trainer.model.load_state_dict(weights)
    if killed_before is not None:
        trainer.register_hooks([Killed(killed_before)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    return trainer


def evaluations(trainer):
    return {iteration: ap for ap, iteration in trainer.storage.history("bbox/AP").values()}


@pytest.mark.usefixtures("no_steps")
def test_a_training_ends_early_like_a_finished_one(cfg, aps, tmp_path):
    aps += [20.0, 30.0, 30.0, 25.0, 99.0]
    trainer = run(cfg, patience=2)
    assert aps == [99.0]  # a value as high as the best is no new one
    assert evaluations(trainer) == {1: 20.0, 3: 30.0, 5: 30.0, 7: 25.0}
    assert trainer.last_step == 7
    final, best = (torch.load(tmp_path / f"model_{name}.pth") for name in ("final", "best"))
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert final["iteration"] == 7
    assert (best["best_metric"], best["best_iter"]) == (30.0, 3)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(final["model"][name], value)
    rows = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    (row,) = [row for row in rows if "total_loss" in row]
    assert (row["iteration"], row["bbox/AP"]) == (7, 25.0)


@pytest.mark.usefixtures("no_steps")
def test_a_run_that_has_ended_is_not_resumed_by_chance(cfg, aps, caplog):
    aps += [20.0, 10.0, 10.0]
    run(cfg, patience=2)
    before = Path(cfg.OUTPUT_DIR, "metrics.json").read_text()
    caplog.clear()
    with caplog.at_level("INFO"):
        resumed = run(cfg, patience=2, resume=True)
    assert resumed.last_step == 5  # no step, and no evaluation, of which none is left
    assert "ends early, after iteration 5: bbox/AP had no new best in 2 evaluations" in caplog.text
    assert Path(cfg.OUTPUT_DIR, "metrics.json").read_text() == before
    assert run(cfg, patience=1, resume=True).last_step == 5


@pytest.mark.parametrize("patience", [0, 3])
def test_a_run_that_has_ended_goes_on_exactly(cfg, aps, tmp_path, patience):
    weights = Trainer.build_model(cfg).state_dict()
    aps += [20.0, 10.0, 10.0, 10.0, 40.0]
    cfg.OUTPUT_DIR = str(tmp_path / "ended")
    assert run(cfg, patience=2, weights=weights).last_step == 5
    resumed = run(cfg, patience=patience, resume=True)
    # A third evaluation without a gain.
    assert resumed.last_step == (9 if patience == 0 else 7)
    assert len(aps) == (0 if patience == 0 else 1)

    aps[:] = [20.0, 10.0, 10.0, 10.0, 40.0]
    cfg.OUTPUT_DIR = str(tmp_path / "undisturbed")
    undisturbed = run(cfg, patience=patience, weights=weights)
    assert undisturbed.last_step == resumed.last_step
    momentum = [
        [s["momentum_buffer"] for s in t.optimizer.state.values()] for t in (undisturbed, resumed)
    ]
    assert len(momentum[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*momentum, strict=True))
    states = [t.model.state_dict().values() for t in (undisturbed, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize(
    ("checkpoint_period", "killed_before", "start"),
    [
        (3, 5, 3),  # the evaluation after iteration 3 comes again
        (5, 7, 5),  # that after 3 is in the checkpoint of 4, that after 5 comes again
        (2, 5, 4),  # the checkpoint of 3 was written before that evaluation, which was lost
    ],
)
@pytest.mark.usefixtures("no_steps")
def test_the_count_survives_a_kill(cfg, aps, checkpoint_period, killed_before, start):
    cfg.SOLVER.CHECKPOINT_PERIOD = checkpoint_period
    values = [20.0, 10.0, 19.0, 15.0, 99.0]
    aps += values
    run(cfg, patience=3, killed_before=killed_before)
    assert not Path(cfg.OUTPUT_DIR, "metrics.json").read_text()
    aps[:] = values[1:] if start < 5 else values[2:]
    resumed = run(cfg, patience=3, resume=True)
    assert resumed.start_iter == start
    assert resumed.last_step == 7
    assert aps == [99.0]


@pytest.mark.usefixtures("no_steps")
def test_the_count_survives_a_stop(cfg, aps):
    """The checkpoint that a signal leaves after an evaluation has not counted it."""

    class Tell(HookBase):
        def before_step(self):
            if self.trainer.iter == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    aps += [20.0, 10.0, 10.0, 10.0, 99.0]
    cfg.TEST.PATIENCE = 3
    trainer = Trainer(cfg)
    trainer.register_hooks([Tell()])
    with pytest.raises(Stopped):
        trainer.train()
    assert evaluations(trainer) == {1: 20.0, 3: 10.0, 5: 10.0}
    assert run(cfg, patience=3, resume=True).last_step == 7
    assert aps == [99.0]


@pytest.mark.usefixtures("no_steps")
def test_an_end_that_a_kill_cut_short_is_made_up_for(cfg, aps, tmp_path):
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    aps += [20.0, 10.0, 10.0]
    run(cfg, patience=2)
    (tmp_path / "model_final.pth").unlink()
    assert (tmp_path / "model_0000005.pth").exists()
    resumed = run(cfg, patience=2, resume=True)
    assert (resumed.start_iter, resumed.last_step) == (6, 5)
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 5
    assert run(cfg, patience=2, resume=True).last_step == 5


@pytest.mark.usefixtures("no_steps")
def test_nan_is_no_gain(cfg, aps):
    aps += [NAN, NAN, NAN, 99.0, 99.0]
    assert run(cfg, patience=3).last_step == 5
    aps[:] = [NAN, 20.0, NAN, NAN, 99.0]
    cfg.OUTPUT_DIR += "/other"
    assert run(cfg, patience=2).last_step == 7


@pytest.mark.usefixtures("no_steps")
def test_without_patience_evaluations_are_counted_for_a_resumed_run(cfg, aps):
    cfg.SOLVER.CHECKPOINT_PERIOD = 5
    aps += [20.0, 10.0, 10.0]
    run(cfg, patience=0, killed_before=6)
    aps[:] = [10.0, 99.0]
    assert run(cfg, patience=2, resume=True).last_step == 5
    assert aps == [99.0]


@pytest.mark.usefixtures("no_steps")
def test_augmentation_is_evaluated_once_at_the_early_end(cfg, aps, tmp_path, evaluated_models):
    run(cfg, patience=1)
    assert evaluated_models == ["FCOS", "FCOS", "FCOSWithTTA"]
    assert '"bbox_TTA/AP": 1.0' in (tmp_path / "metrics.json").read_text()
    run(cfg, patience=1, resume=True)
    assert len(evaluated_models) == 3
    rows = (tmp_path / "metrics.json").read_text().splitlines()
    (tmp_path / "metrics.json").write_text("\n".join(r for r in rows if "TTA" not in r) + "\n")
    run(cfg, patience=1, resume=True)
    assert evaluated_models[3:] == ["FCOS", "FCOSWithTTA"]  # the row had both


@pytest.mark.usefixtures("no_steps")
def test_a_signal_in_the_last_evaluation_leaves_the_end_as_it_is(cfg, aps, tmp_path, monkeypatch):
    def evaluate(cls, cfg, model, evaluators=None):
        if type(model).__name__ == "FCOSWithTTA":
            raise Stopped(signal.SIGTERM)
        return {"bbox": {"AP": 1.0}}

    monkeypatch.setattr(Trainer, "test", classmethod(evaluate))
    cfg.TEST.AUG.ENABLED = True
    with pytest.raises(Stopped):
        run(cfg, patience=1)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert {file.name for file in tmp_path.glob("*.pth")} == {"model_final.pth", "model_best.pth"}


@pytest.mark.parametrize(
    ("patience", "keys", "message"),
    [
        (
            2,
            ["TEST.EVAL_PERIOD", 0],
            r"TEST\.EVAL_PERIOD 0 asks for none .*: set TEST\.EVAL_PERIOD",
        ),
        (2, ["DATASETS.TEST", ()], r"TEST\.PATIENCE 2 needs a data set .*: set DATASETS\.TEST"),
        (-1, [], r"TEST\.PATIENCE must be a number of evaluations, or 0 for no end, got -1"),
    ],
)
def test_a_patience_that_never_ends_is_refused(cfg, aps, patience, keys, message):
    cfg.merge_from_list(keys)
    with pytest.raises(ValueError, match=message):
        run(cfg, patience)


def test_a_data_set_without_an_evaluator_is_refused(cfg, aps, monkeypatch):
    monkeypatch.setitem(MetadataCatalog.get("shapes_val").__dict__, "evaluator_type", "other")
    run(cfg.clone(), 0, killed_before=0)
    with pytest.raises(NotImplementedError, match="'shapes_val' has evaluator_type 'other'"):
        run(cfg, 2)


@pytest.mark.usefixtures("no_steps")
def test_expected_results_are_compared_at_the_early_end(cfg, aps):
    aps += [20.0, 10.0]
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 20.0, 1.0]]
    with pytest.raises(SystemExit) as failed:
        run(cfg, patience=1)
    assert failed.value.code == 1
