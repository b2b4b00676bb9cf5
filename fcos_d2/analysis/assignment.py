"""Best possible recall and ambiguous samples of a data set (1904.01355, tables 1 and 2).

Definitions, for a config and the boxes of a data set at the config's test resize:

- Best possible recall: the share of boxes that own at least one location, after each location
  was given to one box (section 4.1.1).
- Ambiguous: a positive location that was eligible for more than one box. The share is that of all
  positive locations, as in the paper's table 2 ("Amb. samples"), each location counted once.
- Ambiguous between classes: an ambiguous location whose eligible boxes are not all of one class.
  The share is that of all positive locations too ("Amb. samples (diff.)"): between boxes of one
  class, either answer names the right class.

What the paper found on COCO minival (val2017)::

                                       FPN (P3 to P7)   P4 alone
    best possible recall                   98.40 %       95.55 %
    ambiguous positives                     7.14 %       23.16 %
    ambiguous between classes               3.75 %       17.84 %

The paper takes all locations in a box: CENTER_SAMPLING_RADIUS 0. With centre sampling, the default
of 2006.09214, the numbers are others. So take configs/Ablations/iccv_R_50_FPN_1x.yaml for the first
column and p4_only_R_50_1x.yaml beside it for the second.

Shapes: M boxes in a batch of images, P positives, C candidates (location and box), L levels.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import transform_instance_annotations
from detectron2.data.transforms import NoOpTransform, ResizeShortestEdge, ResizeTransform, Transform
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, BoxMode
from torch import Tensor
from tqdm import tqdm

from ..data.mapper import with_float_coordinates
from ..modeling import FCOS, Levels, LocationAssigner
from ..modeling.backbone import padded_size
from ..modeling.target_assignment import cell_numbers
from .statistics import AssignmentStatistics, BoxStatistics, LevelStatistics, SizeStatistics

# COCO's sizes, and the areas in pixels of the original image that the second and third begin at.
# The area is the box's: COCO's own evaluation takes the mask's, which not every data set has.
SIZES = ("small", "medium", "large")
_SIZE_BEGINS = (32**2, 96**2)

# Images of one padded size that are assigned at once: enough to hide the cost of a call.
_BATCH = 32


def analyze_assignment(
    cfg: CfgNode,
    records: Sequence[dict],
    *,
    include_crowd: bool = False,
    progress: bool = False,
) -> AssignmentStatistics:
    """Assign all boxes of a data set as the detector of a config would, and count.

    Every image is padded by itself, as when detecting; training pads to the largest of a batch,
    which adds no location inside of a box.

    Args:
        cfg: with MODEL.META_ARCHITECTURE "FCOS".
        records: in Detectron2's format: "height", "width", and "annotations" with "bbox",
            "bbox_mode", "category_id" and perhaps "iscrowd". No image is read.
        include_crowd: keep the boxes of crowds, which training never sees.
        progress: show a progress bar.

    Raises:
        ValueError: for another meta architecture, and for a record without height and width.
    """
    counts, left_out, settings = _count(cfg, records, include_crowd, progress)
    names = cfg.MODEL.FCOS.IN_FEATURES
    by_level = zip(names, counts.levels.strides, *counts.by_level.tolist(), strict=True)
    by_size = zip(SIZES, *counts.by_size.tolist(), strict=True)
    return AssignmentStatistics(
        images=len(records),
        crowd_left_out=left_out[0],
        no_area_left_out=left_out[1],
        levels=tuple(LevelStatistics(*level) for level in by_level),
        sizes=tuple(SizeStatistics(*size) for size in by_size),
        settings=settings,
    )


def analyze_boxes(
    cfg: CfgNode, records: Sequence[dict], *, progress: bool = False
) -> BoxStatistics:
    """As :func:`analyze_assignment`, but for each box: the locations that it owns on each level."""
    counts, _, _ = _count(cfg, records, include_crowd=False, progress=progress)
    levels = len(counts.levels)
    return BoxStatistics(
        level_names=tuple(cfg.MODEL.FCOS.IN_FEATURES),
        boxes=tuple(box for image in counts.images for box in image.numbers),
        sides=torch.cat([Boxes(i.boxes).area().sqrt() for i in counts.images] or [torch.empty(0)]),
        positives=torch.cat(counts.by_box or [torch.zeros(0, levels, dtype=torch.int64)]),
    )


def _count(
    cfg: CfgNode, records: Sequence[dict], include_crowd: bool, progress: bool
) -> tuple["_Counts", tuple[int, int], dict]:
    """Counts, the boxes left out as crowds and without area, and the settings."""
    check_is_fcos(cfg)
    # The detector itself, so that its own checks, strides and assigner are used. On the meta
    # device it has shapes but no weights, and takes no time.
    with torch.device("meta"):
        detector = FCOS(cfg)
    levels = detector.levels
    counts = _Counts(detector.assigner, levels)
    crowd = no_area = 0
    waiting: dict[tuple, list[ResizedBoxes]] = defaultdict(list)
    for number, record in enumerate(tqdm(records, unit=" images", disable=not progress)):
        image = boxes_at_test_resize(cfg, record, include_crowd, number)
        crowd += image.crowd_left_out
        no_area += image.no_area_left_out
        shapes = level_shapes(detector.backbone, levels, *image.size)
        group = waiting[shapes]
        group.append(image)
        if len(group) == _BATCH:
            counts.add(shapes, group)
            group.clear()
    for shapes, group in waiting.items():
        if group:
            counts.add(shapes, group)
    return counts, (crowd, no_area), _settings(cfg, detector)


def check_is_fcos(cfg: CfgNode) -> None:
    """Raise a ValueError for another meta architecture."""
    if cfg.MODEL.META_ARCHITECTURE != "FCOS":
        raise ValueError(
            f"MODEL.META_ARCHITECTURE must be 'FCOS', got {cfg.MODEL.META_ARCHITECTURE!r}"
        )


def level_shapes(
    backbone: Backbone, levels: Levels, height: int, width: int
) -> tuple[tuple[int, int], ...]:
    """(height, width) in cells of each level, for an image of (height, width) pixels.

    Exact for ResNet and FPN: their strided convolutions and poolings halve, rounding up.
    """
    height, width = padded_size(backbone, height, width)
    return tuple((-(-height // stride), -(-width // stride)) for stride in levels.strides)


@dataclass(frozen=True)
class ResizedBoxes:
    """The boxes of an image at the test resize.

    Attributes:
        size: (height, width) in pixels, before padding.
        boxes: (M, 4) as x0, y0, x1, y1 in pixels.
        classes: (M,) int64.
        sizes: (M,) int64 number of the COCO size of the original box, into SIZES.
        numbers: of each box, those of its record and of its annotation in there.
    """

    size: tuple[int, int]
    boxes: Tensor
    classes: Tensor
    sizes: Tensor
    numbers: list[tuple[int, int]]
    crowd_left_out: int
    no_area_left_out: int


def boxes_at_test_resize(
    cfg: CfgNode, record: dict, include_crowd: bool = False, number: int = 0
) -> ResizedBoxes:
    """The boxes that training would see if it resized as in tests.

    Args:
        number: of the record in its data set.

    Raises:
        ValueError: for a record without height and width.
    """
    if "height" not in record or "width" not in record:
        name = record.get("file_name", record.get("image_id"))
        raise ValueError(f"The record of the image {name!r} has no height and width")
    resize, size = resize_for_test(cfg, record["height"], record["width"])
    annotations = with_float_coordinates(record).get("annotations", [])
    numbers = [i for i, a in enumerate(annotations) if include_crowd or not a.get("iscrowd", 0)]
    kept = [annotations[i] for i in numbers]
    boxes = [
        transform_instance_annotations(
            {"bbox": a["bbox"], "bbox_mode": a["bbox_mode"]}, resize, size
        )["bbox"]
        for a in kept
    ]
    boxes = Boxes(torch.from_numpy(np.array(boxes, np.float32).reshape(-1, 4)))
    # What training leaves out too, after resizing and clipping (filter_empty_instances).
    has_area = boxes.nonempty(threshold=1e-5)
    classes = torch.tensor([a["category_id"] for a in kept], dtype=torch.int64)
    sizes = torch.tensor([_coco_size(a) for a in kept], dtype=torch.int64)
    return ResizedBoxes(
        size=size,
        boxes=boxes.tensor[has_area],
        classes=classes[has_area],
        sizes=sizes[has_area],
        numbers=[(number, numbers[i]) for i in has_area.nonzero()[:, 0].tolist()],
        crowd_left_out=len(annotations) - len(kept),
        no_area_left_out=len(kept) - int(has_area.sum()),
    )


def resize_for_test(cfg: CfgNode, height: int, width: int) -> tuple[Transform, tuple[int, int]]:
    """INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST for an image, and its new (height, width)."""
    if cfg.INPUT.MIN_SIZE_TEST == 0:  # Detectron2's way to say: as it is
        return NoOpTransform(), (height, width)
    size = ResizeShortestEdge.get_output_shape(
        height, width, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    )
    return ResizeTransform(height, width, *size), size


def _coco_size(annotation: dict) -> int:
    _, _, width, height = BoxMode.convert(
        annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS
    )
    return sum(width * height >= begin for begin in _SIZE_BEGINS)


class _Counts:
    """Sums over batches of images.

    Attributes:
        by_level: (3, L) positives, ambiguous ones, those ambiguous between classes.
        by_size: (3, 3) boxes, those that own a location, and their locations; columns are SIZES.
        images: in the order in which they were counted.
        by_box: (M, L) locations of each box, for each batch.
    """

    def __init__(self, assigner: LocationAssigner, levels: Levels):
        self.assigner = assigner
        self.levels = levels
        self.by_level = torch.zeros(3, len(levels), dtype=torch.int64)
        self.by_size = torch.zeros(3, len(SIZES), dtype=torch.int64)
        self.images: list[ResizedBoxes] = []
        self.by_box: list[Tensor] = []

    def add(self, shapes: Sequence[tuple[int, int]], images: Sequence[ResizedBoxes]) -> None:
        """Count images that share (height, width) in cells of each level."""
        boxes = [image.boxes for image in images]
        classes = torch.cat([image.classes for image in images])  # (M,)
        sizes = torch.cat([image.sizes for image in images])  # (M,)
        candidates = self.assigner.candidates(self.levels, shapes, boxes)
        positives = self.assigner.resolve(candidates, shapes, boxes)
        cell = cell_numbers(positives, shapes, len(images))  # (P,)
        candidate_cell = cell_numbers(candidates, shapes, len(images))  # (C,)

        num_cells = len(images) * sum(height * width for height, width in shapes)
        eligible = torch.bincount(candidate_cell, minlength=num_cells)
        # A location is ambiguous between classes if any box is of another class than the owner.
        owner_class = torch.zeros(num_cells, dtype=torch.int64)
        owner_class[cell] = classes[positives.gt]
        differs = classes[candidates.gt] != owner_class[candidate_cell]
        others = torch.bincount(candidate_cell[differs], minlength=num_cells)
        level, num_levels = positives.level, len(shapes)
        for row, chosen in enumerate((level, level[eligible[cell] > 1], level[others[cell] > 0])):
            self.by_level[row] += torch.bincount(chosen, minlength=num_levels)

        box_and_level = positives.gt * num_levels + level
        by_box = torch.bincount(box_and_level, minlength=len(classes) * num_levels)
        by_box = by_box.view(len(classes), num_levels)
        self.images += images
        self.by_box.append(by_box)
        owned = by_box.sum(dim=1)
        for row, chosen in enumerate((sizes, sizes[owned > 0], sizes[positives.gt])):
            self.by_size[row] += torch.bincount(chosen, minlength=len(SIZES))


def _settings(cfg: CfgNode, detector: FCOS) -> dict:
    """The config's part in the numbers, for JSON, which has no infinity: null there."""
    return {
        "regression_ranges": [
            [low, None if high == float("inf") else high]
            for low, high in detector.assigner.regression_ranges
        ],
        "center_sampling_radius": detector.assigner.radius,
        "location_offset": detector.levels.offset,
        "min_size_test": cfg.INPUT.MIN_SIZE_TEST,
        "max_size_test": cfg.INPUT.MAX_SIZE_TEST,
    }
