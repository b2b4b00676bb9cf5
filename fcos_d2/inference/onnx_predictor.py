"""Detections of images from a file of fcos_d2.export.to_onnx, and what all predictors share.

Needs onnxruntime, numpy and pillow. This module imports nothing of fcos_d2, so that it can be
copied to a machine that has neither PyTorch nor Detectron2, and be imported there by itself.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


@dataclass
class Detections:
    """Detections of an image, best first: the fields of Detectron2's Instances as arrays."""

    image_size: tuple[int, int]  # (height, width) of the image
    pred_boxes: np.ndarray  # (D, 4) float32, x0, y0, x1, y1 in pixels of the image
    scores: np.ndarray  # (D,) float32
    pred_classes: np.ndarray  # (D,) int64

    def __len__(self) -> int:
        return len(self.scores)


class ImagePredictor:
    """The call of a predictor, which its ``stream`` answers."""

    def __init__(self, batch_size: int, channels: str):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if channels not in ("BGR", "RGB"):
            raise ValueError(f"channels must be 'BGR' or 'RGB', got {channels!r}")
        self.batch_size, self.channels = batch_size, channels

    def __call__(self, images: np.ndarray | str | os.PathLike | Iterable) -> dict | list[dict]:
        """Detections of an image, or of each image of a list.

        Args:
            images: (H, W, 3) uint8 or floating point in [0, 255], a file, or a list of them.

        Returns:
            ``{"instances": detections}`` in pixels of the image; for a list a list of them.

        Raises:
            ValueError: for an array that is no image, and for a file of more than 8 bits a pixel.
            OSError: for a file that cannot be read.
        """
        if isinstance(images, np.ndarray | str | os.PathLike):
            return next(self.stream([images]))
        return list(self.stream(images))

    def stream(self, images: Iterable) -> Iterator[dict]:
        """Like the call with a list, but yields as it goes: ``images`` may be endless.

        If an image cannot be read, the detections of all before it come first.
        """
        raise NotImplementedError


