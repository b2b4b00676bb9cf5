"""Reading image files."""

import os
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# The values of EXIF's orientation that swap height and width.
_TURNED = (5, 6, 7, 8)


def images_in(folder: str | os.PathLike) -> list[str]:
    """The paths of the images in a folder, by name."""
    return [
        os.path.join(folder, name) for name in filter(is_image_name, sorted(os.listdir(folder)))
    ]


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image, and not a hidden file, as macOS leaves them."""
    return name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."


def missing_files(files: Sequence[str]) -> list[str]:
    """The files that are not there. Addresses such as "s3://..." are not looked at.

    Each folder is listed once: looking for one file after another takes long on a network.
    """
    there: set[str] = set()
    for folder in {os.path.dirname(file) for file in files}:
        with suppress(OSError), os.scandir(folder or ".") as entries:
            there.update(os.path.join(folder, e.name) for e in entries if e.is_file())
    # Some folders open their files without listing them, or under other spellings of their names.
    return [f for f in files if f not in there and "://" not in f and not os.path.isfile(f)]


def read_image(file: str, format: str) -> np.ndarray:
    """Detectron2's ``read_image``: (H, W, C) uint8, turned by EXIF; ``format`` is "BGR" or PIL's.

    For errors see :func:`check_depth`; a file that cannot be read is an OSError.
    """
    check_depth(file)
    return detection_utils.read_image(file, format=format)


def check_depth(file: str) -> None:
    """Raise a ValueError for a grey image of 16 or 32 bits, which PIL would turn to white.

    Reads the header alone. PIL scales colour images of 16 bits to 8.
    """
    with PathManager.open(file, "rb") as f, Image.open(f) as image:
        mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        raise ValueError(
            f"The image {file} has more than 8 bits a pixel (PIL's mode {mode!r}), of which only "
            "the lowest would be read. Convert it to 8 bits, for example with OpenCV: "
            "x = cv2.imread(file, cv2.IMREAD_UNCHANGED); cv2.imwrite(file, (x / 257).round())"
        )


def image_size(file: str) -> tuple[int, int]:
    """(height, width) of :func:`read_image`. For errors see :func:`size_and_orientation`."""
    return size_and_orientation(file)[0]


def size_and_orientation(file: str) -> tuple[tuple[int, int], int]:
    """(height, width) in pixels of :func:`read_image`, and EXIF's orientation; 1 is upright.

    Reads the header alone. It is an OSError if the file cannot be read, and a ValueError if the
    image is larger than PIL's limit.
    """
    try:
        with PathManager.open(file, "rb") as f, Image.open(f) as image:
            # The method of the base class: that of PNG files reads the pixels.
            turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
            return (image.size if turn in _TURNED else image.size[::-1]), turn
    except Image.DecompressionBombError as error:
        raise ValueError(f"The image {file} is too large: {error}") from error
    except SyntaxError as error:  # PIL's, for some broken headers
        raise OSError(f"The image {file} cannot be read: {error}") from error
