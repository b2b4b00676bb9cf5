"""Compares the classes of data sets, configs and detectors before a training."""

from collections.abc import Sequence
from operator import attrgetter

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

# The section of MODEL with each meta architecture's NUM_CLASSES; ProposalNetwork has none.
_SECTIONS = {"FCOS": "FCOS", "RetinaNet": "RETINANET", "GeneralizedRCNN": "ROI_HEADS"}


def with_class_names(cfg: CfgNode) -> CfgNode:
    """A copy of a config whose entries of DATASETS.CUSTOM say the classes of loaded data sets."""
    cfg = cfg.clone()
    cfg.defrost()
    for name, entry in cfg.DATASETS.CUSTOM.items():
        classes = classes_of(name)
        if classes is not None:
            entry["CLASSES"] = classes
    return cfg


def classes_of(dataset_name: str) -> list[str] | None:
    """The classes of a registered data set; None as long as they are not known."""
    names = MetadataCatalog.get(dataset_name).get("thing_classes")
    return None if names is None else list(names)


def class_names(cfg: CfgNode) -> list[str] | None:
    """The classes of the first registered data set of a config that says them, or None."""
    known = (classes_of(name) for name in _registered(cfg))
    return next((names for names in known if names is not None), None)


def category_ids(cfg: CfgNode) -> list[int] | None:
    """The category id of each class in the files of the data sets; None where there are no ids.

    COCO files number their categories as they like; VOC and YOLO have names and class numbers.
    """
    for name in _registered(cfg):
        numbers = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
        if numbers is not None:
            return sorted(numbers, key=numbers.get)
    return None


def _registered(cfg: CfgNode) -> list[str]:
    return [n for n in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if n in DatasetCatalog]


def check_names_of_detector(names: Sequence[str] | None, dataset_name: str) -> None:
    """Compare the classes that a detector was trained on with those of a loaded data set.

    Args:
        names: None if they are not known.

    Raises:
        ValueError: if they differ, or are in another order, with both lists.
    """
    theirs = classes_of(dataset_name)
    if names is not None and theirs and list(names) != theirs:
        raise ValueError(
            f"The data set {dataset_name!r} has the classes {theirs}, "
            f"{how_they_differ(theirs, names)} the detector, which was trained on {list(names)}. "
            "It knows classes by their number: take another data set, or make the names and their "
            "order the same"
        )


def num_classes_key(cfg: CfgNode) -> str | None:
    """The key with the number of classes of the config's meta architecture, or None."""
    section = _SECTIONS.get(cfg.MODEL.META_ARCHITECTURE)
    return section and f"MODEL.{section}.NUM_CLASSES"


def check_num_classes(cfg: CfgNode, dataset_name: str) -> None:
    """Compare the model's number of classes with that of a registered data set.

    Covers the meta architectures that the configs use. The classes of COCO and YOLO data are known
    only once the data set has been loaded: before, nothing is compared.

    Raises:
        ValueError: if the numbers differ, with both numbers and the names of the classes.
    """
    classes, key = classes_of(dataset_name), num_classes_key(cfg)
    if key and classes is not None and len(classes) != attrgetter(key)(cfg):
        raise ValueError(
            f"{key} is {attrgetter(key)(cfg)}, but the data set {dataset_name!r} has "
            f"{len(classes)} classes: {classes}. Set {key} to {len(classes)}"
        )


def check_same_classes(train: Sequence[str], test: Sequence[str]) -> None:
    """Compare the classes of registered data sets, names and order.

    Loads those whose classes are known only then.

    Raises:
        ValueError: if a data set has other classes than the first one, or has them in another
            order, with both lists.
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
                "the names and their order the same (in a COCO file the order is that of the "
                "category ids)"
            )


def check_test_sets(cfg: CfgNode) -> None:
    """Load every data set of DATASETS.TEST, before a training that ends with its evaluation.

    Raises:
        ValueError: for a name that is not registered, a data set without images, another number of
            classes than the model's, and images that are not there.
        OSError: for annotations that are not there.
    """
    for name in cfg.DATASETS.TEST:
        if name not in DatasetCatalog:
            raise ValueError(
                f"DATASETS.TEST: there is no data set {name!r}. Known are, besides "
                f"DATASETS.CUSTOM {sorted(cfg.DATASETS.CUSTOM)}: {sorted(DatasetCatalog.list())}"
            )
        records = DatasetCatalog.get(name)
        check_num_classes(cfg, name)
        if not isinstance(records, list) or not comm.is_main_process():
            continue
        if not records:
            raise ValueError(f"The data set {name!r} of DATASETS.TEST has no images")
        files = [record["file_name"] for record in records]
        # Detectron2 reads addresses, too, which cannot be looked at.
        missing = [f for f in files if "://" not in f and not PathManager.isfile(f)]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(files)} images of the data set {name!r} are not there, "
                f"the first one: {missing[0]}"
            )


def how_they_differ(names: Sequence[str], others: Sequence[str]) -> str:
    """How two lists of classes differ; the message goes on with the owner of the second."""
    return "in another order than" if sorted(names) == sorted(others) else "unlike"
