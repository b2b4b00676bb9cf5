"""Loads image sizes and boxes from a registered data set, or from a file in COCO's format."""

from os import PathLike

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from ..data import register_custom_datasets
from ..data.coco import read_coco_json


def load_dataset(cfg: CfgNode, name: str) -> list[dict]:
    """The records of a data set that is registered with Detectron2 or in DATASETS.CUSTOM.

    Raises:
        ValueError: if no data set has this name, with a list of the registered ones.
    """
    register_custom_datasets(cfg)
    if name not in DatasetCatalog:
        names = sorted(DatasetCatalog)
        raise ValueError(f"No data set {name!r} is registered. The registered ones are: {names}")
    return DatasetCatalog.get(name)


def find_record(records: list[dict], image_id: str) -> dict:
    """The record of a data set with an ``image_id``, which may be a number or text.

    Raises:
        ValueError: if there is none, with the first ones that there are.
    """
    for record in records:
        if str(record.get("image_id")) == image_id:
            return record
    known = [record.get("image_id") for record in records[:5]]
    raise ValueError(
        f"The data set has no image with the image_id {image_id!r}. The first ones of its "
        f"{len(records)} images are: {known}"
    )


def load_coco_json(path: str | PathLike) -> list[dict]:
    """The records of an annotation file in COCO's format, without images or masks.

    They differ from those of Detectron2's loader in two ways: annotations whose polygons are all
    invalid are kept, since they have a box, and classes keep the numbers of the file.

    Raises:
        ValueError: if the file is not JSON, or lacks something that the format requires; see
            :func:`fcos_d2.data.coco.read_coco_json`.
    """
    data, _ = read_coco_json(path, image_keys=("id", "height", "width"), has_categories=False)
    records = {
        image["id"]: {
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [],
        }
        for image in data["images"]
    }
    for annotation in data["annotations"]:
        records[annotation["image_id"]]["annotations"].append(
            {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": annotation["category_id"],
                "iscrowd": annotation["iscrowd"],
            }
        )
    return list(records.values())
