"""AP after the same budget: same data, backbone, schedule, trainer and seeds for every model.

Each variant changes one thing of the config; the peers are Detectron2's FCOS, with our backbone,
and RetinaNet. What was found is in NOTES.md.

    python benchmarks/accuracy.py [--config-file FILE] [--seeds 1 2 3] [--variants default fg ...]
        [--output DIR] [KEY VALUE ...]

A run whose result lies in the output folder is not repeated. --time adds the milliseconds that each
trained model takes for a test image, in turns; it needs a machine that does nothing else.
"""

import argparse
import json
import logging
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common import in_turns, machine
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS as DetectronFCOS
from detectron2.modeling.meta_arch.fcos import FCOSHead as DetectronHead
from tabulate import tabulate
from torch import nn

from fcos_d2 import Predictor, model_zoo
from fcos_d2.analysis import retinanet_cfg
from fcos_d2.config import load_cfg
from fcos_d2.data import load_dataset, make_shapes_dataset, register_custom_datasets
from fcos_d2.engine import Trainer

SHAPES = "quick_schedules/fcos_R_18_FPN_shapes.yaml"
UNWEIGHTED = ["MODEL.FCOS.BOX_LOSS_WEIGHTING", "none"]
EMA = ["MODEL.FCOS.LOSS_NORMALIZER", "ema_fg"]
# The successors of FCOS, one part after the other (docs/successors.md).
ATSS = ["MODEL.FCOS.ASSIGNMENT", "atss", "MODEL.FCOS.BOX_LOSS_WEIGHT", 2.0]
JOINT = [
    "MODEL.FCOS.QUALITY", "joint", "MODEL.FCOS.CLS_LOSS_TYPE", "quality_focal",
    "MODEL.FCOS.BOX_LOSS_WEIGHTING", "score",
]  # fmt: skip
GFL = [*ATSS, *JOINT, "MODEL.FCOS.BOX_ACTIVATION", "distribution"]
ALIGNED = [  # ATSS for the first third
    *JOINT, "MODEL.FCOS.ASSIGNMENT", "task_aligned", "MODEL.FCOS.BOX_LOSS_WEIGHTING", "alignment",
    "MODEL.FCOS.BOX_LOSS_WEIGHT", 2.0, 
]  # fmt: skip
TOOD = [
    *ALIGNED, "MODEL.FCOS.HEAD", "task_aligned", "MODEL.FCOS.NUM_SHARE_CONVS", 3,
    "MODEL.FCOS.NUM_CLS_CONVS", 0, "MODEL.FCOS.NUM_BOX_CONVS", 0,
    "MODEL.FCOS.BOX_ACTIVATION", "exp",
]  # fmt: skip
# What each variant changes. "detectron2" and "retinanet" are other models.
VARIANTS = {
    "default": [],
    "unweighted": UNWEIGHTED,
    "ema": EMA,
    "unweighted-ema": [*UNWEIGHTED, *EMA],
    "no-scale": ["MODEL.FCOS.USE_SCALE", False],
    "iou": [*UNWEIGHTED, "MODEL.FCOS.QUALITY", "iou"],
    "atss": ATSS,
    "atss-joint": [*ATSS, *JOINT],
    "gfl": GFL,
    "gflv2": [*GFL, "MODEL.FCOS.DISTRIBUTION_QUALITY", True],
    "simota": ["MODEL.FCOS.ASSIGNMENT", "simota", "MODEL.FCOS.BOX_LOSS_WEIGHT", 2.0],
    "task-aligned": ALIGNED,
    "tood": TOOD,
    "detectron2": [],
    "retinanet": [],
}


