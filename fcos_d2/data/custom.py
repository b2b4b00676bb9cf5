"""Data sets of your own, declared in a config under ``DATASETS.CUSTOM``.

Each entry is registered with Detectron2 under its key. There are three formats::

    DATASETS:
      CUSTOM:
        cells_train: {FORMAT: "coco", JSON: "cells/train.json", IMAGES: "cells/images"}
        cells_test: {FORMAT: "voc", ROOT: "cells", SPLIT: "test", CLASSES: ["RBC", "WBC"]}
        cars_train: {FORMAT: "yolo", DATA: "cars/data.yaml", SPLIT: "train"}

``CLASSES`` of a COCO or YOLO entry are optional: with them the classes are known before the file is
read, and the file must have the same. A run writes them into its config. ``EVALUATOR`` of a VOC
entry is ``"coco"`` (the default, which takes the boxes as loaded) or ``"pascal_voc"`` (which reads
the XML files itself, and ignores "difficult" objects). ``PART`` takes a part of the images, see
:func:`is_in_part`. Relative paths start at the folder in the environment variable
DETECTRON2_DATASETS, or else at ``datasets``, as for Detectron2's built-in data sets.
"""

import hashlib
import os
from collections.abc import Mapping
from functools import partial

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .coco import read_coco, training_file
from .mapper import with_float_coordinates
from .raw_data import RawData
from .voc import check_readable_by_pascal_voc_evaluator, read_voc
from .yolo import read_yolo

# The required and the optional keys of each format.
_KEYS = {
    "coco": ({"FORMAT", "JSON", "IMAGES"}, {"CLASSES", "PART"}),
    "voc": ({"FORMAT", "ROOT", "SPLIT", "CLASSES"}, {"EVALUATOR", "PART"}),
    "yolo": ({"FORMAT", "DATA", "SPLIT"}, {"CLASSES", "PART"}),
}
_PATHS = ("JSON", "IMAGES", "ROOT", "DATA")
_PARTS = ("train", "test")
# The entry of each registered data set, with full paths.
_registered: dict[str, dict] = {}


def register_custom_datasets(cfg: CfgNode) -> None:
    """Register the data sets of ``cfg.DATASETS.CUSTOM`` with Detectron2.

    Calling it again with the same entries changes nothing; a changed entry replaces the old one.

    Raises:
        ValueError: for an entry with an unknown format, with missing or unknown keys, or with the
            name of a data set that was registered elsewhere.
    """
    for name, declared in cfg.DATASETS.CUSTOM.items():
        entry = _with_resolved_paths(declared)
        if _registered.get(name) == entry and name in DatasetCatalog:
            continue
        _check_entry(name, entry)
        if name in DatasetCatalog:
            if name not in _registered:
                raise ValueError(
                    f"DATASETS.CUSTOM.{name}: a data set with this name is already registered. "
                    "Choose another name"
                )
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
        _register(name, entry)
        _registered[name] = entry


def read_entry(name: str, entry: dict) -> RawData:
    """Read the data set of an entry. What cannot be read at all is an OSError or a ValueError."""
    return _read(name, _with_resolved_paths(entry))


def load_dataset(cfg: CfgNode, name: str) -> list[dict]:
    """The records of a data set that is registered with Detectron2 or in DATASETS.CUSTOM.

    Raises:
        ValueError: if no data set has this name, with a list of the registered ones.
    """
    register_custom_datasets(cfg)
    if name not in DatasetCatalog:
        names = sorted(DatasetCatalog)
        raise ValueError(f"No data set {name!r} is registered. The registered ones are: {names}")
    return DatasetCatalog.get(name)


def find_record(records: list[dict], image_id: str) -> dict:
    """The record of a data set with an ``image_id``, which may be a number or text.

    Raises:
        ValueError: if there is none, with the first ones that there are.
    """
    for record in records:
        if str(record.get("image_id")) == image_id:
            return record
    known = [record.get("image_id") for record in records[:5]]
    raise ValueError(
        f"The data set has no image with the image_id {image_id!r}. The first ones of its "
        f"{len(records)} images are: {known}"
    )


