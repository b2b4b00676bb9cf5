"""The data sets of a config, and others that are registered with Detectron2, as they are."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..coco import read_coco
from ..custom import load_dataset, read_entry
from ..image_files import image_size
from ..raw_data import RawData
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
    return read_records(name, records, MetadataCatalog.get(name).get("thing_classes", ()))


def read_records(name: str, records: Sequence[dict], classes: Sequence[str]) -> RawData:
    """Records in Detectron2's format, of a data set that is registered in Python."""
    data = RawData(name, "", source=name)
    data.categories = [{"id": i + 1, "name": str(c)} for i, c in enumerate(classes)]
    for i, record in enumerate(records):
        file = record["file_name"]
        try:
            if "height" in record and "width" in record:
                height, width = record["height"], record["width"]
            else:
                height, width = image_size(file)
        except (OSError, ValueError) as error:
            data.refuse(error, "unreadable image", file=file, image=i)
            continue
        data.images.append({"id": i, "file_name": file, "height": height, "width": width})
        for j, annotation in enumerate(record.get("annotations", ())):
            bbox = [float(x) for x in annotation["bbox"]]
            if annotation["bbox_mode"] != BoxMode.XYWH_ABS:
                bbox = BoxMode.convert(bbox, annotation["bbox_mode"], BoxMode.XYWH_ABS)
            category, place = annotation["category_id"], f"annotation {j}"
            box = {"image_id": i, "category_id": category + 1, "bbox": list(bbox)}
            error = None
            if category not in range(len(classes)):
                error = ValueError(f"{file}: {place} has the class {category}, which is not listed")
            data.add(box | {"iscrowd": annotation.get("iscrowd", 0)}, file, place, error)
    return data
