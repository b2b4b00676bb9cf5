"""Loads the data sets of a run, and refuses at its start what would end it later."""

import logging
import os
import statistics
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..checkpoint import read_checkpoint
from .check import summary
from .classes import check_num_classes, classes_of
from .custom import load_dataset, loaded_to_train
from .image_files import missing_files
from .raw_data import garbage_collection_paused

_ENLARGED = 2  # how many times, so that nothing is said


def load_training_sets(cfg: CfgNode) -> list[dict]:
    """The records of DATASETS.TRAIN. The log says what is wrong with their annotations.

    Raises:
        ValueError: for files of proposals that could run code, for data sets that are not lists of
            records, and for images that are not there, unless DATALOADER.ON_BAD_IMAGE is "skip".
    """
    names, keypoints = cfg.DATASETS.TRAIN, cfg.MODEL.ROI_KEYPOINT_HEAD
    proposal_files = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    check_proposal_files(proposal_files)
    loaded_to_train.update(names)
    try:
        records = get_detection_dataset_dicts(
            names,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=proposal_files,
        )
    finally:
        loaded_to_train.clear()
    if not isinstance(records, list):
        raise ValueError(
            f"{names} is registered as a {type(records).__name__}, not as a list of records. "
            "Override Trainer.build_train_loader, for example with Detectron2's "
            "build_detection_train_loader; such a run does not resume exactly"
        )
    if comm.is_main_process():
        logger, missing = logging.getLogger(__name__), _missing_images(records, names)
        if missing and cfg.DATALOADER.ON_BAD_IMAGE != "skip":
            raise ValueError(f"{missing}, or set DATALOADER.ON_BAD_IMAGE skip to leave them out")
        if missing:
            logger.warning(f"{missing}. The training takes others in their place")
        logger.info(summary(", ".join(names), records, classes_of(names[0]) or ()))
        if text := _enlargement(cfg.INPUT, records):
            logger.warning(text)
    return records


@garbage_collection_paused()
def check_test_sets(cfg: CfgNode) -> None:
    """Load every data set of DATASETS.TEST, before a training that ends with its evaluation.

    Raises:
        ValueError: for a name that is not registered, a data set without images, another number of
            classes than the model's, and images that are not there.
        OSError: for annotations that are not there.
    """
    for name in cfg.DATASETS.TEST:
        records = load_dataset(cfg, name)
        check_num_classes(cfg, name)
        if isinstance(records, list) and comm.is_main_process():
            if not records:
                raise ValueError(f"The data set {name!r} of DATASETS.TEST has no images")
            if missing := _missing_images(records, [name]):
                raise ValueError(missing)


def check_proposal_files(files: Sequence[str] | None) -> None:
    """Raise a ValueError for proposals that are not plain data: Detectron2 would run their code."""
    for file in files or ():
        read_checkpoint(PathManager.get_local_path(file))


def _enlargement(settings: CfgNode, records: Sequence[dict]) -> str:
    """A sentence about images that are made much larger than they are; empty for others."""
    sides = [min(r["height"], r["width"]) for r in records if {"height", "width"} <= r.keys()]
    sizes = settings.MIN_SIZE_TRAIN
    sizes = sizes if isinstance(sizes, Sequence) else [sizes]
    if not sides or settings.LSJ.ENABLED:  # which does without MIN_SIZE_TRAIN
        return ""
    median = statistics.median(sides)
    if min(sizes) <= _ENLARGED * median:
        return ""
    less = round(_ENLARGED * median)
    return (
        f"Half of the images have at most {median:g} pixels on their shorter side. To enlarge them "
        f"to INPUT.MIN_SIZE_TRAIN {tuple(sizes)} takes time and memory; for {_ENLARGED} times, "
        f'write INPUT.MIN_SIZE_TRAIN "({less},)" INPUT.MIN_SIZE_TEST {less}'
    )


def _missing_images(records: Sequence[dict], names: Sequence[str]) -> str:
    """A sentence about the images of data sets that are not there; empty if all are."""
    missing = missing_files([os.fspath(record["file_name"]) for record in records])
    if not missing:
        return ""
    first = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
    return (
        f"{len(missing)} of {len(records)} images of {', '.join(map(repr, names))} are not there: "
        f"{first}. Put them there, or correct the folder or the names that the data set gives them"
    )
