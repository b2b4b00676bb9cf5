"""Writes the pictures of a prediction: image files, or a video."""

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from .results import common_folder


class ImageWriter:
    """Writes pictures under their files' paths, relative to the folder that all share.

    What cannot be written is an OSError.
    """

    def __init__(self, output: Path, files: Sequence[str]):
        self.output = output
        self.root = common_folder(files)

    def write(self, file: str, picture: np.ndarray) -> None:
        target = self.output / os.path.relpath(os.path.abspath(file), self.root)
        if target.resolve() == Path(file).resolve():
            raise OSError(f"The picture would be written over {file}: choose another --output")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.haveImageWriter(str(target)):
            raise OSError(
                f"OpenCV has no format for the picture {target}: give the file a name that ends as "
                "those of images do, or add --no-pictures"
            )
        if not cv2.imwrite(str(target), picture):
            raise OSError(f"OpenCV cannot write {target}")

    def close(self) -> None:
        pass


class VideoWriter:
    """Writes frames to a file that has the name of their source.

    What cannot be written is an OSError.
    """

    def __init__(self, output: Path, source: str | int, suffix: str = ".mp4", codec: str = "mp4v"):
        name = f"camera_{source}" if isinstance(source, int) else Path(source).stem
        self.file, self.codec = output / f"{name}{suffix}", codec
        capture = cv2.VideoCapture(source)
        self.frames_a_second = capture.get(cv2.CAP_PROP_FPS) or 25
        frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.total = frames if frames > 0 else None
        capture.release()
        if not isinstance(source, int) and self.file.resolve() == Path(source).resolve():
            raise OSError(f"The video would be written over {source}: choose another --output")
        self.writer = cv2.VideoWriter()  # opened when the size of the frames is known

    def write(self, number: int, picture: np.ndarray) -> None:
        if not self.writer.isOpened():
            height, width = picture.shape[:2]
            code = cv2.VideoWriter_fourcc(*self.codec)
            if not self.writer.open(str(self.file), code, self.frames_a_second, (width, height)):
                raise OSError(
                    f"OpenCV cannot write the video {self.file.name} of {width} x {height} pixels"
                )
        self.writer.write(picture)

    def close(self) -> None:
        self.writer.release()
