"""Checks of images before they enter a network."""

import torch
from torch import Tensor

from ..runtime import to_device


def checked_images(batched_inputs: list[dict], device: torch.device) -> list[dict]:
    """The images of a batch, checked and on the device, without waiting for a GPU.

    Raises:
        ValueError: for an image on CPU with NaN or infinite pixels.
    """
    if torch.jit.is_tracing():  # a trace cannot raise, and must not contain the device
        return batched_inputs
    for i, x in enumerate(batched_inputs):
        if x["image"].device.type == "cpu":
            check_finite(x["image"], x.get("file_name", f"number {i} of the batch"))
    return [{"image": to_device(x["image"], device)} for x in batched_inputs]


def check_finite(image: Tensor, name: str) -> None:
    """Raise a ValueError that names the image if it has NaN or infinite pixels.

    Args:
        image: of any shape and type. On a GPU the check waits for it.
        name: such as "number 3 of the batch", or the name of a file.
    """
    if not image.is_floating_point():
        return
    # The sum takes a tenth of the time of isfinite on each element. It is not finite if an element
    # is not, but also if finite elements are too large; only then is each element looked at.
    if not image.sum(dtype=torch.float32).isfinite() and not image.isfinite().all():
        raise ValueError(f"The image {name} has NaN or infinite pixels")
