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

    Raises:
        OSError, ValueError: for an unknown name, and what cannot be read at all.
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
    for i, record in enumerate(records):
        file = record["file_name"]
        with data.refusing("unreadable image", file=file, image=i):
            known = "height" in record and "width" in record
            size = (record["height"], record["width"]) if known else image_size(file)
            data.add_image(i, file, size)
            for j, annotation in enumerate(record.get("annotations", ())):
                place = f"annotation {j}"
                try:
                    box = _coco_annotation(annotation, len(classes))
                    data.add({"image_id": i} | box, file, place)
                except ValueError as error:
                    data.refuse(error, file=file, image=i, annotation=place)
    return data


def _coco_annotation(annotation: dict, num_classes: int) -> dict:
    bbox, mode = [float(x) for x in annotation["bbox"]], annotation["bbox_mode"]
    if mode != BoxMode.XYWH_ABS:
        bbox = list(BoxMode.convert(bbox, mode, BoxMode.XYWH_ABS))
    category = annotation["category_id"]
    if category not in range(num_classes):
        raise UnknownCategory(f"has the class {category}, which is not listed")
    return {"category_id": category + 1, "bbox": bbox, "iscrowd": annotation.get("iscrowd", 0)}
