"""The results of :func:`analyze_assignment`, whose module defines the terms.

Shares are in [0, 1], or None if the whole is 0.
"""

from dataclasses import asdict, dataclass, replace

from tabulate import tabulate
from torch import Tensor

SIZES = ("small", "medium", "large")  # COCO's


@dataclass(frozen=True)
class LevelStatistics:
    """Positive locations on one level, and how many of them are ambiguous."""

    name: str
    stride: int
    positives: int
    ambiguous: int
    ambiguous_classes: int


@dataclass(frozen=True)
class SizeStatistics:
    """Boxes of one COCO size."""

    name: str
    boxes: int
    recalled: int  # boxes that own a location
    positives: int  # locations that the boxes own

    @property
    def recall(self) -> float | None:
        return _share(self.recalled, self.boxes)


@dataclass(frozen=True)
class BoxStatistics:
    """The locations that each of M boxes owns on each of L levels."""

    level_names: tuple[str, ...]  # finest first
    boxes: tuple[tuple[int, int], ...]  # (M) numbers of the record, and of the annotation in it
    sides: Tensor  # (M,) square roots of the boxes' areas, in pixels at the test resize
    positives: Tensor  # (M, L) int64 number of locations

    @property
    def unowned(self) -> list[tuple[int, int]]:
        """The boxes without a location."""
        missed = (self.positives.sum(dim=1) == 0).nonzero()[:, 0]
        return [self.boxes[i] for i in missed.tolist()]


@dataclass(frozen=True)
class AssignmentStatistics:
    """How a config assigns the boxes of a data set to locations."""

    images: int  # including those without boxes
    boxes: int
    recalled: int
    positives: int
    best_possible_recall: float | None
    ambiguous: float | None  # share of the positives
    ambiguous_classes: float | None  # share of the positives
    crowd_left_out: int  # boxes
    no_area_left_out: int  # boxes without an area inside the image at the test resize
    levels: tuple[LevelStatistics, ...]  # finest first
    sizes: tuple[SizeStatistics, ...]  # of SIZES
    settings: dict  # the values of the config that the numbers depend on
    of_boxes: BoxStatistics  # what the others sum up

    def to_dict(self) -> dict:
        """All numbers but those of single boxes, ready for JSON."""
        numbers = asdict(replace(self, of_boxes=None))
        del numbers["of_boxes"]
        left_out = {name: numbers.pop(f"{name}_left_out") for name in ("crowd", "no_area")}
        sizes = [asdict(size) | {"recall": size.recall} for size in self.sizes]
        return numbers | {"left_out": left_out, "sizes": sizes}

    def table(self) -> str:
        """The numbers as text for a terminal."""
        total = [
            ("images", self.images),
            ("boxes", self.boxes),
            ("left out: crowd", self.crowd_left_out),
            ("left out: no area", self.no_area_left_out),
            ("positive locations", self.positives),
            ("best possible recall", _percent(self.best_possible_recall)),
            ("ambiguous positives", _percent(self.ambiguous)),
            ("ambiguous between classes", _percent(self.ambiguous_classes)),
        ]
        by_level = [
            (
                f"{x.name} (stride {x.stride})",
                x.positives,
                _percent(_share(x.positives, self.positives)),
                *(_percent(_share(n, x.positives)) for n in (x.ambiguous, x.ambiguous_classes)),
            )
            for x in self.levels
        ]
        by_size = [
            (x.name, x.boxes, x.recalled, _percent(x.recall), x.positives) for x in self.sizes
        ]
        level_header = ("level", "positives", "share", "ambiguous", "between classes")
        size_header = ("box size", "boxes", "recalled", "recall", "positives")
        tables = (total, ()), (by_level, level_header), (by_size, size_header)
        return "\n\n".join(
            tabulate(rows, header, colalign=("left", *["right"] * (len(rows[0]) - 1)))
            for rows, header in tables
        )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"
