"""The results of :func:`analyze_assignment`, whose module defines the terms."""

from dataclasses import asdict, dataclass

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
    """Boxes of one COCO size, those that own a location, and the locations they own."""

    name: str
    boxes: int
    recalled: int
    positives: int

    @property
    def recall(self) -> float | None:
        """Share of the boxes that own a location; None without boxes."""
        return _share(self.recalled, self.boxes)


@dataclass(frozen=True)
class BoxStatistics:
    """The locations that each of M boxes owns on each of L levels."""

    level_names: tuple[str, ...]  # finest first
    # Of each box, the number of its record and that of its annotation in there.
    boxes: tuple[tuple[int, int], ...]
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
    crowd_left_out: int  # boxes left out because they are crowds
    no_area_left_out: int  # those that have no area inside the image at the test resize
    levels: tuple[LevelStatistics, ...]  # finest first
    sizes: tuple[SizeStatistics, ...]  # of SIZES
    settings: dict  # the values of the config that the numbers depend on
    of_boxes: BoxStatistics  # what the others sum up

    @property
    def boxes(self) -> int:
        return sum(size.boxes for size in self.sizes)

    @property
    def recalled(self) -> int:
        return sum(size.recalled for size in self.sizes)

    @property
    def positives(self) -> int:
        return sum(level.positives for level in self.levels)

    @property
    def best_possible_recall(self) -> float | None:
        """Share of the boxes that own a location; None without boxes."""
        return _share(self.recalled, self.boxes)

    @property
    def ambiguous(self) -> float | None:
        """Share of the positives that were eligible for several boxes; None without positives."""
        return _share(sum(level.ambiguous for level in self.levels), self.positives)

    @property
    def ambiguous_classes(self) -> float | None:
        """Share of the positives that were eligible for boxes of different classes."""
        return _share(sum(level.ambiguous_classes for level in self.levels), self.positives)

    def to_dict(self) -> dict:
        """All numbers, ready for JSON; shares are in [0, 1], or None if the whole is 0."""
        names = (
            "images", "boxes", "recalled", "positives", "best_possible_recall", "ambiguous",
            "ambiguous_classes",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {
            "left_out": {"crowd": self.crowd_left_out, "no_area": self.no_area_left_out},
            "levels": [asdict(level) for level in self.levels],
            "sizes": [asdict(size) | {"recall": size.recall} for size in self.sizes],
            "settings": self.settings,
        }

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
            (size.name, size.boxes, size.recalled, _percent(size.recall), size.positives)
            for size in self.sizes
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
