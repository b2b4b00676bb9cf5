"""What a detector saw in an image: the maps of its head, and where each detection came from.

Shapes: L levels, K classes, (Hi, Wi) cells of level i, C candidates, D detections.

Candidate: a location and a class whose probability is above the threshold, as in
fcos_d2/modeling/post_processing.py. Maps are those of the network input, which is resized and
padded; boxes, locations and distances that leave this file are in pixels of the original image.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..inference import Predictor
from ..modeling import FCOS, FCOSPostProcessor, HeadOutputs, Levels
from ..modeling.points import centerness, ltrb_to_boxes


@dataclass(frozen=True)
class Inspection:
    """An image, and what a detector made of it. All tensors are on CPU.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        input_size: (height, width) in pixels of the network input, without padding.
        class_names: those that the weights or the data sets say, or else numbers.
        level_names: as in MODEL.FCOS.IN_FEATURES.
        levels: the geometry of the levels, in pixels of the network input.
        class_probability: (K, Hi, Wi) for each level.
        quality: (Hi, Wi) in [0, 1] for each level, NaN where it is undefined; None with QUALITY
            "none".
        detections: those of the detector, in pixels of the image, best first, with the fields of
            :func:`candidates`.
        candidates: what they were chosen from, before top-k and NMS. Unlike all else in pixels of
            the network input, and not clipped.
    """

    image: np.ndarray
    input_size: tuple[int, int]
    class_names: list[str]
    level_names: tuple[str, ...]
    levels: Levels
    class_probability: list[Tensor]
    quality: list[Tensor] | None
    detections: Instances
    candidates: Instances

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
        predictor: of an FCOS.
        image: (H, W, 3) uint8, BGR.

    Raises:
        ValueError: for another detector, and for an array that is no image.
    """
    model = predictor.model
    if not isinstance(model, FCOS):
        raise ValueError(f"Pictures are made of FCOS, not of {type(model).__name__}")
    images = model.preprocess_image([predictor.model_input(image, "BGR")])
    outputs = model.head_outputs(images)
    (detections,) = model.post_processor(outputs, model.levels, images.image_sizes)
    (input_size,) = images.image_sizes
    outputs = HeadOutputs(*([x.cpu() for x in maps] if maps else None for maps in outputs))
    chosen_from = candidates(outputs, model.levels, model.post_processor, input_size)
    origins = chosen_from[find_origins(detections.to("cpu"), chosen_from)]
    for field, values in detections.to("cpu").get_fields().items():
        origins.set(field, values)
    return Inspection(
        image=image[:, :, ::-1],
        input_size=tuple(input_size),
        class_names=predictor.metadata.get("thing_classes", None)
        or [f"class {i}" for i in range(model.num_classes)],
        level_names=tuple(model.head_in_features),
        levels=model.levels,
        class_probability=[x[0].float().sigmoid() for x in outputs.class_logits],
        quality=quality_maps(outputs, model.post_processor.quality),
        detections=_in_pixels_of_the_image(origins, image.shape[:2]),
        candidates=chosen_from,
    )


def quality_maps(outputs: HeadOutputs, quality: str) -> list[Tensor] | None:
    """(Hi, Wi) quality on each level, of the first image of a batch; see :class:`Inspection`.

    Args:
        quality: MODEL.FCOS.QUALITY.
    """
    if quality == "none":
        return None
    if quality == "computed":
        return [centerness(x[:1].float())[0] for x in outputs.ltrb]
    return [x[0, 0].float().sigmoid() for x in outputs.quality_logits]


def candidates(
    outputs: HeadOutputs,
    levels: Levels,
    post_processor: FCOSPostProcessor,
    input_size: tuple[int, int],
) -> Instances:
    """All candidates of the first image of a batch, with their cells.

    The post-processor's own candidates are the best of these on each level, and say no cells.

    Returns:
        in pixels of the network input, with ``pred_boxes``, not clipped, ``scores``,
        ``pred_classes``; ``level`` (C,) int64, ``locations`` (C, 2), ``ltrb`` (C, 4),
        ``class_probability`` (C,), and ``quality`` (C,), which is 1 with QUALITY "none".
    """
    qualities = quality_maps(outputs, post_processor.quality)
    parts = []
    for level, logits in enumerate(outputs.class_logits):
        logits = logits[0].float()
        classes, y, x = (logits > post_processor.logit_thresh).nonzero(as_tuple=True)
        locations = levels.locations(level, x, y)
        ltrb = outputs.ltrb[level][0][:, y, x].float().T
        probability = logits[classes, y, x].sigmoid()
        quality = torch.ones_like(probability) if qualities is None else qualities[level][y, x]
        part = Instances(
            input_size,
            pred_boxes=Boxes(ltrb_to_boxes(locations, ltrb)),
            scores=post_processor.score(probability, quality),
            pred_classes=classes,
            level=torch.full_like(classes, level),
            locations=locations,
            ltrb=ltrb,
            class_probability=probability,
            quality=quality,
        )
        parts.append(part)
    every = Instances.cat(parts)
    on_score = post_processor.score_thresh_on == "score"
    above = every.scores > (post_processor.score_thresh if on_score else -math.inf)  # NaN is not
    return every[above & every.pred_boxes.tensor.isfinite().all(dim=1)]


def find_origins(detections: Instances, candidates: Instances) -> Tensor:
    """(D,) int64 index of the candidate that each detection is, both before the last resize.

    A detection is a candidate with its box clipped. Of several that are alike NMS keeps the
    first, and so does this.
    """
    boxes = candidates.pred_boxes.clone()
    boxes.clip(candidates.image_size)
    boxes = boxes.tensor
    origins = []
    for box, score, number in zip(
        detections.pred_boxes.tensor, detections.scores, detections.pred_classes, strict=True
    ):
        of_class = (candidates.pred_classes == number).nonzero()[:, 0]
        # The same arithmetic may be rounded otherwise on a GPU, so the nearest one is taken.
        difference = (boxes[of_class] - box).abs().amax(dim=1)
        difference += (candidates.scores[of_class] - score).abs()
        origins.append(of_class[difference.argmin()])
    return torch.stack(origins) if origins else torch.zeros(0, dtype=torch.int64)


def _in_pixels_of_the_image(detections: Instances, image_size: tuple[int, int]) -> Instances:
    scale_x, scale_y = image_scale(image_size, detections.image_size)
    detections = detector_postprocess(detections, *image_size)
    scale = torch.tensor([scale_x, scale_y])
    detections.locations = detections.locations * scale
    detections.ltrb = detections.ltrb * scale.repeat(2)
    return detections
