"""What the page shows of images and videos. This module knows nothing of Gradio."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import UnidentifiedImageError

from ..analysis import inspect_image
from ..analysis.box_figures import origins_figure
from ..analysis.heat_maps import class_figure, quality_figure
from ..analysis.inspection import Inspection
from ..data.image_files import image_size, read_image
from ..inference import Predictor, draw_instances
from ..inference.onnx_predictor import OnnxPredictor
from ..inference.results import to_instances
from ..modeling import FCOS
from ..modeling.head import WITHOUT_FACTOR

_MAX_PIXELS = 50_000_000  # of an image: a request should not take gigabytes
# The longer side of a picture, in pixels: labels do not hide small images, and large ones are not
# seen in full, but slow to send.
_MIN_SIDE, _MAX_SIDE = 640, 1600


@dataclass(frozen=True)
class Found:
    """An image and its detections."""

    image: np.ndarray  # (H, W, 3) uint8, BGR
    instances: Instances  # best first, in pixels of the image, on CPU
    inspection: Inspection | None  # None where the detector does not explain

    @property
    def scale(self) -> float:
        """Pixels of a picture for each pixel of the image."""
        side = max(self.image.shape[:2])
        return min(max(side, _MIN_SIDE), _MAX_SIDE) / side


class Detector:
    """A checkpoint or an ONNX file, and the pictures of what it finds.

    Attributes:
        name: of the weights.
        class_names: None if the weights do not say them.
        unexplained: why there are no heat maps and origins; None where there are.
    """

    def __init__(self, predictor: Predictor | OnnxPredictor, name: str):
        """
        Args:
            predictor: for arrays in BGR.
        """
        self.predictor, self.name = predictor, name
        self.unexplained = None
        if isinstance(predictor, OnnxPredictor):
            self.class_names = predictor.class_names
            self.unexplained = (
                "An ONNX file has no heat maps and no origins of detections. They are in the "
                "checkpoint that it was exported from."
            )
        else:
            self.class_names = predictor.metadata.get("thing_classes", None)
            if not isinstance(predictor.model, FCOS):
                kind = type(predictor.model).__name__
                self.unexplained = f"Heat maps and origins are those of an FCOS, not of a {kind}."
        self._metadata = Metadata(name=name, thing_classes=self.class_names or [])

    def look(self, file: str) -> Found:
        """Detect in an image file.

        Raises:
            ValueError: a sentence, for a file that is no image, or not one for this detector.
        """
        name = Path(file).name
        image = _read(file, name)
        try:
            if self.unexplained:
                return Found(image, self._detect(image), None)
            inspection = inspect_image(self.predictor, image)
        except ValueError as error:
            raise ValueError(f"Nothing can be detected in {name}: {error}") from error
        return Found(image, inspection.detections, inspection)

    def kept(self, instances: Instances, threshold: float, classes: Sequence[str]) -> Instances:
        """Those with at least this score and one of these classes, or any if none is named."""
        kept = instances.scores >= threshold
        if classes:
            numbers = [i for i, name in enumerate(self.class_names) if name in classes]
            kept &= torch.isin(instances.pred_classes, torch.tensor(numbers, dtype=torch.int64))
        return instances[kept]

    def picture(self, found: Found, threshold: float, classes: Sequence[str]) -> np.ndarray:
        """(H, W, 3) uint8, BGR: the image, smaller or larger, with its detections."""
        shown = self.kept(found.instances, threshold, classes)
        return draw_instances(found.image, shown, self._metadata, scale=found.scale)

    def frame(self, image: np.ndarray, threshold: float, classes: Sequence[str]) -> np.ndarray:
        """:meth:`picture` of an image, (H, W, 3) uint8, BGR."""
        return self.picture(Found(image, self._detect(image), None), threshold, classes)

    def video(self, file: str, threshold: float, classes: Sequence[str]) -> Iterator[np.ndarray]:
        """The :meth:`picture` of each frame.

        Raises:
            ValueError: a sentence, for a file without frames.
        """
        capture, frames = cv2.VideoCapture(file), 0
        while (frame := capture.read()[1]) is not None:
            yield self.frame(frame, threshold, classes)
            frames += 1
        if not frames:
            raise ValueError(f"{Path(file).name} is not a video that OpenCV can read.")

    def heat_maps(self, found: Found) -> list[np.ndarray]:
        """Of classes, and of quality if there is any, as pictures (h, w, 3) uint8, RGB."""
        figures = [class_figure(found.inspection)]
        if self.has_quality:
            kind = self.predictor.model.post_processor.quality
            figures.append(quality_figure(found.inspection, kind))
        return [_pixels(figure) for figure in figures]

    @property
    def has_quality(self) -> bool:
        return self.predictor.model.post_processor.quality not in WITHOUT_FACTOR

    def origin(
        self, found: Found, x: float, y: float, threshold: float, classes: Sequence[str]
    ) -> np.ndarray | None:
        """Where the smallest detection around a pixel of the picture comes from, as a picture.

        None if there is no detection.
        """
        shown = self.kept(found.instances, threshold, classes)
        corners, point = shown.pred_boxes.tensor, torch.tensor([x, y]) / found.scale
        around = ((corners[:, :2] <= point) & (point <= corners[:, 2:])).all(dim=1)
        if not around.any():
            return None
        areas = shown.pred_boxes.area().where(around, torch.inf)
        one = shown[int(areas.argmin())]
        figure = origins_figure(replace(found.inspection, detections=one), threshold=0)
        title = f"score {float(one.scores):.2f}, of class {float(one.class_probability):.2f}"
        if self.has_quality:
            title += f" and quality {float(one.quality):.2f}"
        figure.axes[0].set_title(title)
        return _pixels(figure)

    def _detect(self, image: np.ndarray) -> Instances:
        found = self.predictor(image)["instances"]
        return found.to("cpu") if isinstance(found, Instances) else to_instances(found)


def _read(file: str, name: str) -> np.ndarray:
    """(H, W, 3) uint8, BGR. Whatever is wrong with the file is a ValueError."""
    try:
        height, width = image_size(file)
        if height * width <= _MAX_PIXELS:
            return read_image(file, "BGR")
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that can be read.") from error
    except Exception as error:  # PIL raises many kinds
        raise ValueError(f"{name} cannot be read: {str(error).replace(file, name)}") from error
    raise ValueError(
        f"{name} has {width} x {height} pixels, and this page takes up to "
        f"{_MAX_PIXELS // 10**6} million. Make it smaller."
    )


def _pixels(figure: Figure) -> np.ndarray:
    """(h, w, 3) uint8, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]
