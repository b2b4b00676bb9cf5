"""The content of a YOLO data.yaml, and the files of images and labels that it names."""

import os
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import yaml

from .image_files import is_image_name

# A class in each line, in place of a data.yaml: of labelImg and Label Studio, and of CVAT.
_CLASS_LISTS = ("classes.txt", "obj.names")


@dataclass(frozen=True)
class YoloData:
    """The content of a data.yaml, or of a list of classes."""

    file: str
    folders: tuple[str, ...]  # where relative paths start, in turn; the last is that of the file
    classes: list[str]  # in the order of the class numbers
    # Paths of folders, of lists of images, or of images. Where a file names none, the images in a
    # folder "images" are the split "all", or those in the folder of the file if one has labels.
    splits: dict[str, list[str]]


def read_data_yaml(data: str) -> YoloData:
    """Read a data.yaml, or that of a folder, as plain data, without running code in it.

    Args:
        data: a folder, a YAML file of any name, or a list of classes (:func:`is_class_list`).

    Raises:
        OSError: for a missing file.
        ValueError: for a file that is not YAML, or has no valid classes and splits.
    """
    file = _find_data_yaml(data) if os.path.isdir(data) else data
    content = _parse(file)
    if "kpt_shape" in content:
        raise ValueError(f"{file} has kpt_shape: its labels have keypoints, which are not read")
    path = content.get("path") or ""
    if not isinstance(path, str):
        raise ValueError(f"{file}: path must be a folder, got {_short(path)}")
    # The path may be that of another machine: then the folder of the file is taken.
    own = os.path.dirname(file) or "."
    if is_class_list(file) and os.path.basename(own) == "labels":
        own = os.path.dirname(own)
    folders = [os.path.normpath(os.path.join(own, p)) for p in (_slashes(path), "")]
    folders = tuple(dict.fromkeys(f for f in folders if os.path.isdir(f)))
    named = {key: content.get(key) for key in ("train", "val", "test")}
    splits = {k: [x] if isinstance(x, str) else x for k, x in named.items() if x is not None}
    for key, paths in splits.items():
        if not isinstance(paths, list) or not all(isinstance(x, str) for x in paths):
            raise ValueError(f"{file}: {key} must be a path or a list of paths")
        splits[key] = [_slashes(x) for x in paths]
    described = YoloData(file, folders, _classes(file, content), splits)
    if not splits:
        if _find(folders, "images"):
            splits["all"] = ["images"]
        elif any(os.path.isfile(label_file(described, f)) for f in _images_below(own)):
            splits["all"] = ["."]
    return described


def image_files(data: YoloData, split: str) -> tuple[list[str], list[str]]:
    """The images of a split, each once, and a sentence for each image of a list that is not there.

    Raises:
        OSError: for a missing folder or list.
        ValueError: for a split that data.yaml does not name, and one without images.
    """
    if split not in data.splits:
        raise ValueError(f"{data.file} has no split {split!r}; it has {list(data.splits)}")
    files, missing = [], []
    for path in data.splits[split]:
        source = _find(data.folders, path)
        if source is None:
            tried = ", ".join(os.path.join(folder, path) for folder in data.folders)
            raise FileNotFoundError(f"{data.file}: {split} is not there: {tried}")
        if os.path.isdir(source):
            files += _images_below(source)
        elif source.endswith(".txt"):
            for number, line in label_lines(source):
                name = _slashes(line)
                image = _find((os.path.dirname(source), *data.folders), name)
                if image is None:
                    missing.append(f"{source}, line {number}: the image {name} is not there")
                else:
                    files.append(image)
        else:
            files.append(source)
    if not files and not missing:
        raise ValueError(f"{data.file}: the split {split!r}, {data.splits[split]}, has no images")
    return list(dict.fromkeys(files)), missing


def label_file(data: YoloData, image_file: str) -> str:
    """The file with the labels of an image: in "labels" beside "images", or beside the image."""
    top = data.folders[-1]  # a folder above it may be called "images", too
    folder, name = os.path.split(os.path.relpath(image_file, top))
    before, images, after = f"/{folder}/".rpartition("/images/")
    folder = f"{before}/labels/{after}" if images else folder
    file = os.path.join(top, folder.strip("/"), f"{os.path.splitext(name)[0]}.txt")
    return os.path.normpath(file)


def label_lines(file: str) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, numbered from 1; none if there is no such file."""
    if not os.path.lexists(file):
        return
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file: {error}") from error


def data_yamls(folder: str) -> list[str]:
    """The data.yaml of a folder; without one, all YAML files in it that have classes."""
    files = sorted(f for f in os.listdir(folder) if f.lower().endswith((".yaml", ".yml")))
    if "data.yaml" in files:
        return [os.path.join(folder, "data.yaml")]
    found = []
    for file in files:
        with suppress(OSError, ValueError):
            _parse(os.path.join(folder, file))
            found.append(os.path.join(folder, file))
    return found


def class_lists(folder: str) -> list[str]:
    """The list of classes of a folder, or of its folder "labels"; none or one."""
    files = (os.path.join(folder, sub, name) for sub in ("", "labels") for name in _CLASS_LISTS)
    return [file for file in files if os.path.isfile(file)][:1]


def is_class_list(file: str) -> bool:
    """Whether a file has a class in each line, told by its name."""
    return os.path.basename(file) in _CLASS_LISTS


def _find_data_yaml(folder: str) -> str:
    files = data_yamls(folder)
    if len(files) != 1:
        several = f"several: {files}" if files else "none"
        raise ValueError(f"{folder} must have one YAML file with 'names', but has {several}")
    return files[0]


def _parse(file: str) -> dict:
    if is_class_list(file):
        return {"names": [line.strip() for _, line in label_lines(file)]}
    try:
        with open(file, encoding="utf-8-sig") as f:
            content = yaml.safe_load(f)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a YAML file of plain data: {error}") from error
    if not isinstance(content, dict) or "names" not in content:
        raise ValueError(f"{file} is not the data.yaml of a data set: it has no 'names'")
    return content


def _classes(file: str, content: dict) -> list[str]:
    names = content["names"]
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            text = f"numbered from 0 to {len(names) - 1} without gaps, got {_short(list(names))}"
            raise ValueError(f"{file}: names must be {text}")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{file}: names must be a list of classes, or numbers with their classes")
    for i, name in enumerate(names):
        # `no` and `on` are truth values in YAML.
        if not isinstance(name, str | int) or isinstance(name, bool):
            text = f"the name of class {i}, {_short(name)}, is no text: put it in quotes"
            raise ValueError(f"{file}: {text}")
    count = content.get("nc", len(names))
    if count != len(names):
        raise ValueError(f"{file}: nc is {_short(count)}, but there are {len(names)} names")
    return [str(name) for name in names]


def _short(value: object) -> str:
    return reprlib.repr(value)[:100]  # lists in lists are huge, even from a small file


def _slashes(path: str) -> str:
    return path.strip().replace("\\", "/")  # written on Windows


def _find(folders: Sequence[str], path: str) -> str | None:
    """The first that exists; "../train" also beside data.yaml, where some exports have it."""
    paths = [path, path.removeprefix("../")]
    candidates = (os.path.join(folder, p) for folder in folders for p in paths)
    return next((os.path.normpath(c) for c in candidates if os.path.exists(c)), None)


def _images_below(folder: str) -> list[str]:
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # links that lead back
            folders.clear()
            continue
        seen.add(real)
        found += [os.path.join(parent, image) for image in filter(is_image_name, files)]
    return sorted(found)
