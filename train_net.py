#!/usr/bin/env python
"""Train or evaluate a detector from a YAML config, like Detectron2's train_net.py.

    python train_net.py --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.yaml --num-gpus 8
    python train_net.py --config-file ... --eval-only MODEL.WEIGHTS model.pth

On a machine without GPUs, --num-gpus N runs N processes on CPU. torchrun and Slurm's srun can
start the processes, too.
"""

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from fcos_d2.engine import (
    Trainer,
    argument_parser,
    delete_earlier_run,
    evaluate,
    launch,
    leave_group,
    setup,
)
from fcos_d2.report import report_after_training


def main(args):
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
        report_after_training(cfg)
    return results


if __name__ == "__main__":
    launch(main, argument_parser(__doc__).parse_args())
