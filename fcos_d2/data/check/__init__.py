"""What is wrong with a data set, said before training: see tools/check_dataset.py.

Reading makes :class:`RawData` of any format; ``check_annotations`` and ``check_sets`` need no
pixels, ``check_images`` and ``check_same_images`` do.
"""

from ..coco import cleaned, read_coco
from ..custom import read_entry
from ..findings import KINDS, Finding, count, table
from ..raw_data import RawData
from ..voc import read_voc
from ..yolo import read_yolo
from .annotations import check_annotations, check_sets, summary, to_records
from .images import check_images, check_same_images
from .registered import read_records, read_registered

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
