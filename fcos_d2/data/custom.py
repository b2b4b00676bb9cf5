"""Data sets of your own, declared in a config under ``DATASETS.CUSTOM``.

Each entry is registered with Detectron2 under its key. Three formats::

    DATASETS:
      CUSTOM:
        cells_train: {FORMAT: "coco", JSON: "cells/train.json", IMAGES: "cells/images"}
        cells_test: {FORMAT: "voc", ROOT: "cells", SPLIT: "test", CLASSES: ["RBC", "WBC"]}
        cars_train: {FORMAT: "yolo", DATA: "cars/data.yaml", SPLIT: "train"}

A COCO or YOLO entry may have ``CLASSES``, too: then its classes are known before the file is read,
and the file must have these. The config that a run writes has them. A VOC entry may set
``EVALUATOR`` to ``"coco"`` (the default, which takes the boxes as loaded) or ``"pascal_voc"``
(which reads the XML files itself, and ignores "difficult" objects). ``PART`` takes a part of the
images, see :func:`is_in_part`. Relative paths start at the folder in the environment variable
DETECTRON2_DATASETS, or else at ``datasets``, as for Detectron2's built-in data sets.
"""

import hashlib
import os
from functools import partial

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .classes import check_num_classes
from .coco import coco_loader
from .mapper import with_float_coordinates
from .voc import check_readable_by_pascal_voc_evaluator, load_voc
from .yolo import load_yolo

# The required and the optional keys of each format.
_KEYS = {
    "coco": ({"FORMAT", "JSON", "IMAGES"}, {"CLASSES", "PART"}),
    "voc": ({"FORMAT", "ROOT", "SPLIT", "CLASSES"}, {"EVALUATOR", "PART"}),
    "yolo": ({"FORMAT", "DATA", "SPLIT"}, {"CLASSES", "PART"}),
}
_PARTS = ("train", "test")
# The entry of each registered data set, and the folder that its relative paths start from.
_registered: dict[str, tuple[dict, str]] = {}


def register_custom_datasets(cfg: CfgNode) -> None:
    """Register the data sets of ``cfg.DATASETS.CUSTOM`` with Detectron2.

    Calling it again with the same entries changes nothing; a changed entry replaces the old one.

    Raises:
        ValueError: for an entry with an unknown format, with missing or unknown keys, or with the
            name of a data set that was registered elsewhere.
    """
    for name, entry in cfg.DATASETS.CUSTOM.items():
        registration = (dict(entry), _root())
        if _registered.get(name) == registration and name in DatasetCatalog:
            continue
        _check_entry(name, registration[0])
        if name in DatasetCatalog:
            if name not in _registered:
                raise ValueError(
                    f"DATASETS.CUSTOM.{name}: a data set with this name is already registered. "
                    "Choose another name"
                )
            DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)
        _REGISTER[entry["FORMAT"]](name, entry)
        _registered[name] = registration


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
    part = entry.get("PART")
    if part not in (None, *_PARTS) or (part and entry.get("EVALUATOR") == "pascal_voc"):
        raise ValueError(
            f"{where}.PART must be one of {list(_PARTS)}, and needs EVALUATOR 'coco', got {part!r}"
        )


def is_in_part(file_name: str, part: str | None) -> bool:
    """Whether an image is in a part of a data set: "train", "test" (about a tenth), or None: all.

    It depends on the file's name alone, so that an image stays in its part when others come.
    """
    if part is None:
        return True
    digest = hashlib.sha256(os.path.basename(file_name).encode(errors="replace")).digest()
    return (digest[0] % 10 == 0) == (part == "test")


def _register_coco(name: str, entry: dict) -> None:
    images = resolved_path(entry["IMAGES"])
    classes = entry.get("CLASSES")
    keep = partial(is_in_part, part=entry["PART"]) if "PART" in entry else None
    load_records = coco_loader(resolved_path(entry["JSON"]), images, name, classes, keep)
    # For those who do not use our mapper the coordinates are made floating point here.
    DatasetCatalog.register(name, lambda: [with_float_coordinates(x) for x in load_records()])
    metadata = MetadataCatalog.get(name).set(image_root=images, evaluator_type="coco")
    if classes is not None:
        metadata.set(thing_classes=list(classes))


def _register_voc(name: str, entry: dict) -> None:
    root, split, classes = resolved_path(entry["ROOT"]), str(entry["SPLIT"]), list(entry["CLASSES"])
    evaluator = entry.get("EVALUATOR", "coco")

    def load() -> list[dict]:
        records = load_voc(root, split, classes)
        if evaluator == "pascal_voc":
            check_readable_by_pascal_voc_evaluator(root, records)
        return [r for r in records if is_in_part(r["file_name"], entry.get("PART"))]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=classes,
        dirname=root,
        split=split,
        year=2012,  # average precision as in VOC 2010 and later: the area under the curve
        evaluator_type=evaluator,
    )


def _register_yolo(name: str, entry: dict) -> None:
    data, split, classes = resolved_path(entry["DATA"]), str(entry["SPLIT"]), entry.get("CLASSES")

    def load() -> list[dict]:
        records, found = load_yolo(data, split)
        if classes is not None and found != list(classes):
            raise ValueError(
                f"{data} has the classes {found}, but CLASSES of the data set {name!r} are "
                f"{list(classes)}. Remove CLASSES, or take the data set that they are of"
            )
        MetadataCatalog.get(name).set(thing_classes=found)
        return [r for r in records if is_in_part(r["file_name"], entry.get("PART"))]

    DatasetCatalog.register(name, load)
    metadata = MetadataCatalog.get(name).set(evaluator_type="coco")
    if classes is not None:
        metadata.set(thing_classes=list(classes))


_REGISTER = {"coco": _register_coco, "voc": _register_voc, "yolo": _register_yolo}


def _root() -> str:
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def resolved_path(path: str) -> str:
    """Where a path of DATASETS.CUSTOM is."""
    return os.path.join(_root(), path)
