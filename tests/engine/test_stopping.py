"""Signals in one process; tests/test_train_net.py sends them to several."""

import os
import signal
import threading
import time

import pytest
import torch
from detectron2.engine import DefaultTrainer, HookBase

from fcos_d2.engine import Stopped, Trainer, stopping

EVALUATION = {"bbox": {"AP": 1.0}}


class Tell(HookBase):
    """Sends a signal to this process in the middle of a step."""

    def __init__(self, iteration, number):
        self.iteration, self.number = iteration, number

    def before_step(self):
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(DefaultTrainer, "test", classmethod(lambda *args: EVALUATION))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)]
)
@pytest.mark.usefixtures("no_evaluation")
def test_a_signal_ends_the_training_after_its_step_with_a_checkpoint(cfg, tmp_path, number, code):
    handler = signal.getsignal(number)
    trainer = Trainer(cfg)
    trainer.register_hooks([Tell(4, number)])
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == code
    assert signal.getsignal(number) is handler
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"
    saved = torch.load(tmp_path / "model_0000004.pth")
    assert saved["iteration"] == 4
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(saved["model"][name], value)
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 5


def sleeping_evaluation(seconds):
    def evaluate(cls, cfg, model, evaluators=None):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
        return EVALUATION

    return classmethod(evaluate)


def test_a_signal_ends_an_evaluation_at_once(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(DefaultTrainer, "test", sleeping_evaluation(600))
    cfg.TEST.EVAL_PERIOD = 3  # where no other checkpoint is written
    with pytest.raises(Stopped):
        Trainer(cfg).train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    # The last evaluation comes after the last checkpoint.
    trainer = Trainer(cfg)
    cfg.TEST.EVAL_PERIOD = 0
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    with pytest.raises(Stopped):
        trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_signal_in_the_evaluation_that_is_owed_on_resuming_counts_no_step(
    cfg, tmp_path, monkeypatch
):
    monkeypatch.setattr(DefaultTrainer, "test", sleeping_evaluation(600))
    cfg.TEST.EVAL_PERIOD = 2
    for resume in (False, True, True):
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        assert trainer.start_iter == (2 if resume else 0)
        with pytest.raises(Stopped):
            trainer.train()
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["model_0000001.pth"]
    monkeypatch.setattr(DefaultTrainer, "test", classmethod(lambda *args: EVALUATION))
    last = Trainer(cfg)
    last.resume_or_load(resume=True)
    last.train()
    # Detectron2 counts the last one by one too many.
    assert [i for _, i in last.storage.history("bbox/AP").values()] == [1, 3, 6]


@pytest.mark.usefixtures("no_evaluation")
def test_after_the_last_step_there_is_nothing_to_stop_but_the_evaluation(cfg, tmp_path):
    trainer = Trainer(cfg)
    trainer.register_hooks([Tell(5, signal.SIGTERM)])
    with pytest.raises(Stopped):
        trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_an_error_of_an_evaluation_that_others_have_left(cfg, monkeypatch):
    def evaluate(cls, cfg, model, evaluators=None):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        except Stopped as stopped:
            raise RuntimeError("Connection closed by peer") from stopped

    monkeypatch.setattr(DefaultTrainer, "test", classmethod(evaluate))
    cfg.TEST.EVAL_PERIOD = 3
    with pytest.raises(Stopped):
        Trainer(cfg).train()


@pytest.mark.usefixtures("no_evaluation")
def test_trains_outside_the_main_thread(cfg, tmp_path):
    """Where Python handles no signals, for example in a notebook's worker."""
    thread = threading.Thread(target=lambda: Trainer(cfg).train())
    thread.start()
    thread.join()
    assert (tmp_path / "model_final.pth").exists()


@pytest.mark.usefixtures("no_evaluation")
def test_a_signal_while_the_processes_agree_is_seen_after_the_next_step(cfg, tmp_path, monkeypatch):
    def gather(told):
        if not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(told)
        return [told]

    calls = []
    monkeypatch.setattr(stopping.comm, "all_gather", gather)
    with pytest.raises(Stopped):
        Trainer(cfg).train()
    assert calls == [0, signal.SIGTERM]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


class InterruptTwice(HookBase):
    def before_step(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("no_evaluation")
def test_a_second_interrupt_ends_the_run_at_once(cfg, monkeypatch):
    trainer = Trainer(cfg)
    trainer.register_hooks([InterruptTwice()])
    with pytest.raises(Stopped) as stopped:  # both came from one press
        trainer.train()
    assert stopped.value.code == 130
    monkeypatch.setattr(stopping, "_SAME_INTERRUPT", 0.01)
    trainer = Trainer(cfg)
    trainer.register_hooks([InterruptTwice()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with stopping.stoppable_evaluation():  # the request is over
        pass
