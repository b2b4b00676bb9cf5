"""Which locations of an image would learn which of its boxes, at the test resize.

Shapes: M boxes of an image, P positives.
"""

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import (
    annotations_to_instances,
    transform_instance_annotations,
)
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform
from detectron2.modeling import Backbone
from detectron2.structures import BoxMode, Instances
from torch import Tensor

from ..data.mapper import with_float_coordinates
from ..modeling import FCOS, Levels
from ..modeling.assignment.candidates import Positives, cell_numbers, lowest_cost_wins
from ..modeling.backbone import padded_size
from .inspection import image_scale

# Where COCO's second and third size begin, in pixels of the original image. The area is the box's:
# COCO's own evaluation takes the mask's, which not every data set has.
_SIZE_BEGINS = (32**2, 96**2)


def boxes_at_test_resize(
    cfg: CfgNode, record: dict, include_crowd: bool = False
) -> tuple[Instances, int, int]:
    """The boxes that training would see if it resized as in tests.

    Returns:
        an image of the size before padding, with ``gt_boxes``, ``gt_classes``, ``coco_size`` (M,)
        of the original box, 0 for small, and ``annotation`` (M,), the number in the record; and how
        many annotations are left out as crowds, and because they have no area.

    Raises:
        ValueError: for a record without height and width.
    """
    if "height" not in record or "width" not in record:
        name = record.get("file_name", record.get("image_id"))
        raise ValueError(f"The record of the image {name!r} has no height and width")
    resize, size = resize_for_test(cfg, record["height"], record["width"])
    annotations = with_float_coordinates(record).get("annotations", [])
    resized = [{k: a[k] for k in ("bbox", "bbox_mode", "category_id")} for a in annotations]
    resized = [transform_instance_annotations(a, resize, size) for a in resized]
    image = annotations_to_instances(resized, size)
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for a in annotations]
    areas = [width * height for _, _, width, height in boxes]
    image.coco_size = torch.from_numpy(np.digitize(areas, _SIZE_BEGINS))
    image.annotation = torch.arange(len(annotations))
    is_crowd = torch.tensor([bool(a.get("iscrowd", 0)) for a in annotations], dtype=torch.bool)
    is_crowd &= not include_crowd
    # Training leaves these out too, after resizing and clipping (filter_empty_instances).
    no_area = ~image.gt_boxes.nonempty(threshold=1e-5) & ~is_crowd
    return image[~is_crowd & ~no_area], int(is_crowd.sum()), int(no_area.sum())


def resize_for_test(
    cfg: CfgNode, height: int, width: int
) -> tuple[ResizeTransform, tuple[int, int]]:
    """INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST for an image, and its new (height, width)."""
    size, shortest = (height, width), cfg.INPUT.MIN_SIZE_TEST
    if shortest > 0:  # 0 is for no resizing
        size = ResizeShortestEdge.get_output_shape(*size, shortest, cfg.INPUT.MAX_SIZE_TEST)
    return ResizeTransform(height, width, *size), size


def level_shapes(
    backbone: Backbone, levels: Levels, height: int, width: int
) -> tuple[tuple[int, int], ...]:
    """(height, width) in cells of each level, for an image of (height, width) pixels.

    The strided convolutions and poolings of ResNet and FPN halve, rounding up.
    """
    height, width = padded_size(backbone, height, width)
    return tuple((-(-height // stride), -(-width // stride)) for stride in levels.strides)


def assign(model: FCOS, image: Instances) -> tuple[Positives, Tensor, Tensor]:
    """Assign the boxes of an image of :func:`boxes_at_test_resize`.

    Returns:
        the positives, and two masks (P,): eligible for more than one box; for boxes of more than
        one class.

    Raises:
        ValueError: for a rule that sees what a model predicts.
    """
    model.assigner.check_without_model()
    boxes, classes = [image.gt_boxes.tensor], image.gt_classes
    shapes = level_shapes(model.backbone, model.levels, *image.image_size)
    candidates = model.assigner.candidates(model.levels, shapes, boxes)
    positives = lowest_cost_wins(candidates, shapes, 1)
    # For each candidate the positive at its location, and the box that owns it.
    cell, order = cell_numbers(positives, shapes, 1).sort()
    at = order[torch.searchsorted(cell, cell_numbers(candidates, shapes, 1))]
    gt = positives.gt[at]
    ambiguous, between_classes = torch.zeros(2, len(positives), dtype=torch.bool)
    ambiguous[at[candidates.gt != gt]] = True
    between_classes[at[classes[candidates.gt] != classes[gt]]] = True
    return positives, ambiguous, between_classes


@dataclass(frozen=True)
class LocatedPositives:
    """The positives of the M boxes of an image, in pixels of the original image."""

    boxes: Tensor  # (M, 4) as x0, y0, x1, y1, without crowds and boxes without area
    classes: Tensor  # (M,) int64
    level: Tensor  # (P,) int64
    locations: Tensor  # (P, 2) as x, y
    gt: Tensor  # (P,) int64 number of the box that owns the location
    ambiguous: Tensor  # (P,) bool, whether the location was eligible for several boxes


def locate_positives(cfg: CfgNode, model: FCOS, record: dict) -> LocatedPositives:
    """Assign the boxes of an image at the test resize; training may resize otherwise.

    Args:
        record: in Detectron2's format, with "height", "width" and "annotations".

    Raises:
        ValueError: for a record without height and width.
    """
    image, _, _ = boxes_at_test_resize(cfg, record)
    positives, ambiguous, _ = assign(model, image)
    scale = torch.tensor(image_scale((record["height"], record["width"]), image.image_size))
    return LocatedPositives(
        boxes=image.gt_boxes.tensor * scale.repeat(2),
        classes=image.gt_classes,
        level=positives.level,
        locations=model.levels.locations(positives.level, positives.x, positives.y) * scale,
        gt=positives.gt,
        ambiguous=ambiguous,
    )
