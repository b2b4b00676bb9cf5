"""A data set as its reader finds it on disk, with what is wrong in it."""

import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass, field

from detectron2.structures import BoxMode
from tabulate import tabulate

_NAMED = 10  # boxes of a kind that a warning names
_DROPPED = {"annotation without image": "of images that the file does not list"}

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        severity: "error": training refuses or drops it, or learns what is wrong. "warning": it may
            be meant. "note": nothing is wrong.
        repair: what a cleaned copy does about it: leaves out the "annotation" or the "image", or
            "clip"s the box; "" for nothing.
    """

    severity: str
    repair: str = ""


KINDS = {
    # Found while reading. Such entries are in no cleaned copy.
    "broken entry": Kind("error"),
    "id twice": Kind("error"),
    "annotation id twice": Kind("warning"),  # numbered anew
    # Boxes
    "unknown category": Kind("error", "annotation"),
    "annotation without image": Kind("error", "annotation"),
    "NaN or infinity in the box": Kind("error", "annotation"),
    "a negative width or height": Kind("error", "annotation"),
    "a box without area": Kind("error", "annotation"),
    "box outside of the image": Kind("error", "annotation"),
    "box larger than the image": Kind("error", "annotation"),
    "box beyond the edge": Kind("warning", "clip"),
    "box twice": Kind("warning", "annotation"),
    "box twice, of two classes": Kind("warning"),
    "box nearly twice": Kind("warning"),
    "box owns no location": Kind("warning"),
    "crowd": Kind("note"),
    # Classes
    "class without boxes": Kind("warning"),
    "other classes than the first set": Kind("error"),
    # Images
    "no image": Kind("error", "image"),
    "unreadable image": Kind("error", "image"),
    "truncated image": Kind("error", "image"),
    "more than 8 bits": Kind("error", "image"),
    "other size than annotated": Kind("error", "image"),
    "TIFF turned by EXIF": Kind("error", "image"),
    "turned by EXIF": Kind("warning"),
    "image twice": Kind("warning"),
    "image in two sets": Kind("error"),
    "image without boxes": Kind("note"),
}


@dataclass(frozen=True)
class Finding:
    """Something about one place of a data set.

    Attributes:
        kind: a key of :data:`KINDS`.
        file: where it is: of the annotations, or of the image.
        text: the details.
        image: the image's id.
        annotation: the annotation's id in a COCO file; in other formats "object 2" or "line 2".
        index: of the annotation in :class:`RawData`.
    """

    kind: str
    file: str
    text: str
    image: int | str | None = None
    annotation: int | str | None = None
    index: int | None = None

    @property
    def severity(self) -> str:
        return KINDS[self.kind].severity

    def to_dict(self) -> dict:
        """Ready for JSON."""
        fields = asdict(self)
        del fields["index"]
        return {"severity": self.severity} | fields


@dataclass
class RawData:
    """A data set as it is on disk, faults and all.

    The checks report what is wrong with it. Training is strict, see :meth:`dropped`.

    Attributes:
        name: of the data set or the split.
        image_root: the folder that the "file_name" of the images is relative to.
        categories: with unique "id", and "name", as in COCO.
        images: with unique "id", "file_name", "height" and "width", as in COCO.
        annotations: as in COCO, with a "bbox" of four numbers, [x, y, width, height] in pixels.
        places: of each annotation, its file and what findings call it.
        findings: what was found while reading, above all about entries that are in no list.
        source: the file or split that it was read from.
        label: what training calls the box of a finding that it drops.
        error: what training raises, about the first entry that it refuses.
    """

    name: str
    image_root: str
    categories: list[dict] = field(default_factory=list)
    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)
    places: list[tuple[str, int | str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    source: str = ""
    label: Callable[[Finding], str] = lambda finding: f"{finding.file}, {finding.annotation}"
    error: Exception | None = None

    @property
    def classes(self) -> list[str]:
        """The names of the categories, in the order of the class numbers."""
        return [category["name"] for category in self._ordered_categories()]

    def add(self, annotation: dict, file: str, place: int | str) -> int:
        """Add an annotation, and return its number."""
        self.annotations.append(annotation)
        self.places.append((file, place))
        return len(self.places) - 1

    def refuse(
        self,
        error: Exception,
        file: str,
        image: int | str | None = None,
        annotation: int | str | None = None,
        kind: str = "broken entry",
        index: int | None = None,
    ) -> None:
        """Note the error that training raises about an entry, and the finding of the checks."""
        self.error = self.error or error
        text = str(error).removeprefix(file).lstrip(":, ")
        self.findings.append(Finding(kind, file, text[:500], image, annotation, index))

    def finding(self, kind: str, index: int, text: str) -> Finding:
        """About annotation number ``index``."""
        file, place = self.places[index]
        return Finding(kind, file, text, self.annotations[index]["image_id"], place, index)

    def unlearnable(self) -> list[Finding]:
        """About annotations of images that are not listed, and boxes that cannot be learnt."""
        images = {image["id"]: image for image in self.images}
        known = unsound(self.findings)
        findings = []
        for i, annotation in enumerate(self.annotations):
            if i in known:
                continue
            bbox, image = annotation["bbox"], images.get(annotation["image_id"])
            if image is None:
                text = f"image {annotation['image_id']!r} is not listed"
                findings.append(self.finding("annotation without image", i, text))
            elif (fault := _fault_of_box(bbox)) is not None:
                findings.append(self.finding(fault, i, box_text(bbox, image)))
        return findings

    def dropped(self) -> list[Finding]:
        """The strict use: what training drops, after one warning that names it.

        Raises:
            OSError, ValueError: about the first entry that training refuses, with its file.
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
        """In Detectron2's format, without the annotations of some numbers.

        Categories that are not listed keep their ids.

        Returns:
            the records, with boxes as [x, y, width, height]; and of each one, the numbers that its
            annotations have here.
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
        """The records to train on, with boxes by their corners. See :meth:`dropped`."""
        records, _ = self.records(unsound(self.dropped()))
        for box in (box for record in records for box in record["annotations"]):
            x, y, width, height = box["bbox"]
            box |= {"bbox": [x, y, x + width, y + height], "bbox_mode": BoxMode.XYXY_ABS}
        return records

    def _ordered_categories(self) -> list[dict]:
        return sorted(self.categories, key=lambda c: (isinstance(c["id"], str), c["id"]))


def unsound(findings: Iterable[Finding]) -> set[int]:
    """The numbers of the annotations that a cleaned copy leaves out."""
    return {f.index for f in findings if KINDS[f.kind].repair == "annotation"}


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


def count(findings: Iterable[Finding]) -> dict[str, int]:
    """The number of errors, warnings and notes."""
    counts = Counter(f.severity for f in findings)
    return {severity: counts[severity] for severity in SEVERITIES}


def table(findings: Sequence[Finding], examples: int = 3) -> str:
    """The kinds of findings with their number, and the first of them, as text for a terminal."""
    rows = []
    for kind in sorted(KINDS, key=lambda k: SEVERITIES.index(KINDS[k].severity)):
        of_kind = [f for f in findings if f.kind == kind]
        for i, finding in enumerate(of_kind[:examples]):
            head = (finding.severity, kind, len(of_kind)) if i == 0 else ("", "", "")
            named = "" if finding.annotation is None else f", {finding.annotation}"
            rows.append((*head, f"{finding.file}{named}: {finding.text}"))
        if len(of_kind) > examples:
            rows.append(("", "", "", f"... and {len(of_kind) - examples} more"))
    alignment = ("left", "left", "right", "left")
    header = ("", "finding", "count", "where")
    return (
        tabulate(rows, header, colalign=alignment, disable_numparse=True) if rows else "no finding"
    )
