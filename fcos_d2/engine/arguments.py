"""The command line of train_net.py, and the config that comes out of it."""

import argparse
import logging
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils.file_io import PathManager

from ..checkpoint import check_local
from ..config import get_cfg, load_cfg
from ..config_files import get_config_file
from ..data import register_custom_datasets
from ..data.layouts import use_data
from .evaluators import AUGMENTED
from .resuming import refuse_earlier_run
from .schedule import (
    AUTOMATIC,
    check_epochs,
    check_steps,
    follow_batch,
    follow_cores,
    follow_max_iter,
)
from .screen import set_up_loggers


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Detectron2's options for training, and ours."""
    parser = default_argument_parser(epilog=description)
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="train and test on this data set in place of the config's: a folder with images "
        "and boxes in COCO's, VOC's or YOLO's format, a COCO file, or YOLO's data.yaml or list of "
        "classes. The number of classes follows it",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="train for so many epochs (SOLVER.EPOCHS), with a schedule that fits; with --data, "
        "as many as suit the number of images if not given",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="images in a batch, over all processes (SOLVER.IMS_PER_BATCH), with a rate that fits",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew in an OUTPUT_DIR that has checkpoints of an earlier run, and delete them",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=30,
        metavar="MINUTES",
        help="how long processes wait for another one before they end with an error (30)",
    )
    parser.add_argument(
        "--allow-unsafe-config",
        action="store_true",
        help="run the Python code that a YAML file contains, as some of Detectron2's own do",
    )
    return parser


def setup(args) -> CfgNode:
    """Build the config of a run, register its data sets, and set up logging.

    Args:
        args: from :func:`argument_parser`, or Detectron2's.

    Raises:
        ValueError: without a config file, for test-time augmentation of a model that has none, for
            SOLVER.STEPS beyond the end, and for a new run in the folder of an earlier one.
        FileNotFoundError: for a config that is neither a file nor a name of the model zoo.
    """
    if not args.config_file:
        raise ValueError("Name a config: --config-file configs/COCO-Detection/...yaml")
    if not PathManager.isfile(args.config_file):
        args.config_file = get_config_file(args.config_file)
    allow_unsafe = getattr(args, "allow_unsafe_config", False)
    cfg = load_cfg(args.config_file, args.opts, allow_unsafe)
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.META_ARCHITECTURE not in AUGMENTED:
        raise ValueError(
            f"TEST.AUG is offered for MODEL.META_ARCHITECTURE {list(AUGMENTED)}, not "
            f"{cfg.MODEL.META_ARCHITECTURE!r}: set TEST.AUG.ENABLED False"
        )
    data = getattr(args, "data", None)
    eval_only, given = getattr(args, "eval_only", False), args.opts[::2]
    said, read = use_data(cfg, data, given) if data else ("", {})
    notes = [said]
    if not eval_only:
        own = get_cfg()
        own.merge_from_file(args.config_file, allow_unsafe=allow_unsafe)
        notes += _fit_schedule(cfg, own.SOLVER, args, given)
    cfg.freeze()
    check_local(cfg.OUTPUT_DIR)
    if not eval_only and not getattr(args, "resume", False):
        overwrite = getattr(args, "overwrite", False)
        refuse_earlier_run(cfg.OUTPUT_DIR, overwrite, cfg.MODEL.WEIGHTS)
    set_up_loggers(cfg.OUTPUT_DIR)
    default_setup(cfg, args)
    for note in filter(None, notes):
        logging.getLogger(__name__).info(note)
    # An evaluation never loads the training set, and would keep it in memory.
    register_custom_datasets(cfg, {} if eval_only else read)
    return cfg


def _fit_schedule(cfg: CfgNode, own: CfgNode, args, given: Sequence[str]) -> list[str]:
    """Apply --epochs and --batch, and what follows from them and from --data; returns notes.

    Args:
        cfg: changed in place.
        own: the section SOLVER of the config file alone.
        given: the keys that the command line sets.

    Raises:
        ValueError: for values that cannot be, or that contradict each other.
    """
    options = {name: getattr(args, name, None) for name in ("data", "epochs", "batch")}
    batch, epochs = options["batch"], options["epochs"]
    if batch is not None:
        if batch < 1 or "SOLVER.IMS_PER_BATCH" in given:
            raise ValueError(
                f"--batch must be at least 1, and not be given beside SOLVER.IMS_PER_BATCH; {batch}"
            )
        # The number is that of this run: Detectron2 does not adapt it to the number of processes.
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = batch, 0
    if epochs is not None:
        if epochs < 1 or "SOLVER.EPOCHS" in given:
            raise ValueError(
                f"--epochs must be at least 1, and not be given beside SOLVER.EPOCHS; got {epochs}"
            )
        check_epochs(epochs, given)
        cfg.SOLVER.EPOCHS = epochs
    elif options["data"] and not {"SOLVER.MAX_ITER", "SOLVER.EPOCHS"} & set(given):
        cfg.SOLVER.EPOCHS = cfg.SOLVER.EPOCHS or AUTOMATIC
    # Precise batch norm is for weights that are not averaged.
    if options["data"] and "SOLVER.EMA.DECAY" not in given and not cfg.TEST.PRECISE_BN.ENABLED:
        cfg.SOLVER.EMA.DECAY = cfg.SOLVER.EMA.DECAY or float(AUTOMATIC)
    notes = []
    if any(value is not None for value in options.values()):
        notes += follow_batch(cfg, own, given), follow_cores(cfg, given)
    if cfg.SOLVER.EPOCHS == 0:  # else the trainer does, which knows the number of images
        notes.append(follow_max_iter(cfg, own, given))
        check_steps(cfg.SOLVER)
    return notes
