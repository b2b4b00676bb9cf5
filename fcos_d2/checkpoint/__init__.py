from .atomic import AtomicCheckpointer
from .torchvision_backbone import convert_torchvision_resnet

__all__ = ["AtomicCheckpointer", "convert_torchvision_resnet"]
