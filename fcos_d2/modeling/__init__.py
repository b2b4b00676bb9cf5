"""The detector, one stage a file, in the order of the data flow."""

from .backbone import build_fcos_resnet_fpn_backbone
from .fcos import FCOS
from .head import FCOSHead
from .losses import FCOSLoss
from .post_processing import FCOSPostProcessor
from .target_assignment import LocationAssigner, Positives

__all__ = [
    "FCOS",
    "FCOSHead",
    "FCOSLoss",
    "FCOSPostProcessor",
    "LocationAssigner",
    "Positives",
    "build_fcos_resnet_fpn_backbone",
]
