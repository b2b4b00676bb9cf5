"""Pictures of errors: a part of an image with its ground truth, and with what was detected."""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, BoxMode, Instances

from ..inference.drawing import draw_instances
from .errors import Error
from .evaluation import BoxEvaluation

_AROUND = 1  # margin of a part on each side of the box, in sides of the box
_LEAST = 96  # pixels of the image along a side of the part
_SIDE = 420  # pixels of the picture along the longer side of a part
_GAP = 8


def draw_error(
    image: np.ndarray, error: Error, evaluation: BoxEvaluation, threshold: float
) -> np.ndarray:
    """The ground truth on the left, the detections on the right, the error in a frame.

    Args:
        image: (H, W, 3) uint8, BGR.
        threshold: detections with a smaller score are not drawn.

    Returns:
        (H', W', 3) uint8, BGR.
    """
    part = _part(error.box, image.shape[:2])
    x0, y0, x1, y1 = part
    crop = image[y0:y1, x0:x1]
    longest = max(crop.shape[:2])
    scale = _SIDE / longest
    below, beside = (longest - side for side in crop.shape[:2])
    crop = np.pad(crop, ((0, below), (0, beside), (0, 0)), constant_values=255)
    names = evaluation.class_names
    metadata = Metadata(thing_classes=list(names.values()))
    drawn = []
    for side in (evaluation.truth, evaluation.detections):
        instances = _instances(side.imgToAnns[error.image_id], names, part)
        drawn.append(draw_instances(crop, instances, metadata, threshold, scale).copy())
    _frame(drawn[error.kind != "missed"], np.array(error.box) - [x0, y0, x0, y0], scale)
    gap = np.full((drawn[0].shape[0], _GAP, 3), 255, dtype=np.uint8)
    return np.hstack([drawn[0], gap, drawn[1]])


def _instances(
    annotations: Sequence[dict], categories: Iterable[int], part: tuple[int, int, int, int]
) -> Instances:
    """In pixels of a part of the image; ``categories`` in the order of the classes."""
    x0, y0, x1, y1 = part
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float32).reshape(-1, 4)
    boxes = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    boxes = Boxes(boxes - [x0, y0, x0, y0])
    size = y1 - y0, x1 - x0
    numbers = {category: i for i, category in enumerate(categories)}
    classes = torch.tensor([numbers[a["category_id"]] for a in annotations], dtype=torch.int64)
    instances = Instances(size, pred_boxes=boxes, pred_classes=classes)
    if any("score" in a for a in annotations):
        instances.scores = torch.tensor([a["score"] for a in annotations])
    boxes.clip(size)
    return instances[boxes.nonempty()]


def _part(
    box: tuple[float, float, float, float], image_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """A square around the box, moved into the image, and cut off where it is larger than that."""
    corner, opposite = np.array(box).reshape(2, 2)
    size = np.array(image_size[::-1])
    side = max((1 + 2 * _AROUND) * max(opposite - corner), _LEAST)
    begin = ((corner + opposite - side) / 2).clip(0, (size - side).clip(0))
    end = np.ceil(np.minimum(begin + side, size))
    return *begin.astype(int).tolist(), *end.astype(int).tolist()


def _frame(picture: np.ndarray, box: np.ndarray, scale: float) -> None:
    """Draw a white frame with a black edge just outside a box."""
    for outset, color in ((5, (0, 0, 0)), (3, (255, 255, 255))):
        corners = np.concatenate([box[:2] * scale - outset, box[2:] * scale + outset])
        corners = corners.clip(1, np.tile(picture.shape[1::-1], 2) - 2).round().astype(int).tolist()
        cv2.rectangle(picture, corners[:2], corners[2:], color, 2)
