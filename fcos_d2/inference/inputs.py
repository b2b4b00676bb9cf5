"""What a prediction reads: image files, a video, or a camera."""

import glob
import os
from collections.abc import Iterator, Sequence

import numpy as np

from ..data.image_files import IMAGE_SUFFIXES, images_in, read_image
from .background import in_background

_VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
_READERS = 4  # threads


def find_source(names: Sequence[str]) -> tuple[list[str] | str | int, list[str]]:
    """Image files, a video, or the number of a camera; and the files of folders that are skipped.

    Raises:
        ValueError: if there is nothing of a name, and for a video beside others.
    """
    if len(names) == 1 and (video := _video(names[0])) is not None:
        return video, []
    files, skipped = [], []
    for name in names:
        found = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        if os.path.isdir(name):
            found = images_in(name)
            known = set(found)
            others = (os.path.join(name, x) for x in sorted(os.listdir(name)) if x[0] != ".")
            skipped += [x for x in others if os.path.isfile(x) and x not in known]
        elif os.path.isfile(name):  # also one whose name is a pattern
            found = [name]
        if not found:
            raise ValueError(
                f"There is no image at --input {name!r}. It takes files, folders with files that "
                f"end with {', '.join(IMAGE_SUFFIXES)}, patterns, a video or a camera's number"
            )
        if video := next(filter(_is_video, found), None):
            raise ValueError(f"--input takes one video alone, got {video} and others")
        files += found
    return list(dict.fromkeys(files)), skipped


def is_live(source: list[str] | str | int) -> bool:
    """Whether it is a camera or a stream, whose frames come in their own time and have no end."""
    return isinstance(source, int) or (isinstance(source, str) and "://" in source)


def _video(name: str) -> str | int | None:
    if os.path.isfile(name):
        return name if _is_video(name) else None
    if name.isdecimal() and not os.path.isdir(name):
        return int(name)
    return name if is_live(name) else None


def _is_video(name: str) -> bool:
    return name.lower().endswith(_VIDEO_SUFFIXES)


def read_images(
    files: Sequence[str], read: list[str], failed: list[str], ahead: int
) -> Iterator[np.ndarray]:
    """The images, BGR, of the files, which go into ``read`` or, with the reason, ``failed``.

    Args:
        ahead: images that threads read beforehand.
    """
    images = in_background(_image_or_error, files, ahead, _READERS)
    for file, image in zip(files, images, strict=True):
        if isinstance(image, Exception):
            failed.append(f"{file}: {image}")
        else:
            read.append(file)
            yield image


def _image_or_error(file: str) -> np.ndarray | Exception:
    try:
        return read_image(file, "BGR")
    except Exception as error:  # PIL raises many kinds
        return error
