"""What is wrong with a data set, said before training: see fcos_d2/commands/check.py."""

from .annotations import (
    check_annotations,
    check_rare_classes,
    check_sets,
    summary,
    to_records,
)
from .images import check_images, check_same_images
from .registered import read_registered

__all__ = [
    "check_annotations",
    "check_images",
    "check_rare_classes",
    "check_same_images",
    "check_sets",
    "read_registered",
    "summary",
    "to_records",
]
