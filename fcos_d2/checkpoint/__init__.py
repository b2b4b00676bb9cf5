from .atomic import AtomicCheckpointer, replacing
from .convert import convert
from .sources import SOURCES
from .sources.files import read_checkpoint
from .torchvision_backbone import convert_torchvision_resnet

__all__ = [
    "SOURCES",
    "AtomicCheckpointer",
    "convert",
    "convert_torchvision_resnet",
    "read_checkpoint",
    "replacing",
]
