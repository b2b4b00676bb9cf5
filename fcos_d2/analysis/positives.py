"""Which locations of an image would learn which of its boxes."""

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..modeling import FCOS
from ..modeling.target_assignment import cell_numbers
from .assignment import boxes_at_test_resize, level_shapes
from .inspection import image_scale


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
    shapes = level_shapes(model.backbone, model.levels, *resized.size)
    candidates = model.assigner.candidates(model.levels, shapes, [resized.boxes])
    positives = model.assigner.resolve(candidates, shapes, [resized.boxes])
    num_cells = sum(height * width for height, width in shapes)
    eligible = torch.bincount(cell_numbers(candidates, shapes, 1), minlength=num_cells)
    scale = torch.tensor(image_scale((record["height"], record["width"]), resized.size))
    return LocatedPositives(
        boxes=resized.boxes * scale.repeat(2),
        classes=resized.classes,
        level=positives.level,
        locations=model.levels.locations(positives.level, positives.x, positives.y) * scale,
        gt=positives.gt,
        ambiguous=eligible[cell_numbers(positives, shapes, 1)] > 1,
    )
