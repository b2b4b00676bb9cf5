"""The detector, one stage a file, in the order of the data flow."""

from .backbone import build_fcos_resnet_fpn_backbone
from .fcos import FCOS
from .head import FCOSHead
from .losses import FCOSLoss
from .post_processing import FCOSPostProcessor
from .proposal_generator import FCOS as FCOSProposalGenerator
from .target_assignment import LocationAssigner, Positives
from .test_time_augmentation import FCOSWithTTA

__all__ = [
    "FCOS",
    "FCOSHead",
    "FCOSLoss",
    "FCOSPostProcessor",
    "FCOSProposalGenerator",
    "FCOSWithTTA",
    "LocationAssigner",
    "Positives",
    "build_fcos_resnet_fpn_backbone",
]
