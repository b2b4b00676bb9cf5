"""What is wrong with a data set, said before training: see tools/check_dataset.py.

Reading makes :class:`RawData` of any format; ``check_annotations`` and ``check_sets`` need no
pixels, ``check_images`` and ``check_same_images`` do.
"""

from .annotations import check_annotations, check_sets, cleaned, summary, to_records
from .findings import KINDS, Finding, RawData, count, table
from .images import check_images, check_same_images
from .reading import read_coco, read_entry, read_records, read_registered, read_voc, read_yolo

__all__ = [
    "KINDS",
    "Finding",
    "RawData",
    "check_annotations",
    "check_images",
    "check_same_images",
    "check_sets",
    "cleaned",
    "count",
    "read_coco",
    "read_entry",
    "read_records",
    "read_registered",
    "read_voc",
    "read_yolo",
    "summary",
    "table",
    "to_records",
]
