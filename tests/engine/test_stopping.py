"""Signals in one process; test_peers.py and tests/test_train_net.py send them to several."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from detectron2.engine import DefaultTrainer, HookBase

from fcos_d2.engine import Stopped, Trainer, stopping
from fcos_d2.engine.stopping import StopSignals, stop_signals

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


@pytest.mark.usefixtures("no_evaluation")
def test_trains_outside_the_main_thread(cfg, tmp_path):
    """Where Python handles no signals, for example in a notebook's worker."""
    thread = threading.Thread(target=lambda: Trainer(cfg).train())
    thread.start()
    thread.join()
    assert (tmp_path / "model_final.pth").exists()


class InterruptTwice(HookBase):
    def before_step(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("no_evaluation")
def test_two_signals_within_a_second_are_one(cfg, monkeypatch):
    """The terminal and the parent process may both send it."""
    monkeypatch.setattr(stopping, "_SAME_SIGNAL_WITHIN", 60.0)  # else a busy machine ends pytest
    trainer = Trainer(cfg)
    trainer.register_hooks([InterruptTwice()])
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == 130


# A lock that is taken twice waits in C++, like a collective: Python's handlers do not run.
WAITS = """
import ctypes
from fcos_d2.engine.stopping import stop_signals

library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_lock(lock)
with stop_signals.recorded():
    print("waits", flush=True)
    library.pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_process_that_waits_for_another_one(number, code):
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "waits\n"
        process.send_signal(number)
        time.sleep(1.5)
        assert process.poll() is None
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            process.send_signal(number)
            time.sleep(0.1)
        assert process.poll() == code
    finally:
        process.kill()


def test_signals_do_what_they_did_before_once_the_run_is_over():
    before = {number: signal.getsignal(number) for number in StopSignals.numbers}
    with stop_signals.recorded():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop_signals.requested == signal.SIGUSR1
        with pytest.raises(Stopped), stop_signals.raising():
            raise AssertionError("the request was there before")
    assert stop_signals.requested == 0
    assert before == {number: signal.getsignal(number) for number in StopSignals.numbers}
    assert signal.set_wakeup_fd(-1) == -1
    with stop_signals.raising():  # nothing is recorded
        pass
