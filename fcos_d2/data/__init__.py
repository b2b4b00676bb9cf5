from .custom import check_num_classes, check_same_classes, register_custom_datasets
from .mapper import DatasetMapper
from .shapes import make_shapes_dataset

__all__ = [
    "DatasetMapper",
    "check_num_classes",
    "check_same_classes",
    "make_shapes_dataset",
    "register_custom_datasets",
]
