"""Detections as a COCO file, written while they come."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

import torch
from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from ..checkpoint import replacing
from .onnx_predictor import Detections

_Place = tuple[str | int, Path, int]  # an image, and the file and the byte where its line starts


class ResultFile:
    """A line of ``results.0.jsonl`` for each image; :meth:`merge` makes one COCO file of them.

    Each of several processes has a file. A line is there as soon as it is written, also after a
    kill.
    """

    def __init__(self, folder: Path, metadata: Metadata, goes_on: bool):
        """
        Args:
            folder: is there.
            metadata: of the classes: ``thing_classes``, and the category ids of the data set in
                ``thing_dataset_id_to_contiguous_id``; without them categories count from 1.
            goes_on: keep the lines of an earlier run. ``done`` then has its images.

        Raises:
            ValueError: for the lines of an earlier run if ``goes_on`` is not set, and for another
                file of this name. A file without lines is no matter: nothing was detected.
        """
        self.folder, self.lines = folder, folder / f"results.{comm.get_rank()}.jsonl"
        numbers = metadata.get("thing_dataset_id_to_contiguous_id", {})
        names = metadata.get("thing_classes", ())
        self._category_ids = {number: category for category, number in numbers.items()}
        self.categories = [
            {"id": self._category_id(i), "name": name} for i, name in enumerate(names)
        ]
        earlier = [file for file in self._files() if file.stat().st_size]
        if earlier and not goes_on:
            raise ValueError(
                f"{earlier[0]} is of a prediction that was not finished: add --resume to go on "
                "with it, or remove it"
            )
        self.done = {image["name"] for *_, image in self._images()}
        comm.synchronize()  # all have seen the lines of the earlier run
        if self.lines.is_file():
            self._drop_incomplete_line()
        self._file: TextIO = self.lines.open("a", buffering=1)

    def write(self, name: str | int, instances: Instances) -> None:
        """Add the detections of an image by the path of its file, or by a frame's number."""
        height, width = instances.image_size
        found = instances_to_coco_json(instances, 0)
        line = {
            "name": name,
            "width": width,
            "height": height,
            "boxes": [x["bbox"] for x in found],
            "scores": [x["score"] for x in found],
            "categories": [self._category_id(x["category_id"]) for x in found],
        }
        if instances.has("pred_masks"):
            line["segmentations"] = [x["segmentation"] for x in found]
        self._file.write(json.dumps(line) + "\n")

    def merge(self, ids: dict[str, int] | None = None, order: Sequence[str] = ()) -> Path:
        """Write ``results.json`` of the lines of all processes, and remove them; returns its path.

        Args:
            ids: of the images in a data set of one's own: then the file is a list of results, as
                COCO's evaluation reads it. Without them it is a whole data set: images, with paths
                below the folder that has them all, categories, and annotations with a ``score``.
            order: of the images.
        """
        self._file.close()
        target, places = self.folder / "results.json", {name: i for i, name in enumerate(order)}
        found = [(image["name"], file, start) for file, start, image in self._images()]
        found.sort(key=lambda x: places.get(x[0], 0))  # a frame of a video has its place
        with replacing(str(target), "w") as file:
            if ids is None:
                self._write_data_set(file, found)
            else:
                results = (r for image in _read(found) for r in _results(image, ids))
                _write_list(file, results)
        for file in self._files():
            file.unlink()
        return target

    def close(self) -> None:
        self._file.close()

    def _category_id(self, number: int) -> int:
        return self._category_ids.get(number, number + 1)

    def _write_data_set(self, file: TextIO, found: Sequence[_Place]) -> None:
        names = [name for name, *_ in found]
        ids, files = image_ids(names), dict.fromkeys(names, "")
        if names and isinstance(names[0], str):
            root = common_folder(names)
            files = {name: os.path.relpath(os.path.abspath(name), root) for name in names}

        def images() -> Iterator[dict]:
            for image in _read(found):
                name, size = image["name"], {key: image[key] for key in ("width", "height")}
                yield {"id": ids[name], "file_name": files[name] or f"frame {name}"} | size

        def annotations() -> Iterator[dict]:
            number = 0
            for image in _read(found):
                for result in _results(image, ids):
                    number += 1
                    _, _, width, height = result["bbox"]
                    yield result | {"id": number, "area": width * height, "iscrowd": 0}

        file.write('{"images": ')
        _write_list(file, images())
        file.write(f', "categories": {json.dumps(self.categories)}, "annotations": ')
        _write_list(file, annotations())
        file.write("}")

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("results.*.jsonl"))

    def _images(self) -> Iterator[tuple[Path, int, dict]]:
        """The complete lines of all processes: the file, where in it, and what it says."""
        for file in self._files():
            start = 0
            with file.open("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):  # else a kill has cut it
                        yield file, start, _parsed(file, line)
                    start += len(line)

    def _drop_incomplete_line(self) -> None:
        with self.lines.open("rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def to_instances(found: Detections) -> Instances:
    """What an exported file found, as Detectron2 has it."""
    return Instances(
        found.image_size,
        pred_boxes=Boxes(torch.from_numpy(found.pred_boxes)),
        scores=torch.from_numpy(found.scores),
        pred_classes=torch.from_numpy(found.pred_classes),
    )


def _parsed(file: Path, line: bytes) -> dict:
    with suppress(ValueError):
        image = json.loads(line)
        if isinstance(image, dict) and "name" in image:
            return image
    raise ValueError(f"{file} is not of an earlier prediction: remove it")


def _read(places: Sequence[_Place]) -> Iterator[dict]:
    """What the lines say, one after the other."""
    with ExitStack() as stack:
        files = {file: stack.enter_context(file.open("rb")) for file in {f for _, f, _ in places}}
        for _, file, start in places:
            files[file].seek(start)
            yield _parsed(file, files[file].readline())


def common_folder(files: Sequence[str]) -> str:
    """The full path of the folder that all files are in, or below."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])


def image_ids(names: Sequence[str | int]) -> dict[str | int, int]:
    """An id for each image: a frame's number, that in a file's name as in COCO's, or 1, 2, ..."""
    stems = [str(name) if isinstance(name, int) else Path(name).stem for name in names]
    if all(stem.isdecimal() for stem in stems) and len(set(map(int, stems))) == len(names):
        return dict(zip(names, map(int, stems), strict=True))
    return {name: i for i, name in enumerate(names, 1)}


def ids_of_annotations(file: str, names: Sequence[str]) -> dict[str, int]:
    """The id of each image in a COCO annotation file, by the end of its path.

    Raises:
        OSError: for a missing file.
        ValueError: for another file, and for images that are not in it, or that several match.
    """
    try:
        with open(file, encoding="utf-8") as f:
            images = json.load(f)["images"]
        known = [(tuple(Path(x["file_name"]).parts), int(x["id"])) for x in images]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a COCO annotation file: {error!r}") from error
    of_base: dict[str, list[tuple[tuple[str, ...], int]]] = {}
    for parts, number in known:
        of_base.setdefault(parts[-1], []).append((parts, number))
    found, problems = {}, []
    for name in names:
        parts = Path(name).parts
        matches = [
            number for theirs, number in of_base.get(parts[-1], ())
            if parts[-len(theirs):] == theirs or len(of_base[parts[-1]]) == 1
        ]  # fmt: skip
        if len(matches) == 1:
            found[name] = matches[0]
        else:
            problems.append(f"{name} ({len(matches)} images have this name)")
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(names)} images are not known by {file}: "
            + ", ".join(problems[:3])
        )
    return found


def _results(image: dict, ids: dict) -> Iterator[dict]:
    """COCO's results of one line."""
    keys = {"bbox": "boxes", "score": "scores", "category_id": "categories"}
    keys |= {"segmentation": "segmentations"} if "segmentations" in image else {}
    for values in zip(*(image[key] for key in keys.values()), strict=True):
        yield {"image_id": ids[image["name"]]} | dict(zip(keys, values, strict=True))


def _write_list(file: TextIO, items: Iterator[dict]) -> None:
    file.write("[")
    for i, item in enumerate(items):
        file.write((",\n" if i else "") + json.dumps(item))
    file.write("]")
