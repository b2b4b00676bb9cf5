"""What the papers say about FCOS beside AP: recall, ambiguous samples, FLOPs, pictures."""

from .assignment import analyze_assignment, analyze_boxes
from .inspection import Inspection, inspect_image
from .model import (
    ModelStatistics,
    analyze_model,
    compare_with_retinanet,
    comparison_table,
    retinanet_cfg,
)
from .positives import LocatedPositives, locate_positives
from .score_quality import ScoresAndIoUs, scores_and_ious
from .statistics import AssignmentStatistics, BoxStatistics, LevelStatistics, SizeStatistics

__all__ = [
    "AssignmentStatistics",
    "BoxStatistics",
    "Inspection",
    "LevelStatistics",
    "LocatedPositives",
    "ModelStatistics",
    "ScoresAndIoUs",
    "SizeStatistics",
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
