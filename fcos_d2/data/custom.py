"""Data sets of your own, declared in a config under ``DATASETS.CUSTOM``.

Each entry is registered with Detectron2 under its key. There are four formats; "xml" is VOC's
files in folders of any name::

    cells_train: {FORMAT: "coco", JSON: "cells/train.json", IMAGES: "cells/images"}
    cells_test: {FORMAT: "voc", ROOT: "cells", SPLIT: "test", CLASSES: ["RBC", "WBC"]}
    cars_train: {FORMAT: "yolo", DATA: "cars/data.yaml", SPLIT: "train"}
    dogs_train: {FORMAT: "xml", XML: "dogs/xml", IMAGES: "dogs/images", CLASSES: ["dog"]}

With the optional ``CLASSES`` of a COCO or YOLO entry the classes are known before the file is read.
A run writes them into its config. ``EVALUATOR`` of a VOC entry is ``"coco"`` (the default, which
takes the boxes as loaded) or ``"pascal_voc"`` (which reads the XML files itself, and ignores
"difficult" objects). ``PART`` takes a part of the images, see :func:`is_in_part`. Relative paths
start at the folder in the environment variable DETECTRON2_DATASETS, or else at ``datasets``.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .coco import can_be_evaluated, read_coco, training_records, write_repaired
from .raw_data import RawData
from .voc import check_readable_by_pascal_voc_evaluator, read_voc, read_xml
from .yolo import read_yolo

# The required and the optional keys of each format.
_KEYS = {
    "coco": ({"FORMAT", "JSON", "IMAGES"}, {"CLASSES", "PART"}),
    "voc": ({"FORMAT", "ROOT", "SPLIT", "CLASSES"}, {"EVALUATOR", "PART"}),
    "yolo": ({"FORMAT", "DATA", "SPLIT"}, {"CLASSES", "PART"}),
    "xml": ({"FORMAT", "XML", "IMAGES", "CLASSES"}, {"PART"}),
}
_PATHS = ("JSON", "IMAGES", "ROOT", "DATA", "XML")
_PARTS = ("train", "test")
# The entry of each registered data set, with full paths.
_registered: dict[str, dict] = {}
# Data sets that are being loaded to train on: the evaluation needs no file of them.
loaded_to_train: set[str] = set()


def register_custom_datasets(cfg: CfgNode, read: dict[str, RawData] | None = None) -> None:
    """Register the data sets of ``cfg.DATASETS.CUSTOM`` with Detectron2.

    Calling it again with the same entries changes nothing; a changed entry replaces the old one.

    Args:
        read: data sets that have been read, by name. The first loading of each takes it out.

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
        _register(name, entry, {} if read is None else read)
        _registered[name] = entry


def read_entry(name: str, entry: dict) -> RawData:
    """The data set of an entry. What cannot be read at all is an OSError or a ValueError."""
    entry = _with_resolved_paths(entry)
    return _part_of(_read(name, entry), entry)


def load_dataset(cfg: CfgNode, name: str) -> list[dict]:
    """The records of a registered data set or of one in DATASETS.CUSTOM, else a ValueError."""
    register_custom_datasets(cfg)
    if name not in DatasetCatalog:
        names = sorted(DatasetCatalog)
        raise ValueError(f"No data set {name!r} is registered. The registered ones are: {names}")
    return DatasetCatalog.get(name)


def find_record(records: list[dict], image_id: str) -> dict:
    """The record with an ``image_id``, a number or text. If there is none, a ValueError."""
    for record in records:
        if str(record.get("image_id")) == image_id:
            return record
    known = [record.get("image_id") for record in records[:5]]
    raise ValueError(
        f"The data set has no image with the image_id {image_id!r}. The first ones of its "
        f"{len(records)} images are: {known}"
    )


def is_in_part(file_name: str, part: str) -> bool:
    """Whether an image is in the part "train", or in "test", which is about a tenth.

    The name of the file alone decides, so that an image stays in its part when others come.
    """
    digest = hashlib.sha256(os.path.basename(file_name).encode(errors="replace")).digest()
    return (digest[0] % 10 == 0) == (part == "test")


