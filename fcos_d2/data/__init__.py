from .custom import check_num_classes, register_custom_datasets
from .shapes import make_shapes_dataset

__all__ = ["check_num_classes", "make_shapes_dataset", "register_custom_datasets"]
