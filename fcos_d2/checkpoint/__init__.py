from .atomic import AtomicCheckpointer, is_intact
from .reading import read_checkpoint
from .torchvision_backbone import convert_torchvision_resnet
from .writing import replacing

__all__ = [
    "AtomicCheckpointer",
    "convert_torchvision_resnet",
    "is_intact",
    "read_checkpoint",
    "replacing",
]
