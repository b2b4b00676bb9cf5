"""Best possible recall and ambiguous samples of a data set (1904.01355, tables 1 and 2).

Definitions, for a config and the boxes of a data set at the config's test resize:

- Best possible recall: the share of boxes that own a location, each location going to one box
  (section 4.1.1).
- Ambiguous: the share of positive locations that are eligible for more than one box ("Amb. samples"
  in table 2).
- Ambiguous between classes: the share of positive locations that are eligible for boxes of more
  than one class ("Amb. samples (diff.)"). Between boxes of one class, either answer names the
  right class.

What the paper found on COCO minival (val2017)::

                                       FPN (P3 to P7)   P4 alone
    best possible recall                   98.40 %       95.55 %
    ambiguous positives                     7.14 %       23.16 %
    ambiguous between classes               3.75 %       17.84 %

The paper takes all locations in a box, without the centre sampling of 2006.09214:
configs/Ablations/iccv_R_50_FPN_1x.yaml is the first column, p4_only_R_50_1x.yaml the second.

Shapes: M boxes, P positives, L levels. Shares are in [0, 1], or None if the whole is 0.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from ..modeling import FCOS
from .positives import assign, boxes_at_test_resize

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
    recall: float | None  # share of the boxes


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
        return numbers | {"left_out": left_out}

    def table(self) -> str:
        """The numbers as text for a terminal."""
        total = [
            ("images", self.images),
            ("boxes", self.boxes),
            ("left out: crowd", self.crowd_left_out),
            ("left out: no area", self.no_area_left_out),
            ("positive locations", self.positives),
            ("best possible recall", self.best_possible_recall),
            ("ambiguous positives", self.ambiguous),
            ("ambiguous between classes", self.ambiguous_classes),
        ]
        by_level = [
            (
                f"{x.name} (stride {x.stride})",
                x.positives,
                share(x.positives, self.positives),
                *(share(n, x.positives) for n in (x.ambiguous, x.ambiguous_classes)),
            )
            for x in self.levels
        ]
        by_size = [(x.name, x.boxes, x.recalled, x.recall, x.positives) for x in self.sizes]
        level_header = ("level", "positives", "share", "ambiguous", "between classes")
        size_header = ("box size", "boxes", "recalled", "recall", "positives")
        tables = (total, ()), (by_level, level_header), (by_size, size_header)
        return "\n\n".join(
            tabulate(
                [map(_as_text, row) for row in rows],
                header,
                colalign=("left", *["right"] * (len(rows[0]) - 1)),
            )
            for rows, header in tables
        )


def analyze_assignment(
    cfg: CfgNode, records: Sequence[dict], *, include_crowd: bool = False, progress: bool = False
) -> AssignmentStatistics:
    """Assign all boxes of a data set as the detector of a config would, and count.

    Every image is padded by itself. Padding to the largest of a batch, as training does, adds no
    location inside a box; with ASSIGNMENT "atss" it may add some to the nearest ones of a box.

    Args:
        cfg: with MODEL.META_ARCHITECTURE "FCOS".
        records: in Detectron2's format: "height", "width", and "annotations" with "bbox",
            "bbox_mode", "category_id" and perhaps "iscrowd". No image is read.
        include_crowd: keep the boxes of crowds, which training never sees.
        progress: show a progress bar.

    Raises:
        ValueError: for another meta architecture, for a rule of assignment that sees what a model
            predicts, and for a record without height and width.
    """
    check_is_fcos(cfg)
    # The detector brings its checks, strides and assigner. On the meta device it has no weights.
    with torch.device("meta"):
        detector = FCOS(cfg)
    names, num_levels = tuple(detector.head_in_features), len(detector.levels)
    sizes, sides, numbers = [torch.zeros(0)], [torch.zeros(0)], []
    owned = [torch.zeros(0, num_levels, dtype=torch.int64)]
    ambiguous = torch.zeros(2, num_levels, dtype=torch.int64)
    crowds = no_areas = 0
    for number, record in enumerate(tqdm(records, unit=" images", disable=not progress)):
        image, crowd, no_area = boxes_at_test_resize(cfg, record, include_crowd)
        positives, *is_ambiguous = assign(detector, image)
        box_and_level = positives.gt * num_levels + positives.level
        counts = box_and_level.bincount(minlength=len(image) * num_levels)
        owned.append(counts.view(len(image), num_levels))
        for row, chosen in enumerate(is_ambiguous):
            ambiguous[row] += positives.level[chosen].bincount(minlength=num_levels)
        sizes.append(image.coco_size)
        sides.append(image.gt_boxes.area().sqrt())
        numbers += [(number, i) for i in image.annotation.tolist()]
        crowds, no_areas = crowds + crowd, no_areas + no_area
    sizes, owned = torch.cat(sizes), torch.cat(owned)
    by_level = owned.sum(dim=0).tolist(), *ambiguous.tolist()
    total = _of_size("all", owned)
    shares = [share(n, total.positives) for n in ambiguous.sum(1).tolist()]
    return AssignmentStatistics(
        images=len(records),
        boxes=total.boxes,
        recalled=total.recalled,
        positives=total.positives,
        best_possible_recall=total.recall,
        ambiguous=shares[0],
        ambiguous_classes=shares[1],
        crowd_left_out=crowds,
        no_area_left_out=no_areas,
        levels=tuple(map(LevelStatistics, names, detector.levels.strides, *by_level)),
        sizes=tuple(_of_size(name, owned[sizes == i]) for i, name in enumerate(SIZES)),
        settings=_settings(cfg, detector),
        of_boxes=BoxStatistics(names, tuple(numbers), torch.cat(sides), owned),
    )


def _of_size(name: str, owned: Tensor) -> SizeStatistics:
    """``owned``: (M, L) locations that each box owns on each level."""
    recalled = int(owned.any(dim=1).sum())
    return SizeStatistics(name, len(owned), recalled, int(owned.sum()), share(recalled, len(owned)))


def analyze_boxes(
    cfg: CfgNode, records: Sequence[dict], *, progress: bool = False
) -> BoxStatistics:
    """The locations that each box owns on each level; see :func:`analyze_assignment`."""
    return analyze_assignment(cfg, records, progress=progress).of_boxes


def check_is_fcos(cfg: CfgNode) -> None:
    """Raise a ValueError for another meta architecture."""
    if cfg.MODEL.META_ARCHITECTURE != "FCOS":
        raise ValueError(
            f"MODEL.META_ARCHITECTURE must be 'FCOS', got {cfg.MODEL.META_ARCHITECTURE!r}"
        )


def _settings(cfg: CfgNode, detector: FCOS) -> dict:
    """What the numbers depend on."""
    return {
        "assignment": cfg.MODEL.FCOS.ASSIGNMENT,
        **detector.assigner.settings,
        "location_offset": detector.levels.offset,
        "min_size_test": cfg.INPUT.MIN_SIZE_TEST,
        "max_size_test": cfg.INPUT.MAX_SIZE_TEST,
    }


def share(part: int, whole: int) -> float | None:
    """None if the whole is 0."""
    return part / whole if whole else None


def _as_text(value: str | int | float | None) -> str | int:
    """A share in percent, "-" where it is None; all others as they are."""
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if isinstance(value, float) else value
