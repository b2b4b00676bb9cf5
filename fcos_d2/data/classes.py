"""Compares the classes of data sets, configs and detectors before a training."""

from collections.abc import Sequence
from operator import attrgetter

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

# The section of MODEL with each meta architecture's NUM_CLASSES; ProposalNetwork has none.
_SECTIONS = {"FCOS": "FCOS", "RetinaNet": "RETINANET", "GeneralizedRCNN": "ROI_HEADS"}


def with_class_names(cfg: CfgNode) -> CfgNode:
    """A copy of a config in which DATASETS.CUSTOM has the classes of all loaded data sets."""
    cfg = cfg.clone()
    cfg.defrost()
    for name, entry in cfg.DATASETS.CUSTOM.items():
        classes = classes_of(name)
        if classes is not None:
            entry["CLASSES"] = classes
    return cfg


def classes_of(dataset_name: str) -> list[str] | None:
    """The classes of a registered data set, or None if they are not known yet."""
    names = MetadataCatalog.get(dataset_name).get("thing_classes")
    return None if names is None else list(names)


def class_names(cfg: CfgNode) -> list[str] | None:
    """The classes of the first data set of a config whose classes are known, or None."""
    return next(filter(None, map(classes_of, _registered(cfg))), None)


def category_ids(cfg: CfgNode) -> list[int] | None:
    """The category id of each class in a COCO file, in the order of the classes.

    None for VOC and YOLO data, which have names and class numbers alone.
    """
    for name in _registered(cfg):
        numbers = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
        if numbers is not None:
            return sorted(numbers, key=numbers.get)
    return None


def _registered(cfg: CfgNode) -> list[str]:
    return [n for n in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if n in DatasetCatalog]


def check_names_of_detector(names: Sequence[str] | None, dataset_name: str) -> None:
    """Raise a ValueError if a data set has other classes than a detector, or another order."""
    theirs = classes_of(dataset_name)
    if names is not None and theirs and list(names) != theirs:
        raise ValueError(
            f"The data set {dataset_name!r} has the classes {theirs}, "
            f"{how_they_differ(theirs, names)} the detector, which was trained on {list(names)}. "
            "It knows classes by number: take another data set, or make names and order the same"
        )


def num_classes_key(cfg: CfgNode) -> str | None:
    """The key with the number of classes of the config's meta architecture, or None."""
    section = _SECTIONS.get(cfg.MODEL.META_ARCHITECTURE)
    return section and f"MODEL.{section}.NUM_CLASSES"


def check_num_classes(cfg: CfgNode, dataset_name: str) -> None:
    """Raise a ValueError if a data set is known to have another number of classes than a model."""
    classes, key = classes_of(dataset_name), num_classes_key(cfg)
    if key and classes is not None and len(classes) != attrgetter(key)(cfg):
        raise ValueError(
            f"{key} is {attrgetter(key)(cfg)}, but the data set {dataset_name!r} has "
            f"{len(classes)} classes: {classes}. Set {key} to {len(classes)}"
        )


def check_same_classes(train: Sequence[str], test: Sequence[str]) -> None:
    """Raise a ValueError if registered data sets differ in their classes or in their order.

    Loads the data sets whose classes are not known.
    """
    names = [*train, *test]
    for name in names:
        if classes_of(name) is None:
            DatasetCatalog.get(name)
        theirs, first = classes_of(name) or [], classes_of(names[0]) or []
        if theirs != first:
            raise ValueError(
                f"The data set {name!r} has the classes {theirs}, {how_they_differ(theirs, first)} "
                f"{names[0]!r}, which has {first}. A detector knows classes by their number: make "
                "names and order the same (in a COCO file the order is that of the category ids)"
            )


def how_they_differ(names: Sequence[str], others: Sequence[str]) -> str:
    """How two lists of classes differ. The owner of the second follows in the message."""
    return "in another order than" if sorted(names) == sorted(others) else "unlike"