class OnnxPredictor(ImagePredictor):
    """fcos_d2.Predictor in ONNX Runtime: the same results up to rounding, as :class:`Detections`.

    A file that was exported for uint8 takes no floating point.

    Attributes:
        class_names: of each class, or None if the file has none.
        category_ids: of each class in the data set, such as COCO's 1 to 90; if it has none, from 1.
        settings: the metadata of the file.
    """

    def __init__(
        self,
        file: str | os.PathLike,
        batch_size: int = 1,
        channels: str = "BGR",
        *,
        providers: Sequence[str] | None = None,
    ):
        """
        Args:
            file: of :func:`fcos_d2.export.to_onnx` or ``fcos export``.
            batch_size: how many images run together at most; they must follow one another and have
                one size once resized. More than 1 is for GPUs: on CPU it gains nothing.
            channels: of arrays: "BGR", as OpenCV reads them, or "RGB". Files know their own.
            providers: of ONNX Runtime, e.g. ``["CUDAExecutionProvider"]``. None for CPU.

        Raises:
            ImportError: without onnxruntime.
            OSError: if the file cannot be read.
            ValueError: for a batch size below 1, another order of channels, and for a file that
                is damaged, was not exported by fcos_d2, or with raw outputs.
        """
        super().__init__(batch_size, channels)
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("OnnxPredictor needs onnxruntime: pip install onnxruntime") from error
        content, providers = Path(file).read_bytes(), list(providers or ["CPUExecutionProvider"])
        try:
            self.session = onnxruntime.InferenceSession(content, providers=providers)
        except Exception as error:  # those of ONNX Runtime have no class in common
            raise ValueError(f"ONNX Runtime cannot load {file}: {error}") from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "fcos_d2_version" not in metadata:
            raise ValueError(f"{file} has no metadata of fcos_d2: export it with fcos_d2.export")
        self.settings = {k: json.loads(v) for k, v in metadata.items()}
        if self.settings["outputs"] != "detections":
            raise ValueError(f"{file} gives the maps of the head: export it without --raw")
        self.class_names = self.settings["class_names"]
        self.category_ids = self.settings.get("category_ids")  # files of earlier versions have none

    def stream(self, images: Iterable) -> Iterator[dict]:
        batch = []
        for index, image in enumerate(images):
            try:
                pixels, size = self.network_input(image, index)
            except Exception:
                yield from self._detect(batch)
                raise
            if batch and batch[0][0].shape != pixels.shape:
                yield from self._detect(batch)
                batch = []
            batch.append((pixels, size))
            if len(batch) == self.batch_size:
                yield from self._detect(batch)
                batch = []
        yield from self._detect(batch)

    def network_input(self, image, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """The network's pixels, (3, h, w), of an image, and its (height, width).

        Args:
            image: an array or a file, as in the call.
            index: the image's number, for errors.
        """
        channels = self.channels
        if isinstance(image, str | os.PathLike):
            image, channels = _read(image), "RGB"
        check_image(image, index)
        if image.dtype != np.uint8 and self.settings["input_type"] == "uint8":
            raise ValueError(
                f"Image {index} has pixels of {image.dtype}, but the file was exported for uint8. "
                "Export it with --input-type float32"
            )
        if channels != self.settings["channel_order"]:
            image = image[:, :, ::-1]
        size = image.shape[:2]
        height, width = _resized(size, self.settings["min_size"], self.settings["max_size"])
        if image.dtype == np.uint8:
            resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(resized)
        else:
            pixels = _interpolate(_interpolate(image, height, 0), width, 1)
        return pixels.transpose(2, 0, 1).astype(self.settings["input_type"]), size

    def _detect(self, batch: list[tuple[np.ndarray, tuple[int, int]]]) -> Iterator[dict]:
        if not batch:
            return
        images = np.stack([pixels for pixels, _ in batch])
        outputs = self.session.run(
            ["boxes", "scores", "classes", "num_detections"], {"images": images}
        )
        for (_, (height, width)), boxes, scores, classes, n in zip(batch, *outputs, strict=True):
            scale = np.array([width / images.shape[3], height / images.shape[2]] * 2, np.float32)
            boxes = (boxes[:n] * scale).clip(0, np.array([width, height] * 2, np.float32))
            kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
            found = boxes[kept], scores[kept], classes[kept]
            yield {"instances": Detections((height, width), *found)}


def _read(file: str | os.PathLike) -> np.ndarray:
    """(H, W, 3) uint8, RGB, turned as its EXIF says."""
    with Image.open(file) as image:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            raise ValueError(
                f"The image {file} has more than 8 bits a pixel (PIL's mode {image.mode!r}): "
                "convert it to 8 bits"
            )
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def check_image(image: np.ndarray, index: int) -> None:
    """Raise a ValueError for what is no image, or has NaN or infinite pixels."""
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3:
        got = f"shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"Image {index} must be an array of (H, W, 3), got {got}")
    floating = np.issubdtype(image.dtype, np.floating)
    if image.size == 0 or not (floating or image.dtype == np.uint8):
        raise ValueError(
            f"Image {index} must have pixels of uint8 or floating point, got {image.dtype} of "
            f"shape {image.shape}"
        )
    if floating and not np.isfinite(image).all():
        raise ValueError(f"The image number {index} has NaN or infinite pixels")


def _resized(size: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) by Detectron2's ResizeShortestEdge, which 0 switches off; at least 1."""
    if shortest == 0:
        return size
    scale = shortest / min(size)
    sides = [shortest if side == min(size) else side * scale for side in size]
    scale = min(longest / max(sides), 1)
    height, width = (max(int(side * scale + 0.5), 1) for side in sides)
    return height, width


def _interpolate(image: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Linear along an axis, as PyTorch does it for pixels that are not uint8."""
    old = image.shape[axis]
    at = ((np.arange(length) + 0.5) * (old / length) - 0.5).clip(0, old - 1)
    low = at.astype(np.int64)
    weight = (at - low).astype(np.result_type(image.dtype, np.float32))
    weight = weight.reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
    high = np.minimum(low + 1, old - 1)
    return np.take(image, low, axis) * (1 - weight) + np.take(image, high, axis) * weight