def _check_entry(name: str, entry: dict) -> None:
    where = f"DATASETS.CUSTOM.{name}"
    kind = entry.get("FORMAT")
    if kind not in _KEYS:
        raise ValueError(f"{where}.FORMAT must be one of {list(_KEYS)}, got {kind!r}")
    required, optional = _KEYS[kind]
    if sum(keys <= entry.keys() for keys, _ in _KEYS.values()) > 1:
        others = ", ".join(sorted(entry.keys() - required - optional))
        raise ValueError(
            f"{where} has keys of several formats (FORMAT {kind!r}, but also {others}): "
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


def _read(name: str, entry: dict) -> RawData:
    if entry["FORMAT"] == "coco":
        return read_coco(name, entry["JSON"], entry["IMAGES"])
    if entry["FORMAT"] == "voc":
        return read_voc(name, entry["ROOT"], str(entry["SPLIT"]), entry["CLASSES"])
    if entry["FORMAT"] == "xml":
        return read_xml(name, entry["XML"], entry["IMAGES"], entry["CLASSES"])
    return read_yolo(name, entry["DATA"], str(entry["SPLIT"]))


def _part_of(data: RawData, entry: dict) -> RawData:
    if entry.get("PART") is None:
        return data
    left_out = {i["id"] for i in data.images if not is_in_part(i["file_name"], entry["PART"])}
    kept = [i for i, a in enumerate(data.annotations) if a["image_id"] not in left_out]
    return replace(
        data,
        images=[image for image in data.images if image["id"] not in left_out],
        annotations=[data.annotations[i] for i in kept],
        places=[data.places[i] for i in kept],
        findings=[f for f in data.findings if f.image not in left_out],
    )


def _register(name: str, entry: dict, read: dict[str, RawData]) -> None:
    metadata = MetadataCatalog.get(name).set(evaluator_type=entry.get("EVALUATOR", "coco"))
    if entry.get("CLASSES") is not None:
        metadata.set(thing_classes=list(entry["CLASSES"]))
    if entry["FORMAT"] == "coco":
        metadata.set(image_root=entry["IMAGES"])
    if entry["FORMAT"] == "voc":
        # Average precision as in VOC 2010 and later: the area under the curve.
        metadata.set(dirname=entry["ROOT"], split=str(entry["SPLIT"]), year=2012)
    load = _load_coco if entry["FORMAT"] == "coco" else _load
    DatasetCatalog.register(name, partial(load, read, name, entry))


def _load(read: dict[str, RawData], name: str, entry: dict) -> list[dict]:
    """The records of a data set that is no COCO file."""
    data = _part_of(read.pop(name, None) or _read(name, entry), entry)
    records = data.training_records()
    _check_classes(name, entry, data)
    MetadataCatalog.get(name).set(thing_classes=data.classes)
    if entry.get("EVALUATOR") == "pascal_voc":
        check_readable_by_pascal_voc_evaluator(entry["ROOT"], records)
    return records


def _load_coco(read: dict[str, RawData], name: str, entry: dict) -> list[dict]:
    """The records of a COCO file. The metadata get the file that the evaluation reads."""
    metadata = MetadataCatalog.get(name)
    file = metadata.get("json_file")
    if file is not None:  # of an earlier call: the file of the entry, or its repaired copy
        data = whole = read_coco(name, file, entry["IMAGES"])
    else:
        # The whole stays until the end: if records took the gaps that the other part leaves, its
        # memory could not be given back.
        whole = read.pop(name, None) or _read(name, entry)
        data = _part_of(whole, entry)
    findings = data.dropped()
    _check_classes(name, entry, data)
    if file is None and data is whole and can_be_evaluated(data, findings):
        metadata.set(json_file=data.source)
    elif file is None and name not in loaded_to_train:
        metadata.set(json_file=write_repaired(data, findings))
    numbers = {category["id"]: i for i, category in enumerate(data.categories)}
    metadata.set(thing_dataset_id_to_contiguous_id=numbers, thing_classes=data.classes)
    return training_records(data, findings)


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
