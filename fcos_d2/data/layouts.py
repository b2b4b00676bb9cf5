"""Recognises the layout of a data set from its folder, or from one of its files."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import escape, glob

from detectron2.config import CfgNode

from .classes import num_classes_key
from .coco import read_coco
from .custom import is_in_part, read_entry
from .data_yaml import class_lists, data_yamls, is_class_list, read_data_yaml
from .image_files import IMAGE_SUFFIXES
from .raw_data import RawData
from .voc import files_of_split, find_image_files, names_of_objects, xml_files

SPLITS = ("train", "trainval", "val", "test")
# Fewer images are not held out: their AP would be chance, and the training would lack them.
_LEAST_HELD_OUT = 3
# Files that COCO's own data set has beside those of boxes, and Label Studio beside YOLO's.
_NO_BOXES = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_", "notes.json")


@dataclass(frozen=True)
class Layout:
    """A data set that was recognised."""

    format: str  # "coco", "voc", "yolo" or "xml"
    entries: dict[str, dict]  # of DATASETS.CUSTOM, by split; where none is named, "all"
    read: dict[str, RawData] = field(default_factory=dict)  # the content of COCO files, by split
    left_out: str = ""  # what is not taken, as a sentence

    def __str__(self) -> str:
        text = f"the {self.format.upper()} layout, with {', '.join(self.entries)}"
        return f"{text} ({self.left_out})" if self.left_out else text


def recognise(path: str) -> Layout:
    """The layout of a folder, of a COCO annotation file, or of YOLO's file of classes.

    It is an OSError if the path is not there, a ValueError for no known layout or for several.
    """
    path = os.path.abspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no file or folder {path}")
    if os.path.isfile(path):
        if path.lower().endswith((".yaml", ".yml")) or is_class_list(path):
            return _yolo(path)
        if path.lower().endswith(".json"):
            return _coco({_split_of(path) or "all": path})
        raise ValueError(f"{path} is neither a folder, nor a .json file, nor a .yaml file")
    layouts = [*map(_yolo, data_yamls(path)), _voc(path), _coco(_coco_files(path))]
    found = [layout for layout in layouts if layout.entries]
    if not found:
        found = [layout for layout in [_xml(path)] if layout.entries]
    if not found:
        found = [layout for layout in map(_yolo, class_lists(path)) if layout.entries]
    if len(found) > 1:
        several = ", ".join(layout.format for layout in found)
        raise ValueError(
            f"{path} has several layouts: {several}. Name the file, or declare the sets in "
            "DATASETS.CUSTOM"
        )
    if not found:
        raise ValueError(_unknown_layout(path))
    return found[0]


def use_data(
    cfg: CfgNode, path: str, changed: Sequence[str] = ()
) -> tuple[str, dict[str, RawData]]:
    """Train and test a config on a data set that is recognised by its path, in place of its own.

    The model's NUM_CLASSES becomes that of the data. It and DATASETS.TEST stay as they are if they
    are among the keys ``changed``, which the command line sets.

    Returns:
        what was found and taken, as a sentence; and by the name of the data set what has been read
        of it, for :func:`register_custom_datasets`.

    Raises:
        OSError, ValueError: see :func:`recognise`; for a data set with no split to train on, and
            for a changed DATASETS.TRAIN.
    """
    if "DATASETS.TRAIN" in changed:
        raise ValueError(
            f"--data {path} and DATASETS.TRAIN both say what to train on: give one of them. To "
            "train on several data sets, declare them in DATASETS.CUSTOM"
        )
    layout = recognise(path)
    train = next((s for s in ("train", "trainval", "all") if s in layout.entries), None)
    if train is None:
        raise ValueError(f"{path} has nothing to train on, but {list(layout.entries)}")
    held_out = {"train": ("val", "test"), "trainval": ("test",), "all": ()}[train]
    test = next((s for s in held_out if s in layout.entries), None)
    sets, read = {"train": layout.entries[train]}, {"train": layout.read.get(train)}
    if test is not None:
        sets["test"], read["test"], tested = layout.entries[test], layout.read.get(test), test
    elif "DATASETS.TEST" not in changed or "data_test" in cfg.DATASETS.TEST:
        whole = read["train"] or read_entry("data_train", sets["train"])
        read = dict.fromkeys(("train", "test"), whole)
        sets, tested = _hold_out(sets["train"], whole)
    for part, entry in sets.items():
        cfg.DATASETS.CUSTOM[f"data_{part}"] = CfgNode(entry, new_allowed=True)
    cfg.DATASETS.TRAIN = ("data_train",)
    if "DATASETS.TEST" in changed:
        tested = f"DATASETS.TEST, which is set: {tuple(cfg.DATASETS.TEST)}"
    else:
        cfg.DATASETS.TEST = ("data_test",) if "test" in sets else ()
    classes, key = layout.entries[train]["CLASSES"], num_classes_key(cfg)
    if key not in (None, *changed):
        cfg.merge_from_list([key, len(classes)])
    said = (
        f"{path} has {layout}, and {len(classes)} classes: {', '.join(classes[:20])}"
        f"{', ...' * (len(classes) > 20)}. Trained on {train}, tested on {tested}"
    )
    return said, {f"data_{part}": read[part] for part in sets if read[part] is not None}


def _hold_out(entry: dict, whole: RawData) -> tuple[dict[str, dict], str]:
    """The entries of a data set that has nothing to test on, and what it is tested on, as text."""
    number = sum(is_in_part(image["file_name"], "test") for image in whole.images)
    of_all = f"{number} of {len(whole.images)} images"
    if number < _LEAST_HELD_OUT:
        return {"train": entry}, (
            f"nothing: held out would be {of_all}, too few. There is no evaluation. Make a split "
            "val, or add images"
        )
    sets = {part: entry | {"PART": part} for part in ("train", "test")}
    return sets, f"a tenth of it, {of_all}, which is held out, chosen by the names of the images"


def _yolo(file: str) -> Layout:
    described = read_data_yaml(file)
    common = {"FORMAT": "yolo", "DATA": file, "CLASSES": described.classes}
    return Layout("yolo", {split: common | {"SPLIT": split} for split in described.splits})


def _voc(folder: str) -> Layout:
    for root in (folder, *sorted(glob(os.path.join(escape(folder), "*")))):
        lists = os.path.join(root, "ImageSets", "Main")
        if os.path.isdir(os.path.join(root, "Annotations")) and os.path.isdir(lists):
            splits = [s for s in SPLITS if os.path.isfile(os.path.join(lists, f"{s}.txt"))]
            classes = names_of_objects(f for split in splits for f in files_of_split(root, split))
            common = {"FORMAT": "voc", "ROOT": root, "CLASSES": classes}
            return Layout("voc", {split: common | {"SPLIT": split} for split in splits})
    return Layout("voc", {})


def _xml(path: str) -> Layout:
    """VOC's files without VOC's folders: beside their images, or in a folder of their own."""
    images, annotated = {}, {}
    for folder, _, names in sorted(os.walk(path)):
        if any(name.lower().endswith(".xml") for name in names):
            annotated[folder] = xml_files(folder)
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
            images[folder] = set(find_image_files(folder))
    entries, left_out = {}, 0
    for folder, files in annotated.items():
        stems = {os.path.splitext(os.path.basename(file))[0] for file in files}
        # Those beside them, or those that have most of their names.
        of_images = max(images, key=lambda f: (len(images[f] & stems), f == folder), default=None)
        if of_images is None or not images[of_images] & stems:
            continue
        left_out += len(images[of_images] - stems)
        split = _split_of(os.path.relpath(folder, path).replace(os.sep, "-")) or "all"
        if split in entries:
            raise ValueError(
                f"{path} has several folders of .xml files for the split {split!r}: "
                f"{entries[split]['XML']} and {folder}. Name one of the folders"
            )
        entries[split] = {"FORMAT": "xml", "XML": folder, "IMAGES": of_images}
    classes = names_of_objects(f for entry in entries.values() for f in annotated[entry["XML"]])
    entries = {split: entry | {"CLASSES": classes} for split, entry in entries.items()}
    text = f"{left_out} images without an .xml file are left out" if left_out else ""
    return Layout("xml", entries, left_out=text)


def _unknown_layout(path: str) -> str:
    """What a folder has, and how it can get a layout."""
    names = (name for _, _, names in os.walk(path) for name in names)
    kinds = Counter(os.path.splitext(name)[1].lower() or "other" for name in names)
    seen = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5))
    return f"""{path} has no known layout. Its files: {seen or "none"}. Known are
    COCO: a .json file for each split, in the folder or in its folder 'annotations'
    YOLO: a .yaml file with the names of the classes, or classes.txt with one in each line, and
        folders images and labels, or labels beside the images
    VOC: folders Annotations, ImageSets/Main and JPEGImages
    XML: files in VOC's format beside the images, or in a folder of their own
One of these makes it known:
    mv BOXES.json {path}/train.json
    echo 'names: [FIRST_CLASS, SECOND_CLASS]' > {path}/data.yaml
    mv BOXES/*.xml {path}/IMAGES
Or declare the data sets in DATASETS.CUSTOM"""


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
