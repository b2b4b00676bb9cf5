"""What each process of the tests in test_peers.py runs: its name is the argument CASE."""

import argparse
import os
import signal
import time
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from helpers import LIGHT, free_port, tiny_cfg

from fcos_d2.data import register_custom_datasets
from fcos_d2.engine import Trainer, launch, leave_group
from fcos_d2.engine.peers import Agreement
from fcos_d2.engine.stopping import StoppableEvaluator, stop_signals


def fail(args):
    if comm.get_rank() == 1:
        time.sleep(0.5)
        raise ValueError("of process 1")
    comm.synchronize()


def fail_together(args):
    raise ValueError(f"of process {comm.get_rank()}")


def killed(args):
    if comm.get_rank() == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


def agree(args):
    ask, rank = Agreement(), comm.get_rank()
    answers = [ask(value, -value) for value in (rank, 10 * rank, 0)]
    last = comm.get_world_size() - 1
    assert answers == [None, [last, 0], [10 * last, 0]], answers


def leave(args):
    rank = comm.get_rank()
    leave_group()
    assert comm.get_rank() == 0
    while rank == 0 and not (args.folder / "others_have_ended").exists():
        time.sleep(0.05)


def fail_in_the_last_step(args):
    """Detectron2's hooks take an error in the last step for the end, and would evaluate."""
    cfg = tiny_cfg()
    cfg.merge_from_list(LIGHT)
    cfg.OUTPUT_DIR, cfg.SOLVER.IMS_PER_BATCH = str(args.folder), 3
    cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = (), 2, 0
    register_custom_datasets(cfg)
    trainer = Trainer(cfg)
    if comm.get_rank() == 1:
        trainer.register_hooks([Fail()])
    trainer.train()


class Fail(HookBase):
    def before_step(self):
        if self.trainer.iter == 1:
            raise ValueError("of process 1")


class Slow(DatasetEvaluator):
    """Evaluates more images in later processes, and then for long in the first one alone."""

    def process(self, inputs, outputs):
        time.sleep(0.25)

    def evaluate(self):
        comm.synchronize()
        if comm.get_rank() == 0:
            Path(inside := os.environ["FOLDER"], "alone").touch()
            with stop_signals.raising():
                time.sleep(float(os.environ["ALONE"]))
            Path(inside, "finished").touch()
        return {}


def evaluate(args):
    """Processes with 8, 9, ... images, again and again."""
    rank = comm.get_rank()
    os.environ["FOLDER"] = str(args.folder)
    with stop_signals.recorded():
        (args.folder / f"pid_{rank}").write_text(str(os.getpid()))
        evaluator = StoppableEvaluator(Slow())
        for _ in range(100):
            evaluator.reset()
            for i in range(8 + rank):
                evaluator.process(i, i)
            evaluator.evaluate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=[name for name, x in globals().items() if callable(x)])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.set_defaults(timeout=5, num_machines=1, machine_rank=0)
    parser.set_defaults(dist_url=f"tcp://127.0.0.1:{free_port()}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    launch(globals()[arguments.case], arguments)
