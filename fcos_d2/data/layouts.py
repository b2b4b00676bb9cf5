"""Recognises the layout of a data set from its folder, or from one of its files."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import escape, glob

from detectron2.config import CfgNode

from .classes import SECTIONS
from .coco import parse_coco_json
from .data_yaml import read_data_yaml
from .voc import names_of_objects

SPLITS = ("train", "trainval", "val", "test")
# Files that COCO's own data set has beside those of boxes.
_NO_BOXES = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")


@dataclass(frozen=True)
class Layout:
    """A data set that was recognised.

    Attributes:
        format: "coco", "voc" or "yolo".
        entries: of DATASETS.CUSTOM, by split; a COCO file that names no split is "all".
    """

    format: str
    entries: dict[str, dict]


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
    look: dict[str, Callable[[str], dict]] = {"yolo": _yolo_in, "voc": _voc_in, "coco": _coco_in}
    found = {name: entries for name, find in look.items() if (entries := find(path))}
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
    held_outs = {"train": ("val", "test"), "trainval": ("test",)}.get(train, ())
    test = next((s for s in held_outs if s in layout.entries), None)
    if train is None:
        raise ValueError(f"{path} has nothing to train on, but {list(layout.entries)}")
    entries = {"train": layout.entries[train], "test": layout.entries[test or train]}
    held_out = f"tested on {test}"
    if test is None:
        entries = {part: entry | {"PART": part} for part, entry in entries.items()}
        held_out = "tested on a tenth of it, which is held out, chosen by the names of the images"
    for part, entry in entries.items():
        cfg.DATASETS.CUSTOM[f"data_{part}"] = CfgNode(entry, new_allowed=True)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("data_train",), ("data_test",)
    classes = _classes(entries["train"])
    section = SECTIONS.get(cfg.MODEL.META_ARCHITECTURE)
    if section is not None and f"MODEL.{section}.NUM_CLASSES" not in changed:
        cfg.MODEL[section].NUM_CLASSES = len(classes)
    return (
        f"{path} has the {layout.format.upper()} layout, with {', '.join(layout.entries)}, and "
        f"{len(classes)} classes: {', '.join(classes[:20])}{', ...' * (len(classes) > 20)}. "
        f"Trained on {train}, {held_out}"
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
    for root in (folder, *sorted(glob(os.path.join(escape(folder), "*", "")))):
        parts = ("Annotations", os.path.join("ImageSets", "Main"))
        if not all(os.path.isdir(os.path.join(root, part)) for part in parts):
            continue
        root = os.path.normpath(root)
        splits = [s for s in SPLITS if os.path.isfile(os.path.join(root, parts[1], f"{s}.txt"))]
        classes = sorted({name for split in splits for name in names_of_objects(root, split)})
        common = {"FORMAT": "voc", "ROOT": root, "CLASSES": classes}
        return {split: common | {"SPLIT": split} for split in splits}
    return {}


def _coco_in(folder: str) -> dict[str, dict]:
    top = escape(folder)
    files = sorted(
        f
        for pattern in ("*.json", "annotations/*.json", "*/_annotations.coco.json")
        for f in glob(os.path.join(top, pattern))
        if not os.path.basename(f).startswith(_NO_BOXES)
    )
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
    """With the folder where the first image is."""
    images = parse_coco_json(file)["images"]
    name = next((x["file_name"] for x in images if isinstance(x, dict) and "file_name" in x), None)
    folder = os.path.dirname(file)
    stem = os.path.splitext(os.path.basename(file))[0].removeprefix("instances_")
    above = os.path.dirname(folder)
    candidates = [
        os.path.join(parent, sub)
        for parent in (folder, above)
        for sub in ("", "images", stem, os.path.join("images", stem), "JPEGImages")
    ]
    for candidate in candidates:
        if isinstance(name, str) and os.path.isfile(os.path.join(candidate, name)):
            return {"FORMAT": "coco", "JSON": file, "IMAGES": os.path.normpath(candidate)}
    raise ValueError(
        f"{file}: its first image, {name!r}, is in none of the folders {candidates}. Declare the "
        "data set in DATASETS.CUSTOM, with IMAGES"
    )
