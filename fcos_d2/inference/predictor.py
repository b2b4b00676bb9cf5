"""Detections of many images, in batches, equal to those of DefaultPredictor."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform
from detectron2.modeling import build_model

from ..checkpoint import AtomicCheckpointer
from ..data import category_ids, class_names
from ..data.image_files import IMAGE_SUFFIXES, images_in, read_image
from ..modeling.backbone import padded_size
from ..zoo import check_fits
from .background import in_background
from .batches import run_in_batches
from .onnx_predictor import ImagePredictor, check_image

# An image may wait for others of its size until this many full batches of images are held.
_BATCHES_HELD = 4


class Predictor(ImagePredictor):
    """Runs a detector on an image, a list, a directory or a video.

    Only images that the network sees at one size, padding included, run together: more padding
    would change the detections. So each image gets the detections of Detectron2's DefaultPredictor,
    up to rounding. Results come in the order of the images. ``metadata`` has the names and category
    ids of the classes, if the weights or the data sets say them, under Detectron2's names.
    """

    def __init__(self, cfg: CfgNode, batch_size: int = 8, channels: str = "BGR"):
        """
        Args:
            cfg: of any detector of Detectron2; loads ``MODEL.WEIGHTS``. Not changed.
            batch_size: the most images that run together.
            channels: the order in arrays: "BGR", as OpenCV reads them, or "RGB". Files and videos
                know their own. All are converted to ``INPUT.FORMAT``.

        Raises:
            ValueError: for a batch size below 1, another order of channels, and weights that do not
                fit or could run code.
        """
        super().__init__(batch_size, channels)
        check_fits(cfg)
        # Unlike DefaultPredictor, this does not run code from a .pkl file of weights.
        self.model = build_model(cfg.clone()).eval()
        checkpointer = AtomicCheckpointer(self.model)
        checkpointer.load(cfg.MODEL.WEIGHTS)
        if cfg.MODEL.WEIGHTS:
            checkpointer.check_complete()
        self.metadata = _metadata(cfg, checkpointer)
        self.resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        self.model_channels = cfg.INPUT.FORMAT

    def stream(self, images: Iterable) -> Iterator[dict]:
        return (detections for _, detections in self.pairs(images))

    def pairs(
        self, images: Iterable, channels: str | None = None, ahead: int = 0
    ) -> Iterator[tuple[Any, dict]]:
        """Each file or array of :meth:`stream` with its detections.

        A few batches of images are held at a time.

        Args:
            channels: of arrays, in place of the predictor's own.
            ahead: images that a thread reads and resizes while the network runs, for sources that
                are not live.
        """

        def with_input(numbered: tuple[int, Any]) -> tuple[Any, dict]:
            index, item = numbered
            if isinstance(item, str | os.PathLike):
                return item, self.model_input(read_image(os.fspath(item), "BGR"), "BGR", index)
            return item, self.model_input(item, channels or self.channels, index)

        inputs = in_background(with_input, enumerate(images), ahead)
        results = run_in_batches(
            inputs,
            kind_of=lambda pair: self._padded_size(pair[1]["image"]),
            run=torch.no_grad()(lambda pairs: self.model([x for _, x in pairs])),
            batch_size=self.batch_size,
            max_held=_BATCHES_HELD * self.batch_size,
        )
        return ((item, detections) for (item, _), detections in results)

    def directory(self, folder: str | os.PathLike) -> Iterator[tuple[str, dict]]:
        """File and detections of each image in a folder, by name.

        Raises:
            ValueError: at once, if there is none.
        """
        files = images_in(folder)
        if not files:
            raise ValueError(f"No image in {folder}: no file ends with {IMAGE_SUFFIXES}")
        return self.pairs(files)

    def video(
        self, source: str | os.PathLike | int | cv2.VideoCapture
    ) -> Iterator[tuple[np.ndarray, dict]]:
        """Each frame, (H, W, 3) BGR, of a file, camera or open capture, with its detections.

        Frames come out a batch at a time; a live camera needs a ``batch_size`` of 1.

        Raises:
            OSError: at once, if OpenCV cannot open it.
        """
        capture = source
        if not isinstance(source, cv2.VideoCapture):
            capture = cv2.VideoCapture(source if isinstance(source, int) else os.fspath(source))
        if not capture.isOpened():
            raise OSError(f"OpenCV cannot open the video {source}")
        return self.pairs(_frames(capture), "BGR")

    def model_input(self, image: np.ndarray, channels: str, index: int = 0) -> dict:
        """The model's input for an image, resized as by DefaultPredictor.

        Args:
            image: (H, W, 3), as in the call.
            channels: their order, "BGR" or "RGB".
            index: the image's number, for errors.
        """
        check_image(image, index)  # before resizing, which may lose the bad pixels of a large one
        if channels != self.model_channels:
            image = image[:, :, ::-1]
        height, width = image.shape[:2]
        resize = self.resize.get_transform(image)
        if isinstance(resize, ResizeTransform):  # a side of a long, thin image would get 0 pixels
            resize.new_h, resize.new_w = max(resize.new_h, 1), max(resize.new_w, 1)
        pixels = resize.apply_image(image)
        if pixels.dtype != np.uint8:
            pixels = pixels.astype("float32")
        pixels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return {"image": pixels, "height": height, "width": width}

    def _padded_size(self, image: torch.Tensor) -> tuple[int, int]:
        backbone = getattr(self.model, "backbone", None)
        height, width = image.shape[1:]
        return (height, width) if backbone is None else padded_size(backbone, height, width)


def _metadata(cfg: CfgNode, checkpointer: AtomicCheckpointer) -> Metadata:
    """Names and category ids of the classes: those of the weights, or else of the data sets."""
    names, ids = checkpointer.class_names, checkpointer.category_ids
    if names is None or (ids is None and names == class_names(cfg)):
        names, ids = class_names(cfg), category_ids(cfg)
    metadata = Metadata(name="detector")
    if names is not None:
        metadata.thing_classes = names
    if ids is not None:
        metadata.thing_dataset_id_to_contiguous_id = {id: i for i, id in enumerate(ids)}
    return metadata


def _frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while (frame := capture.read()[1]) is not None:
        yield frame
