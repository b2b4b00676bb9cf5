#!/usr/bin/env python
"""Train or evaluate a detector from a YAML config, like Detectron2's train_net.py.

    python train_net.py --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.yaml --num-gpus 8
    python train_net.py --config-file ... --eval-only MODEL.WEIGHTS model.pth

On a machine without GPUs, --num-gpus N runs N processes on CPU. torchrun and Slurm's srun can
start the processes, too. ``fcos train`` does the same.
"""

from fcos_d2.commands.train import run as main
from fcos_d2.engine import argument_parser, launch

if __name__ == "__main__":
    launch(main, argument_parser(__doc__).parse_args())
