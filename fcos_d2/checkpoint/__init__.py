from .atomic import AtomicCheckpointer, is_intact
from .reading import read_checkpoint
from .torchvision_backbone import convert_torchvision_resnet
from .writing import check_local, replacing

__all__ = [
    "AtomicCheckpointer",
    "check_local",
    "convert_torchvision_resnet",
    "is_intact",
    "read_checkpoint",
    "replacing",
]
