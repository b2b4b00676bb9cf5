from .custom import check_num_classes, check_same_classes, check_test_sets, register_custom_datasets
from .mapper import DatasetMapper
from .shapes import make_shapes_dataset
from .training_loader import TrainingLoader

__all__ = [
    "DatasetMapper",
    "TrainingLoader",
    "check_num_classes",
    "check_same_classes",
    "check_test_sets",
    "make_shapes_dataset",
    "register_custom_datasets",
]