class PeerTrainer(Trainer):
    """Our trainer with Detectron2's FCOS, as its LazyConfig builds it."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        backbone = build_backbone(cfg, ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN)))
        fcos, shapes = cfg.MODEL.FCOS, backbone.output_shape()
        head = DetectronHead(
            input_shape=[shapes[f] for f in fcos.IN_FEATURES],
            num_classes=fcos.NUM_CLASSES,
            conv_dims=[cfg.MODEL.FPN.OUT_CHANNELS] * fcos.NUM_BOX_CONVS,
            norm=fcos.NORM,
            prior_prob=fcos.PRIOR_PROB,
        )
        model = DetectronFCOS(
            backbone=backbone,
            head=head,
            head_in_features=fcos.IN_FEATURES,
            num_classes=fcos.NUM_CLASSES,
            center_sampling_radius=fcos.CENTER_SAMPLING_RADIUS,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
        )
        return model.to(cfg.MODEL.DEVICE)


def train(cfg: CfgNode, variant: str, seed: int) -> float:
    """AP at the end of a training; 0 for a model that detects nothing."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(VARIANTS[variant])
    if cfg.MODEL.FCOS.ASSIGNMENT == "task_aligned":
        cfg.SOLVER.ATSS_ITERS = cfg.SOLVER.MAX_ITER // 3
    if variant == "retinanet":
        model = retinanet_cfg(cfg).MODEL
        model.WEIGHTS, model.DEVICE = cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE
        model.BACKBONE.FREEZE_AT = cfg.MODEL.BACKBONE.FREEZE_AT
        cfg.MODEL = model
    cfg.SEED = seed
    cfg.TEST.EVAL_PERIOD = 0
    cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / f"{variant}-{seed}")
    result = Path(cfg.OUTPUT_DIR) / "ap.json"
    if not result.is_file():
        default_setup(cfg, argparse.Namespace(eval_only=False))
        trainer = (PeerTrainer if variant == "detectron2" else Trainer)(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        result.write_text(json.dumps(trainer._last_eval_results["bbox"]))
    ap = json.loads(result.read_text())["AP"]
    return 0.0 if math.isnan(ap) else ap


def milliseconds(cfg: CfgNode, output: Path, variants: Sequence[str], seed: int) -> dict:
    """Median time of each trained model for one image, over 20 test images, 7 times."""
    records = load_dataset(cfg, cfg.DATASETS.TEST[0])[:20]
    functions = {}
    for variant in variants:
        folder = output / f"{variant}-{seed}"
        weights = ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
        predictor = Predictor(load_cfg(folder / "config.yaml", weights), batch_size=1)
        functions[variant] = partial(predictor, [x["file_name"] for x in records])
    times = in_turns(functions, 7, cfg.MODEL.DEVICE)
    return {variant: time / len(records) for variant, time in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=model_zoo.get_config_file(SHAPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("output/accuracy"))
    parser.add_argument(
        "--time", action="store_true", help="of variants that are FCOS of this project"
    )
    parser.add_argument("opts", nargs="*", default=[], metavar="KEY VALUE")
    args = parser.parse_intermixed_args()

    cfg = load_cfg(args.config_file, args.opts)
    cfg.OUTPUT_DIR = str(args.output)
    if Path(args.config_file).name == Path(SHAPES).name:  # made here, not looked for
        make_shapes_dataset(args.output / "shapes")
        for entry in cfg.DATASETS.CUSTOM.values():
            entry.JSON = str(args.output.resolve() / entry.JSON)
            entry.IMAGES = str(args.output.resolve() / entry.IMAGES)
    register_custom_datasets(cfg)
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    rows = []
    for variant in args.variants:
        aps = [train(cfg, variant, seed) for seed in args.seeds]
        spread = statistics.stdev(aps) if len(aps) > 1 else float("nan")
        rows.append([variant, statistics.mean(aps), spread, *aps])
        print(tabulate(rows, ["variant", "mean AP", "stdev", *args.seeds], floatfmt=".1f"))
    if args.time:
        ours = [x for x in args.variants if x not in ("detectron2", "retinanet")]
        times = milliseconds(cfg, args.output, ours, args.seeds[0])
        print(tabulate(times.items(), ["variant", "ms an image"], floatfmt=".1f"))
        print(machine(cfg.MODEL.DEVICE))


if __name__ == "__main__":
    main()
