"""A small synthetic data set: coloured shapes on textured backgrounds.

The shapes are discs, squares and triangles of 16 to 100 pixels, rotated and overlapping. The images
have several sizes, and some are empty. Each class has its own range of hues, so that a small
detector learns to tell them apart in minutes, from random weights.
"""

import json
import math
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("disc", "square", "triangle")
_CORNERS = (64, 4, 3)
_HUES = (0, 60, 120)  # red, green, blue in OpenCV's half degrees
_IMAGE_SIZES = ((128, 160), (160, 128), (128, 128), (128, 176))  # height, width
_SPLITS = {"train": (600, 0), "val": (120, 1)}  # number of images, seed
_EMPTY_EVERY = 12


def make_shapes_dataset(folder: str | Path) -> None:
    """Write ``train`` and ``val`` as PNG files with ``train.json`` and ``val.json`` in COCO format.

    Takes seconds, and writes the same pixels and boxes each time. The folder is made if it is not
    there; files with these names are overwritten.
    """
    folder = Path(folder)
    for split, (num_images, seed) in _SPLITS.items():
        images_folder = folder / split
        images_folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        images, annotations = [], []
        for image_id in range(1, num_images + 1):
            pixels, shapes = _draw_image(rng, empty=image_id % _EMPTY_EVERY == 0)
            name = f"{image_id:04d}.png"
            cv2.imwrite(str(images_folder / name), pixels)
            height, width = pixels.shape[:2]
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
            for shape in shapes:
                ids = {"id": len(annotations) + 1, "image_id": image_id}
                box = shape["bbox"]
                rest = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                annotations.append(ids | {"category_id": shape["category"] + 1} | rest)
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        data = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(data))


def _draw_image(rng: np.random.Generator, empty: bool) -> tuple[np.ndarray, list[dict]]:
    """An image and its shapes, each mostly inside and mostly visible.

    A shape has its "category", its "bbox" [x, y, width, height], its "area" in pixels, and the
    number of these that are "visible" beneath the later ones.
    """
    height, width = _IMAGE_SIZES[rng.integers(len(_IMAGE_SIZES))]
    image = _texture(rng, height, width)
    top = np.full((height, width), -1)  # index of the topmost shape at each pixel
    shapes: list[dict] = []
    for _ in range(0 if empty else rng.integers(1, 7)):
        category = int(rng.integers(len(CLASSES)))
        size = math.exp(rng.uniform(math.log(16), math.log(100)))
        mask = _mask(rng, category, size, rng.uniform((0, 0), (width, height)), (height, width))
        area = int(mask.sum())
        visible = [s["visible"] - int((top[mask] == i).sum()) for i, s in enumerate(shapes)]
        hides_another = any(v < 0.6 * s["area"] for v, s in zip(visible, shapes, strict=True))
        corners = _CORNERS[category]  # of a regular polygon in a circle of this diameter
        whole_area = corners / 8 * size * size * math.sin(2 * math.pi / corners)
        if area < 0.6 * whole_area or hides_another:
            continue
        for shape, pixels in zip(shapes, visible, strict=True):
            shape["visible"] = pixels
        top[mask] = len(shapes)
        image[mask] = _color(rng, category)
        ys, xs = mask.nonzero()
        box = [float(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)]
        shapes.append({"category": category, "bbox": box, "area": area, "visible": area})
    image = image + rng.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8), shapes


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A smooth random background in faint colours, with stripes."""
    coarse = rng.uniform(60, 196, (4, 5, 1)) + rng.uniform(-25, 25, (4, 5, 3))
    image = cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[:height, :width]
    angle, period = rng.uniform(0, math.pi), rng.uniform(6, 24)
    stripes = np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period)
    return image + 14 * stripes[..., None]


def _mask(rng, category: int, size: float, center, shape: tuple[int, int]) -> np.ndarray:
    """Pixels of a shape inscribed in a circle of diameter ``size``, rotated at random."""
    corners = _CORNERS[category]
    angles = rng.uniform(0, 2 * math.pi) + np.arange(corners) * 2 * math.pi / corners
    points = center + size / 2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 1)
    return mask.astype(bool)


def _color(rng: np.random.Generator, category: int) -> np.ndarray:
    hue = (_HUES[category] + rng.uniform(-25, 25)) % 180
    hsv = np.array([[[hue, rng.uniform(150, 255), rng.uniform(110, 255)]]], np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0]
