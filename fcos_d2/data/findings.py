"""What can be wrong with a data set, and how bad each kind is."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Kind:
    """A kind of finding."""

    # "error": training refuses or drops it, or learns what is wrong. "warning": it may be meant.
    # "note": nothing is wrong.
    severity: str
    # What a cleaned copy leaves out, "annotation" or "image"; or "clip": it clips the box.
    repair: str = ""


KINDS = {
    # Found while reading. Such entries are in no cleaned copy.
    "broken entry": Kind("error"),
    "id twice": Kind("error"),
    "annotation id twice": Kind("warning"),  # numbered anew
    "unknown category": Kind("error"),
    # Boxes
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
    "rare class": Kind("note"),
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
    """Something to say about one place of a data set."""

    kind: str  # a key of KINDS
    file: str  # of the annotations, or of the image
    text: str  # the details
    image: int | str | None = None  # its id
    annotation: int | str | None = None  # its id; in VOC and YOLO files "object 2" or "line 2"
    index: int | None = None  # of the annotation in RawData

    @property
    def severity(self) -> str:
        return KINDS[self.kind].severity

    def to_dict(self) -> dict:
        """Ready for JSON."""
        return {"severity": self.severity} | {k: v for k, v in vars(self).items() if k != "index"}


def unsound(findings: Iterable[Finding]) -> set[int]:
    """The indices of the annotations that a cleaned copy leaves out."""
    return {f.index for f in findings if KINDS[f.kind].repair == "annotation"}


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
    if not rows:
        return "no finding"
    header, alignment = ("", "finding", "count", "where"), ("left", "left", "right", "left")
    return tabulate(rows, header, colalign=alignment, disable_numparse=True)