def _check_entry(name: str, entry: dict) -> None:
    where = f"DATASETS.CUSTOM.{name}"
    if entry.get("FORMAT") not in _KEYS:
        raise ValueError(
            f"{where}.FORMAT must be one of {list(_KEYS)}, got {entry.get('FORMAT')!r}"
        )
    required, optional = _KEYS[entry["FORMAT"]]
    if sum(keys <= entry.keys() for keys, _ in _KEYS.values()) > 1:
        others = ", ".join(sorted(entry.keys() - required - optional))
        raise ValueError(
            f"{where} has keys of several formats (FORMAT {entry['FORMAT']!r}, but also {others}): "
            f"a base config declares {name} with another FORMAT. Give the data set another name, "
            "and put this name into DATASETS.TRAIN or TEST"
        )
    if not required <= entry.keys() <= required | optional:
        raise ValueError(
            f"{where} must have the keys {sorted(required)} and may have {sorted(optional)}, "
            f"got {sorted(entry)}"
        )
    evaluator, part = entry.get("EVALUATOR", "coco"), entry.get("PART")
    if evaluator not in ("coco", "pascal_voc"):
        raise ValueError(f"{where}.EVALUATOR must be 'coco' or 'pascal_voc'")
    if part not in (None, *_PARTS) or (part and evaluator != "coco"):
        raise ValueError(
            f"{where}.PART must be one of {list(_PARTS)}, and needs EVALUATOR 'coco', got {part!r}"
        )


def is_in_part(file_name: str, part: str) -> bool:
    """Whether an image is in the part "train", or in "test", which is about a tenth.

    The name of the file alone decides, so that an image stays in its part when others come.
    """
    digest = hashlib.sha256(os.path.basename(file_name).encode(errors="replace")).digest()
    return (digest[0] % 10 == 0) == (part == "test")


def _read(name: str, entry: dict) -> RawData:
    if entry["FORMAT"] == "coco":
        data = read_coco(name, entry["JSON"], entry["IMAGES"])
    elif entry["FORMAT"] == "voc":
        data = read_voc(name, entry["ROOT"], str(entry["SPLIT"]), entry["CLASSES"])
    else:
        data = read_yolo(name, entry["DATA"], str(entry["SPLIT"]))
    if entry.get("PART") is not None:
        _keep_part(data, entry["PART"])
    return data


def _keep_part(data: RawData, part: str) -> None:
    left_out = {i["id"] for i in data.images if not is_in_part(i["file_name"], part)}
    data.images = [image for image in data.images if image["id"] not in left_out]
    kept = [i for i, a in enumerate(data.annotations) if a["image_id"] not in left_out]
    data.annotations = [data.annotations[i] for i in kept]
    data.places = [data.places[i] for i in kept]
    data.findings = [f for f in data.findings if f.image not in left_out]


def _register(name: str, entry: dict) -> None:
    is_coco = entry["FORMAT"] == "coco"
    DatasetCatalog.register(name, partial(_load_coco if is_coco else _load, name, entry))
    metadata = MetadataCatalog.get(name).set(evaluator_type=entry.get("EVALUATOR", "coco"))
    if entry.get("CLASSES") is not None:
        metadata.set(thing_classes=list(entry["CLASSES"]))
    if is_coco:
        metadata.set(image_root=entry["IMAGES"])
    if entry["FORMAT"] == "voc":
        # Average precision as in VOC 2010 and later: the area under the curve.
        metadata.set(dirname=entry["ROOT"], split=str(entry["SPLIT"]), year=2012)


def _load(name: str, entry: dict) -> list[dict]:
    """The records of a data set in VOC or YOLO layout."""
    data = _read(name, entry)
    records = data.training_records()
    _check_classes(name, entry, data)
    MetadataCatalog.get(name).set(thing_classes=data.classes)
    if entry.get("EVALUATOR") == "pascal_voc":
        check_readable_by_pascal_voc_evaluator(entry["ROOT"], records)
    return records


def _load_coco(name: str, entry: dict) -> list[dict]:
    """The records of Detectron2's loader, from a file that is checked the first time."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file") is None:
        data = _read(name, entry)
        file = training_file(data, is_part=entry.get("PART") is not None)
        _check_classes(name, entry, data)
        metadata.set(json_file=file)  # which the COCO evaluator reads, too
    # Our mapper makes coordinates floating point; here this is done for others.
    records = load_coco_json(metadata.json_file, entry["IMAGES"], name)
    return [with_float_coordinates(record) for record in records]


def _check_classes(name: str, entry: dict, data: RawData) -> None:
    classes = entry.get("CLASSES")
    if classes is not None and data.classes != list(classes):
        raise ValueError(
            f"{data.source} has the classes {data.classes}, but CLASSES of the data set {name!r} "
            f"are {list(classes)}. Remove CLASSES, or take the file that they are of"
        )


def _with_resolved_paths(entry: Mapping) -> dict:
    """A copy of an entry, whose relative paths start at the folder of the data sets."""
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    return {k: os.path.join(root, v) if k in _PATHS else v for k, v in entry.items()}
