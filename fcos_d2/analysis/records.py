"""Loads image sizes and boxes from a registered data set, or from a file in COCO's format."""

import json
import logging
from collections.abc import Iterable
from os import PathLike

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from ..data import register_custom_datasets


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


def load_coco_json(path: str | PathLike) -> list[dict]:
    """The records of an annotation file in COCO's format, without images or masks.

    They differ from those of Detectron2's loader in two ways: annotations whose polygons are all
    invalid are kept, since they have a box, and classes keep the numbers of the file.

    Raises:
        ValueError: if the file is not JSON, or lacks something that the format requires.
    """
    with open(path, encoding="utf-8") as file:
        try:
            data = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error
    for key in ("images", "annotations"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise ValueError(f"{path} is not a COCO annotation file: it has no list {key!r}")
    records = {}
    for image in _checked(path, "images", data["images"], ("id", "height", "width")):
        records[image["id"]] = {
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [],
        }
    required = ("image_id", "category_id", "bbox")
    annotations_without_image = 0
    for annotation in _checked(path, "annotations", data["annotations"], required):
        if annotation["image_id"] not in records:
            annotations_without_image += 1
            continue
        records[annotation["image_id"]]["annotations"].append(
            {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": annotation["category_id"],
                "iscrowd": annotation.get("iscrowd", 0),
            }
        )
    if annotations_without_image:
        logging.getLogger(__name__).warning(
            f"{path}: left out {annotations_without_image} annotation(s) of images that the file "
            "does not list"
        )
    return list(records.values())


def _checked(path, name: str, entries: list, keys: Iterable[str]) -> list[dict]:
    for i, entry in enumerate(entries):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(
                f"{path} is not a COCO annotation file: {name}[{i}] has no {', '.join(missing)}"
            )
    return entries
