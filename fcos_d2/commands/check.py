"""What is wrong with a data set, before anything trains on it.

    fcos check --data cells
    fcos check --data train.json --fix cleaned.json
    fcos check --config-file configs/... --plot plots --json findings.json
    fcos check --data cells --augmented augmented.jpg INPUT.COLOR 0.3

--data takes a folder with boxes in COCO's, VOC's or YOLO's format, a COCO annotation file, or
YOLO's data.yaml or list of classes. Without it, the data sets of the config are checked. With a
config there is also the level that each size goes to, and the boxes that no location can own. The
exit code is 1 if there are errors.

--augmented draws ten training images as the config, or else Base-FCOS.yaml, augments them.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from ..analysis.augmented import save_augmented
from ..analysis.data_set import DataStatistics, data_statistics, save_data_charts
from ..command_line import config_parser, exit_on_error
from ..config import load_cfg
from ..config_files import get_config_file
from ..data import DatasetMapper, TrainingLoader, register_custom_datasets
from ..data.augmentation import check_augmentation
from ..data.check import (
    check_annotations,
    check_images,
    check_rare_classes,
    check_same_images,
    check_sets,
    read_registered,
)
from ..data.coco import cleaned
from ..data.custom import read_entry
from ..data.findings import Finding, count, table
from ..data.layouts import recognise, use_data
from ..data.raw_data import RawData
from ..modeling.assignment import build_assigner


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = config_parser(__doc__, config_required=False, prog="fcos check")
    parser.add_argument(
        "--data", metavar="PATH", help="as for a training: a folder, or a file of the annotations"
    )
    parser.add_argument(
        "--split", metavar="NAME", action="append", help="check this split alone (repeatable)"
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        action="append",
        help="registered with Detectron2 or in DATASETS.CUSTOM (repeatable)",
    )
    parser.add_argument("--no-images", action="store_true", help="read no pixels")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all findings and numbers")
    parser.add_argument("--plot", metavar="DIR", type=Path, help="write plots as PNG files")
    parser.add_argument(
        "--augmented",
        metavar="OUT.jpg",
        type=Path,
        help="draw ten augmented training images with their boxes, as JPEG or PNG",
    )
    parser.add_argument(
        "--fix",
        metavar="OUT.json",
        type=Path,
        help="write a cleaned COCO file, OUT_SPLIT.json for several sets; existing files stay",
    )
    args = parser.parse_intermixed_args(argv)
    if args.data is None and args.config_file is None:
        parser.error("name --data, or --config-file with data sets")
    if args.data is not None and args.dataset:
        parser.error("--data and --dataset exclude each other")
    if args.augmented is not None and args.augmented.suffix not in (".jpg", ".png"):
        parser.error(f"--augmented must end in .jpg or .png, got {args.augmented}")
    return args


def read_sets(args: argparse.Namespace, cfg) -> list[RawData]:
    """The data sets that the arguments name."""
    if args.data is None:
        names = args.dataset or [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
        return [read_registered(cfg, name) for name in dict.fromkeys(names)]
    layout = recognise(args.data)
    parts = {"train", "val"} <= layout.entries.keys()
    splits = args.split or [s for s in layout.entries if s != "trainval" or not parts]
    unknown = [s for s in splits if s not in layout.entries]
    if unknown:
        raise ValueError(f"{args.data} has no split {unknown[0]!r}; it has {list(layout.entries)}")
    print(f"{args.data} has {layout}")
    return [read_entry(split, layout.entries[split]) for split in splits]


def training_cfg(args: argparse.Namespace, cfg: CfgNode | None) -> CfgNode:
    """The config to train on the data sets that the arguments name, for --augmented."""
    base = get_config_file("Base-FCOS.yaml")
    cfg = load_cfg(base, args.opts) if cfg is None else cfg.clone()
    if args.data is not None:
        _, read = use_data(cfg, args.data)
        register_custom_datasets(cfg, read)
    elif args.dataset:
        cfg.DATASETS.TRAIN = tuple(args.dataset)
    check_augmentation(cfg)
    return cfg


def find_all(
    args: argparse.Namespace, cfg, sets: list[RawData]
) -> tuple[dict[str, list[Finding]], list[DataStatistics]]:
    """The findings of each data set, and its numbers."""
    findings: dict[str, list[Finding]] = {}
    hashes, statistics, assigning = {}, [], cfg
    if cfg is not None and build_assigner(cfg).sees_predictions:
        print(
            f"No levels and no boxes without a location: {cfg.MODEL.FCOS.ASSIGNMENT!r}, the "
            "MODEL.FCOS.ASSIGNMENT, chooses by what a model predicts"
        )
        assigning = None
    for data in sets:
        found = [*data.findings, *check_annotations(data)]
        numbers, unowned = data_statistics(data, found, assigning, progress=True)
        found += unowned
        statistics.append(numbers)
        if not args.no_images:
            of_images, hashes[data.name] = check_images(data, progress=True)
            found += of_images
        findings[data.name] = found
    if cfg is None or cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
        for data in sets[:1]:  # that one is trained on
            findings[data.name] += check_rare_classes(data)
    between = [*check_sets(sets), *check_same_images(hashes)]
    if between:
        findings["between the sets"] = between
    return findings, statistics


def write_cleaned(out: Path, sets: list[RawData], findings: dict[str, list[Finding]]) -> None:
    """Write cleaned copies. A file that exists is a FileExistsError."""
    for data in sets:
        file = out if len(sets) == 1 else out.with_name(f"{out.stem}_{data.name}{out.suffix}")
        content = cleaned(data, findings[data.name])
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "x", encoding="utf-8") as f:  # never another file
            json.dump(content, f)
        images = f"{len(content['images'])} of {len(data.images)} images"
        boxes = f"{len(content['annotations'])} of {len(data.annotations)} boxes"
        root = os.path.abspath(data.image_root) if data.image_root else "/"
        print(f"wrote {file}: {images}, {boxes}; its IMAGES are in {root}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # names may be no Unicode
    with exit_on_error():
        cfg = load_cfg(args.config_file, args.opts) if args.config_file else None
        training = None if args.augmented is None else training_cfg(args, cfg)
        sets = read_sets(args, cfg)
        findings, statistics = find_all(args, cfg, sets)
    for numbers in statistics:
        print(f"\n{numbers.table()}")
    for name, found in findings.items():
        print(f"\n{name}\n{table(found)}")
    counts = count(f for found in findings.values() for f in found)
    print("\n" + ", ".join(f"{n} {severity}s" for severity, n in counts.items()))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        listed = {name: [f.to_dict() for f in found] for name, found in findings.items()}
        numbers = {s.name: s.to_dict() for s in statistics}
        content = {"counts": counts, "findings": listed, "statistics": numbers}
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    if args.plot is not None:
        for file in save_data_charts(statistics, args.plot):
            print(f"wrote {file}")
    if training is not None:
        args.augmented.parent.mkdir(parents=True, exist_ok=True)
        with exit_on_error():
            loader = TrainingLoader(training, DatasetMapper(training, is_train=True))
            save_augmented(loader, training, args.augmented)
        print(f"wrote {args.augmented}")
    if args.fix is not None:
        try:
            write_cleaned(args.fix, sets, findings)
        except FileExistsError as error:
            print(f"error: {error}. Name another file for --fix", file=sys.stderr)
            return 1
    return int(counts["error"] > 0)
