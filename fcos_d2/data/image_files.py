"""Reading image files."""

import os

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# The values of EXIF's orientation that swap height and width.
_TURNED = (5, 6, 7, 8)


def images_in(folder: str | os.PathLike) -> list[str]:
    """The paths of the images in a folder, by name."""
    names = sorted(n for n in os.listdir(folder) if n.lower().endswith(IMAGE_SUFFIXES))
    return [os.path.join(folder, name) for name in names]


def read_image(file: str, format: str) -> np.ndarray:
    """Detectron2's ``read_image``, which turns by EXIF; but images of more than 8 bits are errors.

    Args:
        format: "BGR", "RGB" or one of PIL's modes.

    Returns:
        (H, W, C) uint8.

    Raises:
        ValueError: for more than 8 bits a channel.
        OSError: for a file that cannot be read.
    """
    check_depth(file)
    return detection_utils.read_image(file, format=format)


def check_depth(file: str) -> None:
    """Raise a ValueError for a grey image of 16 or 32 bits, which PIL would turn to white.

    Only the header is read. Colour images of 16 bits are scaled to 8 bits by PIL itself.
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

    Only the header is read.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for one that is larger than PIL's limit.
    """
    try:
        with PathManager.open(file, "rb") as f, Image.open(f) as image:
            # Of the base class: that of PNG files would read the pixels.
            turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
            return (image.size if turn in _TURNED else image.size[::-1]), turn
    except Image.DecompressionBombError as error:
        raise ValueError(f"The image {file} is too large: {error}") from error
    except SyntaxError as error:  # PIL's, for some broken headers
        raise OSError(f"The image {file} cannot be read: {error}") from error
