"""Reads the data sets of a config, and others that are registered with Detectron2."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..classes import classes_of
from ..coco import read_coco
from ..custom import load_dataset, read_entry
from ..image_files import image_size
from ..raw_data import RawData, UnknownCategory
from ..voc import read_voc


def read_registered(cfg: CfgNode, name: str) -> RawData:
    """A data set of DATASETS.CUSTOM, or one that is registered with Detectron2.

    An unknown name, and what cannot be read at all, is an OSError or a ValueError.
    """
    if name in cfg.DATASETS.CUSTOM:
        return read_entry(name, cfg.DATASETS.CUSTOM[name])
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        if metadata.get("json_file") and metadata.get("image_root"):
            return read_coco(name, metadata.json_file, metadata.image_root)
        if metadata.get("evaluator_type") == "pascal_voc":
            return read_voc(name, metadata.dirname, metadata.split, metadata.thing_classes)
    records = load_dataset(cfg, name)
    return read_records(name, records, classes_of(name) or ())


def read_records(name: str, records: Sequence[dict], classes: Sequence[str]) -> RawData:
    """Records in Detectron2's format, of a data set that is registered in Python."""
    data = RawData(name, "", source=name)
    data.categories = [{"id": i + 1, "name": str(c)} for i, c in enumerate(classes)]
    known = range(len(classes))
    for i, record in enumerate(records):
        file = record["file_name"]
        with data.refusing("unreadable image", file=file, image=i):
            has_size = "height" in record and "width" in record
            size = (record["height"], record["width"]) if has_size else image_size(file)
            data.add_image(i, file, size)
            for j, annotation in enumerate(record.get("annotations", ())):
                place = f"annotation {j}"
                try:
                    data.add(_coco_annotation(i, annotation, known), file, place)
                except ValueError as error:
                    data.refuse(error, file=file, image=i, annotation=place)
    return data


def _coco_annotation(image: int, annotation: dict, known: range) -> dict:
    bbox, category = annotation.get("bbox"), annotation["category_id"]
    try:
        x, y, width, height = map(float, bbox)
    except (TypeError, ValueError) as error:
        raise ValueError(f"has a bbox that is not four numbers: {bbox}") from error
    if annotation["bbox_mode"] == BoxMode.XYXY_ABS:
        width, height = width - x, height - y
    if category not in known:
        raise UnknownCategory(f"has the class {category}, which is not listed")
    return {
        "image_id": image,
        "category_id": category + 1,
        "bbox": [x, y, width, height],
        "iscrowd": annotation.get("iscrowd", 0),
    }
