"""A data set as its reader finds it on disk, with what is wrong in it."""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from detectron2.structures import BoxMode

from .findings import Finding, unsound

_NAMED = 10  # boxes of a kind that a warning names
_DROPPED = {"annotation without image": "of images that the file does not list"}


class UnknownCategory(ValueError):
    """An annotation has a category that the data set does not list."""


@dataclass
class RawData:
    """A data set as it is on disk, faults and all.

    Readers note what they cannot read, and go on. The checks report it; training raises the first
    of these errors, see :meth:`dropped`.

    Attributes:
        name: of the data set or the split.
        image_root: the folder that the "file_name" of the images is relative to.
        categories: with unique "id", and "name", as in COCO.
        images: with unique "id", "file_name", "height" and "width", as in COCO.
        annotations: as in COCO, with a "bbox" of four numbers, [x, y, width, height] in pixels.
        places: of each annotation, its file and what findings call it.
        findings: about what is in no list, because it cannot be read.
        source: the file or split that it was read from.
        label: what the warning of training calls the box of a finding.
        error: of the first entry that cannot be read.
    """

    name: str
    image_root: str
    categories: list[dict] = field(default_factory=list)
    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)
    places: list[tuple[str, int | str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    source: str = ""
    label: Callable[[Finding], str] = lambda f: f"{f.file}, {f.annotation}"
    error: Exception | None = None

    @property
    def classes(self) -> list[str]:
        """The names of the categories, in the order of the class numbers."""
        return [category["name"] for category in self._ordered_categories()]

    def add_image(self, number: int | str, file_name: str, size: tuple[int, int]) -> None:
        """Add an image by its id, its file and its (height, width)."""
        height, width = size
        self.images.append({"id": number, "file_name": file_name, "height": height, "width": width})

    def add(self, annotation: dict, file: str, place: int | str) -> None:
        """Add an annotation with its place."""
        self.annotations.append(annotation)
        self.places.append((file, place))

    def refuse(self, error: Exception, kind: str = "broken entry", **where) -> None:
        """Note the error that training raises about an entry, and a finding with its text.

        Args:
            where: the other attributes of :class:`Finding`, at least "file".
        """
        self.error = self.error or error
        kind = "unknown category" if isinstance(error, UnknownCategory) else kind
        text = str(error).removeprefix(where["file"]).lstrip(":, ")
        self.findings.append(Finding(kind, text=text[:500], **where))

    @contextmanager
    def refusing(self, kind: str = "broken entry", **where) -> Iterator[None]:
        """Leave the block at an OSError or a ValueError, and note it, see :meth:`refuse`."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.refuse(error, kind, **where)

    def finding(self, kind: str, index: int, text: str) -> Finding:
        """A finding about annotation number ``index``."""
        file, place = self.places[index]
        return Finding(kind, file, text, self.annotations[index]["image_id"], place, index)

    def unlearnable(self) -> list[Finding]:
        """About annotations of images that are not listed, and boxes that cannot be learnt."""
        images = {image["id"]: image for image in self.images}
        findings = []
        for i, annotation in enumerate(self.annotations):
            bbox, image = annotation["bbox"], images.get(annotation["image_id"])
            if image is None:
                text = f"image {annotation['image_id']!r} is not listed"
                findings.append(self.finding("annotation without image", i, text))
            elif (fault := _fault_of_box(bbox)) is not None:
                findings.append(self.finding(fault, i, box_text(bbox, image)))
        return findings

    def dropped(self) -> list[Finding]:
        """What training drops, after one warning that names it.

        Raises:
            OSError, ValueError: about the first entry that cannot be read, with its file.
        """
        if self.error is not None:
            raise self.error
        findings = self.unlearnable()
        labels = defaultdict(list)
        for finding in findings:
            labels[finding.kind].append(self.label(finding))
        parts = [
            f"{len(names)} {_DROPPED.get(kind, f'with {kind}')} "
            f"({'; '.join(names[:_NAMED])}{'; ...' if len(names) > _NAMED else ''})"
            for kind, names in labels.items()
        ]
        if parts:
            logging.getLogger(__name__).warning(
                f"{self.source}: dropped {len(findings)} box(es) without area or with another "
                f"fault: {', '.join(parts)}"
            )
        return findings

    def records(self, left_out: Container[int]) -> tuple[list[dict], list[list[int]]]:
        """In Detectron2's format, without the annotations of some indices.

        Categories that are not listed keep their ids.

        Returns:
            the records, with boxes as [x, y, width, height]; and for each, the indices of its
            annotations.
        """
        classes = {c["id"]: i for i, c in enumerate(self._ordered_categories())}

        def box(annotation: dict) -> dict:
            category = annotation["category_id"]
            return {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": classes.get(category, category),
            } | {k: annotation[k] for k in ("iscrowd", "segmentation") if k in annotation}

        indices: dict = {image["id"]: [] for image in self.images}
        for i, annotation in enumerate(self.annotations):
            if i not in left_out:
                indices[annotation["image_id"]].append(i)
        records = [
            {
                "file_name": os.path.join(self.image_root, image["file_name"]),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "annotations": [box(self.annotations[i]) for i in indices[image["id"]]],
            }
            for image in self.images
        ]
        return records, list(indices.values())

    def training_records(self) -> list[dict]:
        """The records to train on, with boxes as [x0, y0, x1, y1]. See :meth:`dropped`."""
        records, _ = self.records(unsound(self.dropped()))
        for box in (box for record in records for box in record["annotations"]):
            x, y, width, height = box["bbox"]
            box |= {"bbox": [x, y, x + width, y + height], "bbox_mode": BoxMode.XYXY_ABS}
        return records

    def _ordered_categories(self) -> list[dict]:
        return sorted(self.categories, key=lambda c: (isinstance(c["id"], str), c["id"]))


def box_text(bbox: Sequence[float], image: dict) -> str:
    """A box in a finding."""
    box = f"[{', '.join(f'{x:g}' for x in bbox)}]"
    return f"{box} in an image of {image['width']} x {image['height']}"


def _fault_of_box(bbox: Sequence[float]) -> str | None:
    """Why a box [x, y, width, height] cannot be learnt, or None."""
    _, _, width, height = bbox
    if not all(map(math.isfinite, bbox)):
        return "NaN or infinity in the box"
    if width < 0 or height < 0:
        return "a negative width or height"
    return "a box without area" if width == 0 or height == 0 else None
