"""Augmentations that keys of INPUT add to Detectron2's. All of them are Detectron2's own."""

import math

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

_FLIPS = ("horizontal", "vertical", "both", "none")
_FORMATS = ("BGR", "RGB")


def check_augmentation(cfg: CfgNode) -> None:
    """Raise a ValueError for values in INPUT that no training image could be augmented with."""
    keys, lsj = cfg.INPUT, cfg.INPUT.LSJ
    if keys.RANDOM_FLIP not in _FLIPS:
        raise ValueError(
            f"INPUT.RANDOM_FLIP must be one of {list(_FLIPS)}, got {keys.RANDOM_FLIP!r}"
        )
    if not 0 <= keys.COLOR < 1:
        raise ValueError(
            f"INPUT.COLOR must be 0.0 (off) or a strength below 1, such as 0.3, got {keys.COLOR}"
        )
    if lsj.ENABLED:
        if not (0 < lsj.MIN_SCALE <= lsj.MAX_SCALE < math.inf and lsj.SIZE * lsj.MIN_SCALE >= 1):
            raise ValueError(
                "INPUT.LSJ needs 0 < MIN_SCALE <= MAX_SCALE, and a SIZE that is at least one pixel "
                f"at MIN_SCALE, got {dict(lsj)}. Its defaults are 0.1, 2.0 and 1024"
            )
        if keys.CROP.ENABLED:
            raise ValueError(
                "INPUT.LSJ and INPUT.CROP both cut a part out of each image. Set "
                "INPUT.CROP.ENABLED or INPUT.LSJ.ENABLED to False"
            )
    if keys.CROP.ENABLED:
        _check_crop(keys.CROP)
    used = {"LSJ.ENABLED": lsj.ENABLED, "COLOR": keys.COLOR, "ROTATE_90": keys.ROTATE_90}
    used = [f"INPUT.{key}" for key, value in used.items() if value]
    if used and keys.FORMAT not in _FORMATS:
        raise ValueError(
            f"{' and '.join(used)} need an INPUT.FORMAT of {list(_FORMATS)}, got "
            f"{keys.FORMAT!r}. Grey images can be read as BGR, too"
        )


def _check_crop(crop: CfgNode) -> None:
    size = list(crop.SIZE)
    shares = all(0 < x <= 1 for x in size)
    pixels = all(isinstance(x, int) and x >= 1 for x in size)
    right = {"relative": shares, "relative_range": shares, "absolute": pixels}
    right["absolute_range"] = pixels and size == sorted(size)
    if len(size) != 2 or not right.get(crop.TYPE):
        raise ValueError(
            "INPUT.CROP needs a SIZE of two numbers: for the TYPE 'relative' or 'relative_range' "
            "shares of height and width above 0 and up to 1, for 'absolute' whole numbers of "
            "pixels, for 'absolute_range' the least and the most pixels; got "
            f"{crop.TYPE!r} and {size}"
        )


def known_to_detectron2(cfg: CfgNode) -> CfgNode:
    """A copy of a config that Detectron2's mapper takes; :func:`with_added` adds the rest."""
    known = cfg.clone()
    known.defrost()
    if known.INPUT.RANDOM_FLIP == "both":
        known.INPUT.RANDOM_FLIP = "horizontal"
    return known


def with_added(
    cfg: CfgNode, augmentations: list[T.Augmentation | T.Transform]
) -> list[T.Augmentation | T.Transform]:
    """Detectron2's augmentations for the training, with those of our keys in INPUT.

    Large-scale jitter takes the place of the resize. Then come colours, before any padding, and
    rotations last, where images are smallest. At the defaults nothing changes.

    Args:
        cfg: for which :func:`check_augmentation` passes.
        augmentations: Detectron2's for :func:`known_to_detectron2`.
    """
    keys, lsj = cfg.INPUT, cfg.INPUT.LSJ
    resize = [isinstance(a, T.ResizeShortestEdge) for a in augmentations].index(True)
    sizes = augmentations[resize : resize + 1]
    if lsj.ENABLED:
        side = lsj.SIZE
        sizes = [
            T.ResizeScale(lsj.MIN_SCALE, lsj.MAX_SCALE, side, side),
            T.FixedSizeCrop((side, side)),
        ]
    if keys.COLOR:
        saturation = T.RandomSaturation if keys.FORMAT == "RGB" else _SaturationOfBGR
        kinds = T.RandomBrightness, T.RandomContrast, saturation
        sizes[1:1] = [kind(1 - keys.COLOR, 1 + keys.COLOR) for kind in kinds]
    turns = []
    if keys.RANDOM_FLIP == "both":
        turns.append(T.RandomFlip(horizontal=False, vertical=True))
    if keys.ROTATE_90:
        turns.append(T.RandomRotation([0, 90, 180, 270], sample_style="choice"))
    return [*augmentations[:resize], *sizes, *augmentations[resize + 1 :], *turns]


class _SaturationOfBGR(T.RandomSaturation):
    """Detectron2's takes the channels for red, green and blue, which weigh differently in grey."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return super().get_transform(image[:, :, ::-1])
