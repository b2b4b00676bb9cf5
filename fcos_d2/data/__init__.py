from .classes import (
    category_ids,
    check_names_of_detector,
    check_num_classes,
    check_same_classes,
    class_names,
    with_class_names,
)
from .coco import load_coco_json
from .custom import find_record, load_dataset, register_custom_datasets
from .loading import check_test_sets
from .mapper import DatasetMapper
from .shapes import make_shapes_dataset
from .training_loader import TrainingLoader

__all__ = [
    "DatasetMapper",
    "TrainingLoader",
    "category_ids",
    "check_names_of_detector",
    "check_num_classes",
    "check_same_classes",
    "check_test_sets",
    "class_names",
    "find_record",
    "load_coco_json",
    "load_dataset",
    "make_shapes_dataset",
    "register_custom_datasets",
    "with_class_names",
]
