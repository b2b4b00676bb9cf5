"""What the papers say about FCOS beside AP: recall, ambiguous samples, parameters, FLOPs."""

from .assignment import analyze_assignment, analyze_boxes
from .model import (
    ModelStatistics,
    analyze_model,
    compare_with_retinanet,
    comparison_table,
    retinanet_cfg,
)
from .records import load_coco_json, load_dataset
from .statistics import AssignmentStatistics, BoxStatistics, LevelStatistics, SizeStatistics

__all__ = [
    "AssignmentStatistics",
    "BoxStatistics",
    "LevelStatistics",
    "ModelStatistics",
    "SizeStatistics",
    "analyze_assignment",
    "analyze_boxes",
    "analyze_model",
    "compare_with_retinanet",
    "comparison_table",
    "load_coco_json",
    "load_dataset",
    "retinanet_cfg",
]
