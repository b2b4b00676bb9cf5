"""Recognises the layout of a data set from its folder, or from one of its files."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape, glob

from detectron2.config import CfgNode

from .classes import num_classes_key
from .coco import parse_coco_json
from .data_yaml import read_data_yaml
from .voc import names_of_objects

SPLITS = ("train", "trainval", "val", "test")
# Files that COCO's own data set has beside those of boxes.
_NO_BOXES = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")


@dataclass(frozen=True)
class Layout:
    """A data set that was recognised."""

    format: str  # "coco", "voc" or "yolo"
    entries: dict[str, dict]  # of DATASETS.CUSTOM, by split; a COCO file that names none is "all"


def recognise(path: str) -> Layout:
    """The layout of a folder, of a COCO annotation file, or of a data.yaml.

    Raises:
        OSError: for a path that is not there.
        ValueError: for no known layout, or for several in one folder.
    """
    path = os.path.abspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no file or folder {path}")
    if os.path.isfile(path):
        if path.lower().endswith((".yaml", ".yml")):
            return Layout("yolo", _yolo(path))
        if path.lower().endswith(".json"):
            return Layout("coco", {_split_of(path) or "all": _coco_entry(path)})
        raise ValueError(f"{path} is neither a folder, nor a .json file, nor a .yaml file")
    found = {"yolo": _yolo_in(path), "voc": _voc_in(path), "coco": _coco_in(path)}
    found = {name: entries for name, entries in found.items() if entries}
    if len(found) != 1:
        raise ValueError(
            f"{path} has {'several layouts: ' + ', '.join(found) if found else 'no known layout'}. "
            "Known are: YOLO, a folder with a data.yaml; VOC, one with Annotations, "
            "ImageSets/Main and JPEGImages; COCO, one with a .json file for each split, itself or "
            "in a folder 'annotations'. Name the file, or declare the sets in DATASETS.CUSTOM"
        )
    return Layout(*found.popitem())


def use_data(cfg: CfgNode, path: str, changed: Sequence[str] = ()) -> str:
    """Train and test a config on a data set that is recognised by its path, in place of its own.

    The model's NUM_CLASSES becomes that of the data, unless it is among the keys ``changed``.

    Args:
        cfg: changed in place.
        changed: keys that the command line sets.

    Returns:
        what was found and taken, as a sentence.

    Raises:
        OSError, ValueError: see :func:`recognise`; and for a data set with no split to train on.
    """
    layout = recognise(path)
    train = next((s for s in ("train", "trainval", "all") if s in layout.entries), None)
    if train is None:
        raise ValueError(f"{path} has nothing to train on, but {list(layout.entries)}")
    held_out = {"train": ("val", "test"), "trainval": ("test",), "all": ()}[train]
    test = next((s for s in held_out if s in layout.entries), None)
    for part, split in (("train", train), ("test", test or train)):
        entry = layout.entries[split] | ({"PART": part} if test is None else {})
        cfg.DATASETS.CUSTOM[f"data_{part}"] = CfgNode(entry, new_allowed=True)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("data_train",), ("data_test",)
    classes = _classes(layout.entries[train])
    key = num_classes_key(cfg)
    if key not in (None, *changed):
        cfg.merge_from_list([key, len(classes)])
    return (
        f"{path} has the {layout.format.upper()} layout, with {', '.join(layout.entries)}, and "
        f"{len(classes)} classes: {', '.join(classes[:20])}{', ...' * (len(classes) > 20)}. "
        f"Trained on {train}, tested on "
        + (test or "a tenth of it, which is held out, chosen by the names of the images")
    )


def _classes(entry: dict) -> list[str]:
    if entry["FORMAT"] == "voc":
        return entry["CLASSES"]
    if entry["FORMAT"] == "yolo":
        return read_data_yaml(entry["DATA"]).classes
    categories = parse_coco_json(entry["JSON"])["categories"]
    return [str(c.get("name")) if isinstance(c, dict) else "?" for c in categories]


def _yolo_in(folder: str) -> dict[str, dict]:
    file = os.path.join(folder, "data.yaml")
    return _yolo(file) if os.path.isfile(file) else {}


def _yolo(file: str) -> dict[str, dict]:
    splits = read_data_yaml(file).splits
    return {split: {"FORMAT": "yolo", "DATA": file, "SPLIT": split} for split in splits}


def _voc_in(folder: str) -> dict[str, dict]:
    for root in (folder, *sorted(glob(os.path.join(escape(folder), "*")))):
        lists = os.path.join(root, "ImageSets", "Main")
        if os.path.isdir(os.path.join(root, "Annotations")) and os.path.isdir(lists):
            splits = [s for s in SPLITS if os.path.isfile(os.path.join(lists, f"{s}.txt"))]
            classes = sorted({name for split in splits for name in names_of_objects(root, split)})
            common = {"FORMAT": "voc", "ROOT": root, "CLASSES": classes}
            return {split: common | {"SPLIT": split} for split in splits}
    return {}


def _coco_in(folder: str) -> dict[str, dict]:
    patterns = ("*.json", "annotations/*.json", "*/_annotations.coco.json")
    files = sorted(f for p in patterns for f in glob(os.path.join(escape(folder), p)))
    files = [f for f in files if not os.path.basename(f).startswith(_NO_BOXES)]
    entries: dict[str, dict] = {}
    for file in files:
        split = _split_of(file) or ("all" if len(files) == 1 else None)
        if split is None:
            continue
        if split in entries:
            raise ValueError(
                f"{folder} has several files for the split {split!r}: {entries[split]['JSON']} and "
                f"{file}. Name the file"
            )
        entries[split] = _coco_entry(file)
    return entries


def _split_of(file: str) -> str | None:
    """The split that the name of a file names; some exports name it in the folder alone."""
    folder, name = os.path.split(file)
    name = os.path.basename(folder) if name == "_annotations.coco.json" else name
    match = re.search(r"(?<![a-z])(trainval|train|val|test)(?:id|idation)?(?![a-z])", name.lower())
    return match[1] if match else None


def _coco_entry(file: str) -> dict:
    """The entry of an annotation file, with the folder where its first image is."""
    images = parse_coco_json(file)["images"]
    name = next((x["file_name"] for x in images if isinstance(x, dict) and "file_name" in x), None)
    folder = os.path.dirname(file)
    stem = os.path.splitext(os.path.basename(file))[0].removeprefix("instances_")
    below = ("", "images", stem, os.path.join("images", stem), "JPEGImages")
    parents = (folder, os.path.dirname(folder))
    candidates = [os.path.join(parent, sub) for parent in parents for sub in below]
    for candidate in candidates:
        if isinstance(name, str) and os.path.isfile(os.path.join(candidate, name)):
            return {"FORMAT": "coco", "JSON": file, "IMAGES": os.path.normpath(candidate)}
    raise ValueError(
        f"{file}: its first image, {name!r}, is in none of the folders {candidates}. Declare the "
        "data set in DATASETS.CUSTOM, with IMAGES"
    )
