"""The detector, one stage a file, in the order of the data flow."""

from .assignment import (
    Assigner,
    ATSSAssigner,
    LocationAssigner,
    SimOTAAssigner,
    TaskAlignedAssigner,
)
from .assignment.candidates import Candidates, Positives, Targets
from .backbone import (
    TimmBackbone,
    build_fcos_resnet_bifpn_backbone,
    build_fcos_resnet_fpn_backbone,
    build_fcos_timm_fpn_backbone,
    build_fcos_timm_hrfpn_backbone,
)
from .bifpn import BiFPN
from .fcos import FCOS
from .head import FCOSHead, HeadOutputs
from .hrfpn import HRFPN
from .losses import FCOSLoss
from .points import Levels
from .post_processing import FCOSPostProcessor
from .proposal_generator import FCOSProposalGenerator
from .task_aligned_head import TaskAlignedHead
from .test_time_augmentation import FCOSWithTTA

__all__ = [
    "FCOS",
    "HRFPN",
    "ATSSAssigner",
    "Assigner",
    "BiFPN",
    "Candidates",
    "FCOSHead",
    "FCOSLoss",
    "FCOSPostProcessor",
    "FCOSProposalGenerator",
    "FCOSWithTTA",
    "HeadOutputs",
    "Levels",
    "LocationAssigner",
    "Positives",
    "SimOTAAssigner",
    "Targets",
    "TaskAlignedAssigner",
    "TaskAlignedHead",
    "TimmBackbone",
    "build_fcos_resnet_bifpn_backbone",
    "build_fcos_resnet_fpn_backbone",
    "build_fcos_timm_fpn_backbone",
    "build_fcos_timm_hrfpn_backbone",
]
