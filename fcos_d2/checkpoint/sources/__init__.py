"""The implementations whose checkpoints can be converted, one file each."""

from .adelaidet import ADELAIDET
from .detectron2 import DETECTRON2
from .mmdet import MMDET
from .original_fcos import ORIGINAL_FCOS
from .source import Source
from .torchvision import TORCHVISION

SOURCES: dict[str, Source] = {
    "adelaidet": ADELAIDET,
    "fcos": ORIGINAL_FCOS,
    "detectron2": DETECTRON2,
    "torchvision": TORCHVISION,
    "mmdet": MMDET,
}

__all__ = ["SOURCES", "Source"]
