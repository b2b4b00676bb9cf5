"""What the papers count besides AP: recall, ambiguous samples, FLOPs, pictures."""

from .assignment import AssignmentStatistics, analyze_assignment, analyze_boxes
from .inspection import inspect_image
from .model import analyze_model, compare_with_retinanet, comparison_table, retinanet_cfg
from .positives import locate_positives
from .score_quality import scores_and_ious

__all__ = [
    "AssignmentStatistics",
    "analyze_assignment",
    "analyze_boxes",
    "analyze_model",
    "compare_with_retinanet",
    "comparison_table",
    "inspect_image",
    "locate_positives",
    "retinanet_cfg",
    "scores_and_ious",
]
