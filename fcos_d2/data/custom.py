"""Data sets of your own, declared in a config under ``DATASETS.CUSTOM``.

Each entry is registered with Detectron2 under its key. Two formats::

    DATASETS:
      CUSTOM:
        cells_train: {FORMAT: "coco", JSON: "cells/train.json", IMAGES: "cells/images"}
        cells_test: {FORMAT: "voc", ROOT: "cells", SPLIT: "test", CLASSES: ["RBC", "WBC"]}

A VOC entry may set ``EVALUATOR`` to ``"coco"`` (the default, which takes the boxes as loaded) or
``"pascal_voc"`` (which reads the XML files itself, and ignores "difficult" objects). Relative paths
start at the folder in the environment variable DETECTRON2_DATASETS, or else at ``datasets``, as for
Detectron2's built-in data sets.
"""

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_voc_instances, register_coco_instances
from detectron2.evaluation.pascal_voc_evaluation import parse_rec

# The required and the optional keys of each format.
_KEYS = {
    "coco": ({"FORMAT", "JSON", "IMAGES"}, set()),
    "voc": ({"FORMAT", "ROOT", "SPLIT", "CLASSES"}, {"EVALUATOR"}),
}
# The section of MODEL with each meta architecture's NUM_CLASSES; ProposalNetwork has none.
_SECTIONS = {"FCOS": "FCOS", "RetinaNet": "RETINANET", "GeneralizedRCNN": "ROI_HEADS"}
_registered: dict[str, dict] = {}


def register_custom_datasets(cfg: CfgNode) -> None:
    """Register the data sets of ``cfg.DATASETS.CUSTOM`` with Detectron2.

    Calling it again with the same entries changes nothing; a changed entry replaces the old one.

    Raises:
        ValueError: for an entry with an unknown format, with missing or unknown keys, or with the
            name of a data set that was registered elsewhere.
    """
    for name, entry in cfg.DATASETS.CUSTOM.items():
        entry = dict(entry)
        if _registered.get(name) == entry:
            continue
        _check_entry(name, entry)
        if name in _registered:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        elif name in DatasetCatalog:
            raise ValueError(
                f"DATASETS.CUSTOM.{name}: a data set with this name is already registered. "
                "Choose another name"
            )
        if entry["FORMAT"] == "coco":
            register_coco_instances(name, {}, _path(entry["JSON"]), _path(entry["IMAGES"]))
        else:
            _register_voc(name, entry)
        _registered[name] = entry


def check_num_classes(cfg: CfgNode, dataset_name: str) -> None:
    """Compare the model's number of classes with that of a registered data set.

    Covers the meta architectures that the configs use. The classes of a COCO JSON are known only
    once the data set has been loaded: before, nothing is compared.

    Raises:
        ValueError: if the numbers differ, with both numbers and the names of the classes.
    """
    classes = MetadataCatalog.get(dataset_name).get("thing_classes", None)
    section = _SECTIONS.get(cfg.MODEL.META_ARCHITECTURE)
    if section is None or classes is None:
        return
    key, num_classes = f"MODEL.{section}.NUM_CLASSES", cfg.MODEL[section].NUM_CLASSES
    if len(classes) != num_classes:
        raise ValueError(
            f"{key} is {num_classes}, but the data set {dataset_name!r} has {len(classes)} "
            f"classes: {list(classes)}. Set {key} to {len(classes)}"
        )


def _check_entry(name: str, entry: dict) -> None:
    where = f"DATASETS.CUSTOM.{name}"
    if entry.get("FORMAT") not in _KEYS:
        raise ValueError(
            f"{where}.FORMAT must be one of {list(_KEYS)}, got {entry.get('FORMAT')!r}"
        )
    required, optional = _KEYS[entry["FORMAT"]]
    if not required <= entry.keys() <= required | optional:
        raise ValueError(
            f"{where} must have the keys {sorted(required)} and may have {sorted(optional)}, "
            f"got {sorted(entry)}"
        )
    if entry.get("EVALUATOR", "coco") not in ("coco", "pascal_voc"):
        raise ValueError(f"{where}.EVALUATOR must be 'coco' or 'pascal_voc'")


def _register_voc(name: str, entry: dict) -> None:
    root, split, classes = _path(entry["ROOT"]), entry["SPLIT"], list(entry["CLASSES"])
    evaluator = entry.get("EVALUATOR", "coco")

    def load() -> list[dict]:
        dicts = _load_voc(root, split, classes)
        if evaluator == "pascal_voc":
            _check_readable_by_pascal_voc_evaluator(root, dicts)
        return dicts

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=classes,
        dirname=root,
        split=split,
        year=2012,  # average precision as in VOC 2010 and later: the area under the curve
        evaluator_type=evaluator,
    )


def _load_voc(root: str, split: str, classes: list[str]) -> list[dict]:
    """Load with Detectron2's VOC loader, and drop boxes without area."""
    try:
        dicts = load_voc_instances(root, split, classes)
    except ValueError as error:  # an unknown class: "'x' is not in list"
        raise ValueError(
            f"{root}, split {split}: {error}; CLASSES is {classes}. It must list every <name> of "
            "the annotations, with the same spelling"
        ) from error
    dropped = []
    for image in dicts:
        kept = []
        for annotation in image["annotations"]:
            x0, y0, x1, y1 = annotation["bbox"]
            x0, y0 = x0 + 1, y0 + 1  # as in the file: the loader subtracts one pixel
            if x1 > x0 and y1 > y0:
                kept.append(annotation)
            else:
                dropped.append(f"{image['image_id']} ({x0:g}, {y0:g}, {x1:g}, {y1:g})")
        image["annotations"] = kept
    if dropped:
        logging.getLogger(__name__).warning(
            f"{root}, split {split}: dropped {len(dropped)} box(es) without area, as image "
            f"(xmin, ymin, xmax, ymax): {'; '.join(dropped)}"
        )
    return dicts


def _check_readable_by_pascal_voc_evaluator(root: str, dicts: list[dict]) -> None:
    """Report files that Detectron2's evaluator cannot read, before the training, not after it."""
    for image in dicts:
        file = os.path.join(root, "Annotations", f"{image['image_id']}.xml")
        try:
            parse_rec(file)
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"{file}: the PASCAL VOC evaluator needs <pose>, <truncated>, <difficult> and "
                f"whole-number corners in every object ({error}). Add them, or set EVALUATOR "
                "'coco' for this data set"
            ) from error


def _path(path: str) -> str:
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    return os.path.join(root, path)
