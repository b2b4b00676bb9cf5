"""Train or evaluate a detector from a YAML config, like Detectron2's train_net.py.

    fcos train --config-file COCO-Detection/fcos_R_50_FPN_1x.yaml --num-gpus 8
    fcos eval --config-file output/config.yaml MODEL.WEIGHTS output/model_best.pth

On a machine without GPUs, --num-gpus N runs N processes on CPU. torchrun and Slurm's srun can
start the processes, too.
"""

import argparse
from collections.abc import Sequence

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..engine import (
    Trainer,
    argument_parser,
    delete_earlier_run,
    evaluate,
    launch,
    leave_group,
    log_results,
    setup,
)
from ..report import report_after_training


def run(args: argparse.Namespace) -> dict | None:
    """What each process of a run does. For errors see :func:`fcos_d2.engine.setup`."""
    cfg = setup(args)
    if args.eval_only:
        results = evaluate(cfg, resume=args.resume)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg, given=args.opts[::2])
    trainer.resume_or_load(resume=args.resume)
    if args.overwrite and not args.resume:
        delete_earlier_run(cfg.OUTPUT_DIR)
    results, is_main = trainer.train(), comm.is_main_process()
    leave_group()  # the others end now: what is left is the report, which one process makes
    if is_main:
        log_results(cfg, report_after_training(cfg))
    return results


def main(argv: Sequence[str] | None = None, prog: str = "fcos train") -> None:
    parser = argument_parser(__doc__)
    parser.prog = prog
    launch(run, parser.parse_args(argv))


def evaluate_only(argv: Sequence[str]) -> None:
    main(["--eval-only", *argv], prog="fcos eval")
