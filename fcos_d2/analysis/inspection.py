"""What a detector sees in an image: the maps of its head, and where each detection comes from.

Shapes: K classes, (Hi, Wi) cells of level i.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor

from ..inference import Predictor
from ..modeling import FCOS, HeadOutputs, Levels
from ..modeling.head import WITHOUT_FACTOR
from ..modeling.points import centerness


@dataclass(frozen=True)
class Inspection:
    """An image, and what a detector makes of it. All tensors are on CPU.

    Detections and candidates have the fields of their cells; see FCOSPostProcessor.candidates.
    """

    image: np.ndarray  # (H, W, 3) uint8, RGB
    input_size: tuple[int, int]  # (height, width) in pixels of the network input, without padding
    class_names: list[str]  # from the weights or the data sets, or else numbers
    level_names: tuple[str, ...]  # as in MODEL.FCOS.IN_FEATURES
    levels: Levels  # in pixels of the network input
    class_probability: list[Tensor]  # (K, Hi, Wi) for each level
    # (Hi, Wi) in [0, 1] for each level, NaN where it is undefined; None where the scores have no
    # factor of quality.
    quality: list[Tensor] | None
    detections: Instances  # best first, in pixels of the image
    candidates: Instances  # before top-k, NMS and clipping, in pixels of the network input

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the image for each pixel of the network input, along x and y."""
        return image_scale(self.image.shape[:2], self.input_size)

    def level_title(self, level: int) -> str:
        """Such as "p3 · stride 8"."""
        return f"{self.level_names[level]} · stride {self.levels.strides[level]}"


def image_scale(image_size: tuple[int, int], input_size: tuple[int, int]) -> tuple[float, float]:
    """Pixels of an image for each pixel of the network input along x and y; sizes: (H, W)."""
    return image_size[1] / input_size[1], image_size[0] / input_size[0]


@torch.no_grad()
def inspect_image(predictor: Predictor, image: np.ndarray) -> Inspection:
    """Detect as the predictor does, and keep what explains the detections.

    Args:
        image: (H, W, 3) uint8, BGR.

    Raises:
        ValueError: for another detector, and for an array that is no image.
    """
    model = predictor.model
    if not isinstance(model, FCOS):
        raise ValueError(f"Pictures are made of FCOS, not of {type(model).__name__}")
    images = model.preprocess_image([predictor.model_input(image, "BGR")])
    outputs = model.head_outputs(images)
    found = outputs, model.levels, images.image_sizes
    (candidates,) = model.post_processor.candidates(*found, topk=sys.maxsize, with_cells=True)
    best = candidates[candidates.rank < model.post_processor.topk_candidates]
    detections = model.post_processor.suppress(best, image.shape[:2]).to("cpu")
    names = predictor.metadata.get("thing_classes", ())
    scale = torch.tensor(image_scale(image.shape[:2], best.image_size))
    detections.locations = detections.locations * scale
    detections.ltrb = detections.ltrb * scale.repeat(2)
    return Inspection(
        image=image[:, :, ::-1],
        input_size=tuple(best.image_size),
        class_names=[*names, *(f"class {i}" for i in range(len(names), model.num_classes))],
        level_names=tuple(model.head_in_features),
        levels=model.levels,
        class_probability=[x[0].float().sigmoid().cpu() for x in outputs.class_logits],
        quality=_quality_maps(outputs, model.post_processor.quality),
        detections=detections,
        candidates=candidates.to("cpu"),
    )


def _quality_maps(outputs: HeadOutputs, quality: str) -> list[Tensor] | None:
    """(Hi, Wi) on each level, of the first image of a batch."""
    if quality in WITHOUT_FACTOR:
        return None
    if quality == "computed":
        return [centerness(x[:1].float())[0].cpu() for x in outputs.ltrb]
    return [x[0, 0].float().sigmoid().cpu() for x in outputs.quality_logits]
