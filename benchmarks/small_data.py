"""Which recipe suits a small data set, at the same number of images seen?

Each recipe adds one part to the config. Screen them on a split of the training images, then look at
the test images once, with the finalists and "today":

    python benchmarks/small_data.py --data PATH [--iterations 800 2400]
    python benchmarks/small_data.py --data PATH --train trainval --test test --seeds 1 2 3 \\
        --recipes today ema colour

Every result is a line of OUTPUT/results.jsonl, and is not measured again; a run that was stopped in
the middle goes on from its last checkpoint. Minutes are comparable only on a machine that does
nothing else. What was found is in NOTES.md.
"""

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from tabulate import tabulate

from fcos_d2 import model_zoo
from fcos_d2.config import get_cfg, load_cfg
from fcos_d2.data import register_custom_datasets
from fcos_d2.data.layouts import recognise
from fcos_d2.engine import Trainer
from fcos_d2.engine.schedule import follow_max_iter

CONFIG = "PascalVOC-Detection/fcos_R_18_FPN_bccd.yaml"
# What each recipe adds to the config. What depends on the length of the training is in `add`.
RECIPES = {
    "today": [],
    "ema": [],
    "cosine": ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"],
    "accumulate": ["SOLVER.ACCUMULATE", 2],
    "jitter": ["INPUT.LSJ.ENABLED", True, "INPUT.LSJ.MIN_SCALE", 0.5, "INPUT.LSJ.MAX_SCALE", 1.5],
    "colour": ["INPUT.COLOR", 0.2],
    "flips": ["INPUT.RANDOM_FLIP", "both"],
    "unweighted": [
        "MODEL.FCOS.BOX_LOSS_WEIGHTING", "none", "MODEL.FCOS.LOSS_NORMALIZER", "ema_fg",
    ],
}  # fmt: skip


def add(cfg: CfgNode, recipe: str) -> None:
    """Add the parts of a recipe, joined by "+", to a config that has its MAX_ITER."""
    for part in recipe.split("+"):
        cfg.merge_from_list(RECIPES[part])
        if part == "ema":  # an average over the last tenth of the training
            cfg.SOLVER.EMA.DECAY = 1 - 10 / cfg.SOLVER.MAX_ITER
        if part == "jitter":  # a square of the area that images have without it, at 4:3
            cfg.INPUT.LSJ.SIZE = round(max(cfg.INPUT.MIN_SIZE_TRAIN) * (4 / 3) ** 0.5)
        if part == "accumulate":  # a batch twice as large, half as often
            solver = cfg.SOLVER
            for key in ("IMS_PER_BATCH", "BASE_LR"):
                solver[key] *= 2
            for key in ("MAX_ITER", "WARMUP_ITERS"):
                solver[key] //= 2
            solver.STEPS = tuple(step // 2 for step in solver.STEPS)


def run_config(args: argparse.Namespace, recipe: str, iterations: int, seed: int) -> CfgNode:
    own, cfg = get_cfg(), load_cfg(args.config_file, args.opts)
    own.merge_from_file(args.config_file)
    layout = recognise(args.data)
    names = {}
    for part, split in (("train", args.train), ("test", args.test)):
        names[part] = f"{layout.format}_{Path(args.data).name}_{split}"
        if split not in layout.entries:
            raise SystemExit(f"{args.data} has no split {split!r}, but {list(layout.entries)}")
        cfg.DATASETS.CUSTOM[names[part]] = CfgNode(layout.entries[split], new_allowed=True)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names["train"],), (names["test"],)
    cfg.MODEL.FCOS.NUM_CLASSES = len(layout.entries[args.train]["CLASSES"])
    cfg.SOLVER.MAX_ITER = iterations
    follow_max_iter(cfg, own.SOLVER, ["SOLVER.MAX_ITER"])
    add(cfg, recipe)
    cfg.SEED, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD = seed, 0, 200
    run = f"{args.train}-{args.test}-{recipe}-{iterations}-{seed}"
    cfg.OUTPUT_DIR = str(args.output / Path(args.data).name / run)
    return cfg


def train(cfg: CfgNode) -> dict[str, float]:
    """AP and AP50 at the end of a training; 0 for a model that detects nothing."""
    register_custom_datasets(cfg)
    default_setup(cfg, argparse.Namespace(eval_only=False))
    begin, file = time.monotonic(), Path(cfg.OUTPUT_DIR, "minutes")
    earlier = float(file.read_text()) if file.is_file() else 0.0
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    try:
        results = trainer.train()["bbox"]
    finally:
        minutes = earlier + (time.monotonic() - begin) / 60
        file.write_text(str(minutes))
    ap, ap50 = (0.0 if math.isnan(results[key]) else results[key] for key in ("AP", "AP50"))
    return {"AP": round(ap, 2), "AP50": round(ap50, 2), "minutes": round(minutes, 1)}


def runs(args: argparse.Namespace) -> Iterator[dict]:
    """The results of all runs that were asked for, those that are there without training."""
    file = args.output / "results.jsonl"
    args.output.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines() if file.is_file() else []
    known = [json.loads(line) for line in lines]
    for iterations, recipe, seed in product(args.iterations, args.recipes, args.seeds):
        what = {
            "data": Path(args.data).name, "config": Path(args.config_file).name, "opts": args.opts,
            "train": args.train, "test": args.test,
            "recipe": recipe, "iterations": iterations, "seed": seed,
        }  # fmt: skip
        result = next((x for x in known if what.items() <= x.items()), None)
        if result is None:
            result = what | train(run_config(args, recipe, iterations, seed))
            with file.open("a") as out:
                out.write(json.dumps(result) + "\n")
        yield result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="as for train_net.py --data")
    parser.add_argument("--config-file", default=model_zoo.get_config_file(CONFIG))
    parser.add_argument("--train", default="train", metavar="SPLIT")
    parser.add_argument("--test", default="val", metavar="SPLIT")
    parser.add_argument("--iterations", type=int, nargs="+", default=[800, 2400])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help='"ema+colour" is both')
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--output", type=Path, default=Path("output/small_data"))
    parser.add_argument("opts", nargs="*", default=[], metavar="KEY VALUE")
    args = parser.parse_intermixed_args()
    unknown = {part for recipe in args.recipes for part in recipe.split("+")} - RECIPES.keys()
    if unknown:
        parser.error(f"unknown recipes {sorted(unknown)}; there are {list(RECIPES)}")

    logging.getLogger("detectron2").setLevel(logging.WARNING)
    rows: dict[tuple[int, str], list[dict]] = {}
    for result in runs(args):
        rows.setdefault((result["iterations"], result["recipe"]), []).append(result)
        print(table(rows), flush=True)


def table(rows: dict[tuple[int, str], list[dict]]) -> str:
    lines = []
    for (iterations, recipe), results in rows.items():
        aps = [x["AP"] for x in results]
        spread = statistics.stdev(aps) if len(aps) > 1 else None
        minutes = statistics.mean(x["minutes"] for x in results)
        lines.append([iterations, recipe, statistics.mean(aps), spread, aps, minutes])
    headers = ["iterations", "recipe", "mean AP", "stdev", "AP", "minutes"]
    return tabulate(lines, headers, floatfmt=".1f")


if __name__ == "__main__":
    main()
