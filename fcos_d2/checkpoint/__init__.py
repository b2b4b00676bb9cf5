from .atomic import AtomicCheckpointer, is_intact
from .convert import convert
from .reading import read_checkpoint
from .sources import SOURCES
from .torchvision_backbone import convert_torchvision_resnet
from .writing import replacing

__all__ = [
    "SOURCES",
    "AtomicCheckpointer",
    "convert",
    "convert_torchvision_resnet",
    "is_intact",
    "read_checkpoint",
    "replacing",
]
