"""Recognises the layout of a data set from its folder, or from one of its files."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import escape, glob

from detectron2.config import CfgNode

from .classes import num_classes_key
from .coco import read_coco
from .data_yaml import read_data_yaml
from .raw_data import RawData
from .voc import names_of_objects

SPLITS = ("train", "trainval", "val", "test")
# Files that COCO's own data set has beside those of boxes.
_NO_BOXES = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")


@dataclass(frozen=True)
class Layout:
    """A data set that was recognised."""

    format: str  # "coco", "voc" or "yolo"
    entries: dict[str, dict]  # of DATASETS.CUSTOM, by split; a COCO file that names none is "all"
    read: dict[str, RawData] = field(default_factory=dict)  # the content of COCO files, by split


def recognise(path: str) -> Layout:
    """The layout of a folder, of a COCO annotation file, or of a data.yaml.

    It is an OSError if the path is not there, a ValueError for no known layout or for several.
    """
    path = os.path.abspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no file or folder {path}")
    if os.path.isfile(path):
        if path.lower().endswith((".yaml", ".yml")):
            return _yolo(path)
        if path.lower().endswith(".json"):
            return _coco({_split_of(path) or "all": path})
        raise ValueError(f"{path} is neither a folder, nor a .json file, nor a .yaml file")
    layouts = _yolo(os.path.join(path, "data.yaml")), _voc(path), _coco(_coco_files(path))
    found = [layout for layout in layouts if layout.entries]
    if len(found) != 1:
        several = ", ".join(layout.format for layout in found)
        raise ValueError(
            f"{path} has {f'several layouts: {several}' if found else 'no known layout'}. Known "
            "are: YOLO, a folder with a data.yaml; VOC, one with Annotations, ImageSets/Main and "
            "JPEGImages; COCO, one with a .json file for each split, itself or in a folder "
            "'annotations'. Name the file, or declare the sets in DATASETS.CUSTOM"
        )
    return found[0]


def use_data(
    cfg: CfgNode, path: str, changed: Sequence[str] = ()
) -> tuple[str, dict[str, RawData]]:
    """Train and test a config on a data set that is recognised by its path, in place of its own.

    The model's NUM_CLASSES becomes that of the data, unless it is among the keys ``changed``, which
    the command line sets.

    Returns:
        what was found and taken, as a sentence; and by the name of the data set what has been read
        of it, for :func:`register_custom_datasets`.

    Raises:
        OSError, ValueError: see :func:`recognise`; and for a data set with no split to train on.
    """
    layout = recognise(path)
    train = next((s for s in ("train", "trainval", "all") if s in layout.entries), None)
    if train is None:
        raise ValueError(f"{path} has nothing to train on, but {list(layout.entries)}")
    held_out = {"train": ("val", "test"), "trainval": ("test",), "all": ()}[train]
    test = next((s for s in held_out if s in layout.entries), None)
    read = {}
    for part, split in (("train", train), ("test", test or train)):
        entry = layout.entries[split] | ({"PART": part} if test is None else {})
        cfg.DATASETS.CUSTOM[f"data_{part}"] = CfgNode(entry, new_allowed=True)
        if split in layout.read:
            read[f"data_{part}"] = layout.read[split]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("data_train",), ("data_test",)
    classes, key = layout.entries[train]["CLASSES"], num_classes_key(cfg)
    if key not in (None, *changed):
        cfg.merge_from_list([key, len(classes)])
    said = (
        f"{path} has the {layout.format.upper()} layout, with {', '.join(layout.entries)}, and "
        f"{len(classes)} classes: {', '.join(classes[:20])}{', ...' * (len(classes) > 20)}. "
        f"Trained on {train}, tested on "
        + (test or "a tenth of it, which is held out, chosen by the names of the images")
    )
    return said, read


def _yolo(file: str) -> Layout:
    if not os.path.isfile(file):
        return Layout("yolo", {})
    described = read_data_yaml(file)
    common = {"FORMAT": "yolo", "DATA": file, "CLASSES": described.classes}
    return Layout("yolo", {split: common | {"SPLIT": split} for split in described.splits})


def _voc(folder: str) -> Layout:
    for root in (folder, *sorted(glob(os.path.join(escape(folder), "*")))):
        lists = os.path.join(root, "ImageSets", "Main")
        if os.path.isdir(os.path.join(root, "Annotations")) and os.path.isdir(lists):
            splits = [s for s in SPLITS if os.path.isfile(os.path.join(lists, f"{s}.txt"))]
            classes = sorted({name for split in splits for name in names_of_objects(root, split)})
            common = {"FORMAT": "voc", "ROOT": root, "CLASSES": classes}
            return Layout("voc", {split: common | {"SPLIT": split} for split in splits})
    return Layout("voc", {})


def _coco(files: dict[str, str]) -> Layout:
    read = {split: _read_with_images(split, file) for split, file in files.items()}
    entries = {
        split: {"FORMAT": "coco", "JSON": x.source, "IMAGES": x.image_root, "CLASSES": x.classes}
        for split, x in read.items()
    }
    return Layout("coco", entries, read)


def _coco_files(folder: str) -> dict[str, str]:
    """The annotation file of each split."""
    patterns = ("*.json", "annotations/*.json", "*/_annotations.coco.json")
    files = sorted(f for p in patterns for f in glob(os.path.join(escape(folder), p)))
    files = [f for f in files if not os.path.basename(f).startswith(_NO_BOXES)]
    found: dict[str, str] = {}
    for file in files:
        split = _split_of(file) or ("all" if len(files) == 1 else "")
        if found.setdefault(split, file) != file and split:
            raise ValueError(
                f"{folder} has several files for the split {split!r}: {found[split]} and {file}. "
                "Name the file"
            )
    return {split: file for split, file in found.items() if split}


def _split_of(file: str) -> str | None:
    """The split in the name of a file; some exports have it in the name of the folder alone."""
    folder, name = os.path.split(file)
    name = os.path.basename(folder) if name == "_annotations.coco.json" else name
    match = re.search(r"(?<![a-z])(trainval|train|val|test)(?:id|idation)?(?![a-z])", name.lower())
    return match[1] if match else None


def _read_with_images(split: str, file: str) -> RawData:
    """The content of an annotation file, with the folder where its first image is."""
    data = read_coco(split, file, "")
    if not data.images:
        raise data.error or ValueError(f"{file} has no images")
    folder, base = os.path.split(file)
    stem = os.path.splitext(base)[0].removeprefix("instances_")
    below = ("", "images", stem, os.path.join("images", stem), "JPEGImages")
    parents = (folder, os.path.dirname(folder))
    candidates = [os.path.join(parent, sub) for parent in parents for sub in below]
    name = data.images[0]["file_name"]
    for candidate in candidates:
        if os.path.isfile(os.path.join(candidate, name)):
            data.image_root = os.path.normpath(candidate)
            return data
    raise ValueError(
        f"{file}: its first image, {name!r}, is in none of the folders {candidates}. Declare the "
        "data set in DATASETS.CUSTOM, with IMAGES"
    )
