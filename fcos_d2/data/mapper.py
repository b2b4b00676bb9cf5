"""From the record of an image to the input of a model."""

from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper as DetectronMapper

from .augmentation import check_augmentation, known_to_detectron2, with_added
from .image_files import check_depth


class DatasetMapper(DetectronMapper):
    """Detectron2's mapper, but boxes, polygons and proposals are scaled as fractions.

    Detectron2 writes scaled coordinates into arrays of the type that the annotation has, which
    cuts off the fraction where all of them are whole numbers. And it reads images of 16 bits as
    white, which are refused here. Every error names the image.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Detectron2's arguments; for the training with the augmentations of our keys in INPUT.

        Raises:
            ValueError: for wrong values in INPUT.
        """
        if not is_train:
            return super().from_config(cfg, is_train)
        check_augmentation(cfg)
        arguments = super().from_config(known_to_detectron2(cfg), is_train)
        arguments["augmentations"] = with_added(cfg, arguments["augmentations"])
        # A mask that is cut needs another box, as with INPUT.CROP.
        arguments["recompute_boxes"] |= cfg.INPUT.LSJ.ENABLED and cfg.MODEL.MASK_ON
        return arguments

    def __call__(self, dataset_dict: dict) -> dict:
        file = dataset_dict["file_name"]
        try:
            check_depth(file)
            return super().__call__(with_float_coordinates(dataset_dict))
        except Exception as error:  # of many kinds: of PIL, of the annotations, of augmentations
            raise ValueError(
                f"The image {file} or its annotations cannot be used ({type(error).__name__}: "
                f"{error}). Repair it, or remove it from the data set"
            ) from error


def with_float_coordinates(record: dict) -> dict:
    """A copy of a record, in Detectron2's format, whose coordinates are floating point."""
    record = dict(record)
    if "annotations" in record:
        record["annotations"] = [dict(annotation) for annotation in record["annotations"]]
    for annotation in record.get("annotations", ()):
        annotation["bbox"] = [float(x) for x in annotation["bbox"]]
        polygons = annotation.get("segmentation")
        if isinstance(polygons, list):
            annotation["segmentation"] = [np.asarray(p, dtype=np.float64) for p in polygons]
    if "proposal_boxes" in record:
        record["proposal_boxes"] = np.asarray(record["proposal_boxes"], dtype=np.float64)
    return record
