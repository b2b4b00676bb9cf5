"""A page on a run: how good it is, where it fails, and which score threshold to take."""

from .errors import confusion_matrix, find_errors
from .evaluation import BoxEvaluation
from .writing import report_after_training, write_report

__all__ = [
    "BoxEvaluation",
    "confusion_matrix",
    "find_errors",
    "report_after_training",
    "write_report",
]
