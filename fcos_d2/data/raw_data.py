"""A data set as its reader finds it on disk, with what is wrong in it."""

import gc
import logging
import os
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from detectron2.structures import BoxMode

from .findings import Finding, unsound

# Kinds of findings about boxes. Training drops those with one of the first four.
_FAULTS = (
    "annotation without image",
    "NaN or infinity in the box",
    "a negative width or height",
    "a box without area",
    "box outside of the image",
    "box larger than the image",
    "box beyond the edge",
)
UNLEARNABLE = _FAULTS[:4]
# Pixels by which a box may reach beyond the image: corners are rounded in many ways.
_TOLERANCE = 1.0
_NAMED = 10  # boxes of a kind that a warning names
_DROPPED = {"annotation without image": "of images that the file does not list"}
# What records take from annotations besides the box and the category.
_MORE_KEYS = ("iscrowd", "keypoints", "segmentation")


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """No search for cycles in the block, which makes millions of objects that stay.

    It would take more than half of the time of reading COCO's annotations, and find nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class UnknownCategory(ValueError):
    """An annotation has a category that the data set does not list."""


@dataclass
class RawData:
    """A data set as it is on disk, with its faults.

    A reader notes what it cannot read, and goes on: the checks report that, training raises the
    first error. Categories, images and annotations are as in COCO; the keys named here are there.
    """

    name: str  # of the data set or the split
    image_root: str  # the folder that the "file_name" of the images is relative to
    categories: list[dict] = field(default_factory=list)  # "id" and "name", by class number
    images: list[dict] = field(default_factory=list)  # "id", "file_name", "height" and "width"
    # "image_id", "category_id" and "bbox", four numbers: [x, y, width, height] in pixels.
    annotations: list[dict] = field(default_factory=list)
    # The file of each annotation, and what findings call the annotation.
    places: list[tuple[str, int | str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)  # about what cannot be read
    source: str = ""  # the file or split that it was read from
    # What the warning of training calls the box of a finding.
    label: Callable[[Finding], str] = lambda f: f"{f.file}, {f.annotation}"
    error: Exception | None = None  # of the first entry that cannot be read

    @property
    def classes(self) -> list[str]:
        """The names of the categories."""
        return [category["name"] for category in self.categories]

    def add_image(self, number: int | str, file_name: str, size: tuple[int, int]) -> None:
        """Add an image by its id, its file and its (height, width)."""
        height, width = size
        self.images.append({"id": number, "file_name": file_name, "height": height, "width": width})

    def add(self, annotation: dict, file: str, place: int | str) -> None:
        """Add an annotation with its place."""
        self.annotations.append(annotation)
        self.places.append((file, place))

    def refuse(self, error: Exception, kind: str = "broken entry", **where) -> None:
        """Note an error, and a finding with its text. ``where`` are attributes of the finding."""
        self.error = self.error or error
        kind = "unknown category" if isinstance(error, UnknownCategory) else kind
        text = str(error).removeprefix(where["file"]).lstrip(":, ")
        self.findings.append(Finding(kind, text=text[:500], **where))

    @contextmanager
    def refusing(self, kind: str = "broken entry", **where) -> Iterator[None]:
        """An OSError or a ValueError ends the block, and is noted as in :meth:`refuse`."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.refuse(error, kind, **where)

    def finding(self, kind: str, index: int, text: str) -> Finding:
        """A finding about annotation number ``index``."""
        file, place = self.places[index]
        return Finding(kind, file, text, self.annotations[index]["image_id"], place, index)

    def box_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) the number of the image of each annotation, -1 for none, and (N, 4) its bbox."""
        numbers = {image["id"]: i for i, image in enumerate(self.images)}
        images = (numbers.get(a["image_id"], -1) for a in self.annotations)
        boxes = chain.from_iterable(a["bbox"] for a in self.annotations)
        return np.fromiter(images, np.int64), np.fromiter(boxes, np.float64).reshape(-1, 4)

    def faulty_boxes(self) -> list[Finding]:
        """About boxes that cannot be learnt, or are not where their image is."""
        images, boxes = self.box_arrays()
        sizes = [*((image["width"], image["height"]) for image in self.images), (np.nan, np.nan)]
        (x, y, width, height), (right, bottom) = boxes.T, np.array(sizes, np.float64)[images].T
        with np.errstate(invalid="ignore", over="ignore"):
            is_faulty = (
                images < 0,
                ~np.isfinite(boxes).all(axis=1),
                (width < 0) | (height < 0),
                (width == 0) | (height == 0),
                (x >= right) | (y >= bottom) | (x + width <= 0) | (y + height <= 0),
                (width > right + _TOLERANCE) | (height > bottom + _TOLERANCE),
                np.maximum.reduce([-x, -y, x + width - right, y + height - bottom]) > _TOLERANCE,
            )
        first, findings = np.select(is_faulty, range(len(_FAULTS)), -1), []
        for i in np.flatnonzero(first >= 0).tolist():
            text = f"image {self.annotations[i]['image_id']!r} is not listed"
            if images[i] >= 0:
                box = f"[{', '.join(f'{x:g}' for x in self.annotations[i]['bbox'])}]"
                image = self.images[images[i]]
                text = f"{box} in an image of {image['width']} x {image['height']}"
            findings.append(self.finding(_FAULTS[first[i]], i, text))
        return findings

    def dropped(self) -> list[Finding]:
        """What training drops, after a warning about it. Raises the first error of the reader."""
        if self.error is not None:
            raise self.error
        findings = [f for f in self.faulty_boxes() if f.kind in UNLEARNABLE]
        parts = []
        for kind in dict.fromkeys(f.kind for f in findings):
            names = [self.label(f) for f in findings if f.kind == kind]
            named = "; ".join(names[:_NAMED]) + "; ..." * (len(names) > _NAMED)
            parts.append(f"{len(names)} {_DROPPED.get(kind, f'with {kind}')} ({named})")
        if parts:
            logging.getLogger(__name__).warning(
                f"{self.source}: dropped {len(findings)} box(es) without area or with another "
                f"fault: {', '.join(parts)}"
            )
        return findings

    def indices(self, left_out: Container[int]) -> list[list[int]]:
        """For each image the indices of its annotations, without those that are left out."""
        of_image: dict = {image["id"]: [] for image in self.images}
        for i, annotation in enumerate(self.annotations):
            if i not in left_out:
                of_image[annotation["image_id"]].append(i)
        return list(of_image.values())

    def records(self, left_out: Container[int]) -> list[dict]:
        """In Detectron2's format, without the annotations of some indices.

        Boxes are [x, y, width, height]. Categories that are not listed keep their ids.
        """
        classes = {category["id"]: i for i, category in enumerate(self.categories)}

        def box(annotation: dict) -> dict:
            category = annotation["category_id"]
            return {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": classes.get(category, category),
            } | {key: annotation[key] for key in _MORE_KEYS if key in annotation}

        return [
            {
                "file_name": os.path.join(self.image_root, image["file_name"]),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "annotations": [box(self.annotations[i]) for i in indices],
            }
            for image, indices in zip(self.images, self.indices(left_out), strict=True)
        ]

    def training_records(self) -> list[dict]:
        """The records to train on, with boxes as [x0, y0, x1, y1]. See :meth:`dropped`."""
        records = self.records(unsound(self.dropped()))
        for box in (box for record in records for box in record["annotations"]):
            x, y, width, height = box["bbox"]
            box |= {"bbox": [x, y, x + width, y + height], "bbox_mode": BoxMode.XYXY_ABS}
        return records
