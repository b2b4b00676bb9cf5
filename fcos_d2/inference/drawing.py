"""Pictures of detections, by Detectron2's Visualizer."""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer


def draw_instances(
    image: np.ndarray,
    instances: Instances,
    metadata: Metadata,
    threshold: float | Sequence[float] = 0.0,
    scale: float = 1.0,
) -> np.ndarray:
    """Draw boxes with their classes, scores if they have them, and masks, each class in its colour.

    Args:
        image: (H, W, 3) uint8, BGR.
        instances: in pixels of the image, with ``pred_boxes`` and ``pred_classes``. On any device.
        metadata: ``thing_classes`` are the names; ``thing_colors`` the colours, if there are any.
        threshold: instances with a smaller score are not drawn. One for all classes, or one for
            each.
        scale: the size of the picture, relative to that of the image.

    Returns:
        (H * scale, W * scale, 3) uint8, BGR.
    """
    instances = instances.to("cpu")
    if instances.has("scores"):
        least = torch.as_tensor(threshold, dtype=torch.float64)
        if least.ndim:
            least = least[instances.pred_classes]
        instances = instances[instances.scores >= least]
    names = [plain_text(name) for name in metadata.get("thing_classes", ())]
    colors = metadata.get("thing_colors", None)
    if colors is None:
        num_classes = len(names) or 1 + max(map(int, instances.pred_classes), default=0)
        colors = class_colors(num_classes)
    shown = Metadata(**metadata.as_dict() | {"thing_classes": names, "thing_colors": colors})
    visualizer = Visualizer(
        image[:, :, ::-1], shown, scale=scale, instance_mode=ColorMode.SEGMENTATION
    )
    return visualizer.draw_instance_predictions(instances).get_image()[:, :, ::-1]


def plain_text(name: str) -> str:
    """A name as matplotlib can write it: no formulas, and valid Unicode.

    A leading "_" gets a space before it: matplotlib leaves such labels out of a legend.
    """
    text = name.encode(errors="replace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def class_colors(num_classes: int) -> list[tuple[int, int, int]]:
    """Distinct bright colours, RGB, the same ones each time."""
    hues = [i * 0.618034 % 1 for i in range(num_classes)]  # golden ratio: neighbours differ
    return [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, 0.65, 1)) for hue in hues]
