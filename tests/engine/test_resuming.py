import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import CommonMetricPrinter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fcos_d2 import model_zoo
from fcos_d2.checkpoint import atomic, read_checkpoint
from fcos_d2.engine import Trainer, arguments, delete_earlier_run, resuming, setup

EVALUATION = {"bbox": {"AP": 1.0}}


class Killed(HookBase):
    """Ends the run without a chance to save, as a kill does."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


def run(cfg, resume=False, killed_before=None, **keys):
    """Train; the keys are of SOLVER."""
    cfg = cfg.clone()
    for key, value in keys.items():
        cfg.SOLVER[key] = value
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    if killed_before is None:
        trainer.train()
    else:
        trainer.register_hooks([Killed(killed_before)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return trainer


def state(trainer):
    momentum = [s["momentum_buffer"] for s in trainer.optimizer.state.values()]
    return [*trainer.model.state_dict().values(), *momentum]


@pytest.fixture
def initial_weights(cfg, tmp_path):
    cfg.MODEL.WEIGHTS = str(tmp_path / "initial.pth")
    torch.save(Trainer.build_model(cfg).state_dict(), cfg.MODEL.WEIGHTS)


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: EVALUATION))


@pytest.mark.parametrize(
    ("seed", "sampler"), [(3, "TrainingSampler"), (-1, "RepeatFactorTrainingSampler")]
)
@pytest.mark.usefixtures("initial_weights", "no_evaluation")
def test_a_resumed_run_is_the_run_that_was_never_stopped(cfg, tmp_path, seed, sampler):
    cfg.MODEL.RESNETS.NORM = "BN"  # statistics of the images, too
    cfg.INPUT.MIN_SIZE_TRAIN = (96, 128)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.ROTATE_90, cfg.INPUT.COLOR = "both", True, 0.3
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    cfg.SEED, cfg.DATALOADER.NUM_WORKERS = seed, 0
    cfg.OUTPUT_DIR = str(tmp_path / "stopped")
    Path(cfg.OUTPUT_DIR).mkdir()
    first_seed = run(cfg, killed_before=3).seed  # after the checkpoint of iteration 1
    cfg.DATALOADER.NUM_WORKERS = 2
    assert run(cfg, resume=True, killed_before=5).start_iter == 2
    resumed = run(cfg, resume=True)
    assert resumed.start_iter == 4
    assert resumed.seed == first_seed
    assert seed == -1 or resumed.seed == seed

    cfg.SEED = first_seed
    cfg.OUTPUT_DIR = str(tmp_path / "undisturbed")
    Path(cfg.OUTPUT_DIR).mkdir()
    undisturbed = run(cfg)
    pairs = list(zip(state(undisturbed), state(resumed), strict=True))
    assert len(pairs) > 150
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(  # it did learn
        undisturbed.model.head.cls_logits.weight,
        torch.load(cfg.MODEL.WEIGHTS)["head.cls_logits.weight"],
    )


@pytest.mark.usefixtures("no_evaluation")
def test_every_run_without_a_seed_has_an_order_of_its_own(cfg):
    cfg.SEED = -1
    assert Trainer(cfg).seed != Trainer(cfg).seed


@pytest.mark.usefixtures("no_evaluation")
def test_metrics_are_not_written_twice(cfg, tmp_path):
    # Rows are written every 20 iterations, and in the end.
    run(cfg, MAX_ITER=45, CHECKPOINT_PERIOD=15, killed_before=41)
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"cut short{"iteration": 39}\n{"cut sh')
    run(cfg, MAX_ITER=45, CHECKPOINT_PERIOD=15, resume=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    losses = [row["iteration"] for row in rows if "total_loss" in row]
    assert losses == [19, 39, 44]
    tensorboard = EventAccumulator(str(tmp_path))
    tensorboard.Reload()
    assert [event.step for event in tensorboard.Scalars("total_loss")] == [19, 39, 44]


def test_an_evaluation_that_was_missed_is_done_on_resuming(cfg, tmp_path, monkeypatch):
    evaluated = []

    def evaluate(cls, cfg, model, evaluators=None):
        evaluated.append(model.head.cls_logits.weight.detach().clone())
        if len(evaluated) == 1:
            raise KeyboardInterrupt
        return EVALUATION

    monkeypatch.setattr(Trainer, "test", classmethod(evaluate))
    cfg.TEST.EVAL_PERIOD = 2
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = run(cfg, resume=True)
    assert len(evaluated) == 4  # that of iteration 1 twice, then 3 and 5
    assert torch.equal(evaluated[0], evaluated[1])
    # Detectron2 counts the last one by one too many.
    assert [i for _, i in resumed.storage.history("bbox/AP").values()] == [1, 3, 6]
    assert torch.load(tmp_path / "model_best.pth")["best_iter"] == 1
    run(cfg, resume=True)
    assert len(evaluated) == 5  # the final one again, nothing else


@pytest.mark.usefixtures("no_evaluation")
def test_a_changed_learning_rate_counts_and_is_said(cfg, caplog):
    caplog.set_level("WARNING")
    run(cfg, STEPS=(3,), killed_before=5)  # saved after iteration 3
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    resumed = run(cfg, resume=True, STEPS=(3,), BASE_LR=0.5, MOMENTUM=0.8, killed_before=4)
    groups = resumed.optimizer.param_groups
    assert {g["lr"] for g in groups} == {0.05}  # a tenth, after STEPS
    assert {g["momentum"] for g in groups} == {0.8}
    for change in ("SOLVER.BASE_LR: 0.02 -> 0.5", "SOLVER.MOMENTUM: 0.9 -> 0.8",
                   "INPUT.MIN_SIZE_TRAIN: [128] -> [96]"):  # fmt: skip
        assert change in caplog.text
    caplog.clear()
    run(cfg, resume=True, STEPS=(3,), BASE_LR=0.02, CHECKPOINT_PERIOD=3, MAX_ITER=6)
    assert "CHECKPOINT_PERIOD" not in caplog.text


@pytest.mark.usefixtures("no_evaluation")
def test_what_cannot_go_on_is_refused_before_anything_is_loaded(cfg, tmp_path):
    run(cfg, MAX_ITER=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}

    @contextmanager
    def refused(match):
        other = cfg.clone()
        with pytest.raises(ValueError, match=match):
            yield other
            Trainer(other).resume_or_load(resume=True)

    with refused(r"SOLVER\.IMS_PER_BATCH was 2 and is 4.*Set it to 2") as other:
        other.SOLVER.IMS_PER_BATCH = 4
    with refused(r"(?s)another model.*Missing: head\.cls_tower\.3.*NUM_CLS_CONVS: 1 -> 2") as other:
        other.MODEL.FCOS.NUM_CLS_CONVS = 2
    with refused(r"Of another shape: .*lateral3\.weight \(64, 32, 1, 1\), here \(128") as other:
        other.MODEL.FPN.OUT_CHANNELS = 128
    with refused(r"(?s)other groups of parameters.*BIAS_LR_FACTOR: 1\.0 -> 2\.0") as other:
        other.SOLVER.BIAS_LR_FACTOR = 2.0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in before} == before


@pytest.mark.usefixtures("no_evaluation")
def test_a_run_killed_before_its_first_checkpoint_starts_anew(cfg, tmp_path):
    run(cfg, MAX_ITER=30, CHECKPOINT_PERIOD=100, killed_before=25)
    run(cfg, MAX_ITER=22, CHECKPOINT_PERIOD=100, resume=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "total_loss" in row] == [19, 21]


class Draws(HookBase):
    """What the model would draw in a step."""

    def __init__(self):
        self.drawn = {}

    def after_step(self):
        self.drawn[self.trainer.iter] = torch.rand(3).tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("no_evaluation")
def test_what_a_model_draws_is_the_same_too(cfg, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    drawn = []
    for resume in (False, True):
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        hook = Draws()
        trainer.register_hooks([hook, *([] if resume else [Killed(5)])])
        if resume:
            trainer.train()
        else:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        drawn.append(hook.drawn)
    assert list(drawn[0]) == [0, 1, 2, 3, 4]
    assert list(drawn[1]) == [4, 5]
    assert drawn[0][4] == drawn[1][4] != drawn[1][5]


class OwnWriters(Trainer):
    def build_writers(self):
        return [CommonMetricPrinter(self.max_iter)]


class OwnScheduler(Trainer):
    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.usefixtures("no_evaluation")
def test_trainers_with_parts_of_their_own_resume(cfg, tmp_path):
    for kind in (OwnWriters, OwnScheduler):
        cfg.OUTPUT_DIR = str(tmp_path / kind.__name__)  # and it need not exist
        cfg.SOLVER.MAX_ITER = 2
        stopped = kind(cfg)
        stopped.train()
        cfg.SOLVER.MAX_ITER = 4
        resumed = kind(cfg)
        resumed.resume_or_load(resume=True)
        rates = [t.optimizer.param_groups[0]["lr"] for t in (stopped, resumed)]
        assert rates[0] == rates[1]
        resumed.train()
    assert rates[0] == cfg.SOLVER.BASE_LR / 4


@pytest.mark.usefixtures("no_evaluation")
def test_weights_alone_are_no_checkpoint_to_resume_from(cfg, tmp_path):
    model = Trainer.build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    with pytest.raises(ValueError, match=r"holds weights alone.*MODEL\.WEIGHTS"):
        Trainer(cfg).resume_or_load(resume=True)


@pytest.mark.usefixtures("no_evaluation")
def test_processes_must_see_the_same(cfg, tmp_path, monkeypatch):
    run(cfg, MAX_ITER=2)
    trainer = Trainer(cfg)

    def others(file, seen):
        """What the first process chose, and what another one sees of it."""
        answers = [lambda mine: [file], lambda mine: [mine, (seen, {})], lambda mine: [mine]]
        monkeypatch.setattr(resuming.comm, "all_gather", lambda mine: answers.pop(0)(mine))
        trainer.resume_or_load(resume=True)

    monkeypatch.setattr(resuming, "_flat", lambda config: {})
    final = str(tmp_path / "model_final.pth")
    with pytest.raises(ValueError, match=r"process 0: iteration 1, process 1: no such file.*share"):
        others(final, "no such file")
    with pytest.raises(ValueError, match=r"process 0: iteration 1, process 1: iteration 7"):
        others(final, "iteration 7")
    with pytest.raises(ValueError, match=r"process 0: no such file, process 1: iteration 1"):
        others(str(tmp_path / "elsewhere.pth"), "iteration 1")
    monkeypatch.setattr(resuming, "_flat", lambda config: {"SEED": 1})
    with pytest.raises(ValueError, match="different configs"):
        others(None, "no such file")


@pytest.mark.usefixtures("no_evaluation")
def test_a_checkpoint_is_read_once(cfg, monkeypatch):
    run(cfg, MAX_ITER=2)
    read = []
    monkeypatch.setattr(
        atomic, "read_checkpoint", lambda file: read.append(file) or read_checkpoint(file)
    )
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    assert len(read) == 1


@pytest.mark.usefixtures("no_evaluation")
def test_a_new_run_does_not_mix_with_an_earlier_one(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "default_setup", lambda *args: None)  # takes seconds
    run(cfg)
    config = model_zoo.get_config_file("quick_schedules/fcos_R_18_FPN_shapes.yaml")
    args = {"config_file": config, "opts": ["OUTPUT_DIR", str(tmp_path)], "eval_only": False}
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"has checkpoints of an earlier run. Add --resume"):
        setup(SimpleNamespace(**args, resume=False))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    (tmp_path / "of_mine.pth").touch()
    setup(SimpleNamespace(**args, resume=True))
    assert (tmp_path / "model_final.pth").exists()
    overwriting = SimpleNamespace(**args, resume=False, overwrite=True)
    setup(overwriting)
    assert (tmp_path / "model_final.pth").exists()  # until the new run is ready
    args["opts"] += ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    with pytest.raises(ValueError, match=r"would delete MODEL\.WEIGHTS"):
        setup(overwriting)
    delete_earlier_run(str(tmp_path))
    assert [p.name for p in tmp_path.glob("*.pth")] == ["of_mine.pth"]
    assert not (tmp_path / "last_checkpoint").exists()


def test_a_checkpoint_without_a_config_is_resumed(cfg, tmp_path, monkeypatch):
    """As versions before this one wrote it."""
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: EVALUATION))
    run(cfg, MAX_ITER=2)
    last = tmp_path / "model_final.pth"
    saved = torch.load(last)
    del saved["config"], saved["seed"]
    torch.save(saved, last)
    assert run(cfg, resume=True, MAX_ITER=4).start_iter == 2
