"""Which locations of an image would learn which of its boxes, at the test resize.

Shapes: M boxes of an image, P positives.
"""

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import transform_instance_annotations
from detectron2.data.transforms import NoOpTransform, ResizeShortestEdge, ResizeTransform, Transform
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, BoxMode
from torch import Tensor

from ..data.mapper import with_float_coordinates
from ..modeling import FCOS, Levels
from ..modeling.backbone import padded_size
from ..modeling.target_assignment import Positives, cell_numbers
from .inspection import image_scale

# The areas in pixels of the original image that COCO's second and third size begin at. The area is
# the box's: COCO's own evaluation takes the mask's, which not every data set has.
_SIZE_BEGINS = (32**2, 96**2)


@dataclass(frozen=True)
class ResizedBoxes:
    """The boxes of an image at the test resize.

    Attributes:
        size: (height, width) in pixels, before padding.
        boxes: (M, 4) as x0, y0, x1, y1 in pixels.
        classes: (M,) int64.
        sizes: (M,) int64 number of the COCO size of the original box: 0 is small.
        numbers: of each box, that of its annotation in the record.
        crowd_left_out, no_area_left_out: how many annotations are not among the boxes.
    """

    size: tuple[int, int]
    boxes: Tensor
    classes: Tensor
    sizes: Tensor
    numbers: list[int]
    crowd_left_out: int
    no_area_left_out: int


def boxes_at_test_resize(cfg: CfgNode, record: dict, include_crowd: bool = False) -> ResizedBoxes:
    """The boxes that training would see if it resized as in tests.

    Raises:
        ValueError: for a record without height and width.
    """
    if "height" not in record or "width" not in record:
        name = record.get("file_name", record.get("image_id"))
        raise ValueError(f"The record of the image {name!r} has no height and width")
    resize, size = resize_for_test(cfg, record["height"], record["width"])
    annotations = with_float_coordinates(record).get("annotations", [])
    kept = [(i, a) for i, a in enumerate(annotations) if include_crowd or not a.get("iscrowd", 0)]
    boxes, classes, sizes = [], [], []
    for _, a in kept:
        annotation = {"bbox": a["bbox"], "bbox_mode": a["bbox_mode"]}
        sizes.append(_coco_size(annotation))
        boxes.append(transform_instance_annotations(annotation, resize, size)["bbox"])
        classes.append(a["category_id"])
    boxes = Boxes(torch.from_numpy(np.array(boxes, np.float32).reshape(-1, 4)))
    # What training leaves out too, after resizing and clipping (filter_empty_instances).
    has_area = boxes.nonempty(threshold=1e-5)
    return ResizedBoxes(
        size=size,
        boxes=boxes.tensor[has_area],
        classes=torch.tensor(classes, dtype=torch.int64)[has_area],
        sizes=torch.tensor(sizes, dtype=torch.int64)[has_area],
        numbers=[number for (number, _), has in zip(kept, has_area, strict=True) if has],
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


def level_shapes(
    backbone: Backbone, levels: Levels, height: int, width: int
) -> tuple[tuple[int, int], ...]:
    """(height, width) in cells of each level, for an image of (height, width) pixels.

    Exact for ResNet and FPN: their strided convolutions and poolings halve, rounding up.
    """
    height, width = padded_size(backbone, height, width)
    return tuple((-(-height // stride), -(-width // stride)) for stride in levels.strides)


def assign(model: FCOS, image: ResizedBoxes) -> tuple[Positives, Tensor, Tensor]:
    """The positives of an image, and which are ambiguous, and which of these between classes.

    Returns:
        the positives, and two masks (P,): eligible for more than one box; for boxes of more than
        one class.
    """
    shapes = level_shapes(model.backbone, model.levels, *image.size)
    candidates = model.assigner.candidates(model.levels, shapes, [image.boxes])
    positives = model.assigner.resolve(candidates, shapes, [image.boxes])
    # The number of the positive at the location of each candidate.
    cell, order = cell_numbers(positives, shapes, 1).sort()
    owner = order[torch.searchsorted(cell, cell_numbers(candidates, shapes, 1))]
    ambiguous, between_classes = torch.zeros(2, len(positives), dtype=torch.bool)
    ambiguous[owner[candidates.gt != positives.gt[owner]]] = True
    classes = image.classes[positives.gt]
    between_classes[owner[image.classes[candidates.gt] != classes[owner]]] = True
    return positives, ambiguous, between_classes


@dataclass(frozen=True)
class LocatedPositives:
    """The positives of the M boxes of an image, in pixels of the original image.

    Attributes:
        boxes: (M, 4) as x0, y0, x1, y1, without crowds and boxes without area.
        classes: (M,) int64.
        level: (P,) int64.
        locations: (P, 2) as x, y.
        gt: (P,) int64 number of the box that owns the location.
        ambiguous: (P,) bool, whether the location was eligible for several boxes.
    """

    boxes: Tensor
    classes: Tensor
    level: Tensor
    locations: Tensor
    gt: Tensor
    ambiguous: Tensor


def locate_positives(cfg: CfgNode, model: FCOS, record: dict) -> LocatedPositives:
    """Assign the boxes of an image at the test resize; training may resize otherwise.

    Args:
        cfg: of the model.
        record: in Detectron2's format, with "height", "width" and "annotations".

    Raises:
        ValueError: for a record without height and width.
    """
    resized = boxes_at_test_resize(cfg, record)
    positives, ambiguous, _ = assign(model, resized)
    scale = torch.tensor(image_scale((record["height"], record["width"]), resized.size))
    return LocatedPositives(
        boxes=resized.boxes * scale.repeat(2),
        classes=resized.classes,
        level=positives.level,
        locations=model.levels.locations(positives.level, positives.x, positives.y) * scale,
        gt=positives.gt,
        ambiguous=ambiguous,
    )
