"""Reads data sets as they are: what a loader refuses or drops becomes a finding."""

import os
from collections.abc import Sequence
from dataclasses import replace

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..coco import check_box, check_entry, parse_coco_json
from ..custom import is_in_part, register_custom_datasets, resolved_path
from ..image_files import image_size
from ..voc import (
    annotation_file,
    find_image_files,
    image_size_of,
    parse_object,
    parse_xml,
    split_names,
)
from ..yolo import parse_line
from ..yolo_files import image_files, label_file, label_lines, read_data_yaml
from .findings import Finding, RawData


def read_registered(cfg: CfgNode, name: str) -> RawData:
    """A data set of DATASETS.CUSTOM, or one that is registered with Detectron2.

    Raises:
        OSError, ValueError: for an unknown name, and what cannot be read at all.
    """
    if name in cfg.DATASETS.CUSTOM:
        return read_entry(name, cfg.DATASETS.CUSTOM[name])
    register_custom_datasets(cfg)
    if name not in DatasetCatalog:
        raise ValueError(f"No data set {name!r} is registered: {sorted(DatasetCatalog.list())}")
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file") and metadata.get("image_root"):
        return read_coco(name, metadata.json_file, metadata.image_root)
    if metadata.get("evaluator_type") == "pascal_voc":
        return read_voc(name, metadata.dirname, metadata.split, metadata.thing_classes)
    return read_records(name, DatasetCatalog.get(name), metadata.get("thing_classes", ()))


def read_entry(name: str, entry: dict) -> RawData:
    """An entry of DATASETS.CUSTOM. For errors see :func:`read_registered`."""
    if entry["FORMAT"] == "coco":
        data = read_coco(name, resolved_path(entry["JSON"]), resolved_path(entry["IMAGES"]))
    elif entry["FORMAT"] == "voc":
        root, split = resolved_path(entry["ROOT"]), str(entry["SPLIT"])
        data = read_voc(name, root, split, entry["CLASSES"])
    else:
        data = read_yolo(name, resolved_path(entry["DATA"]), str(entry["SPLIT"]))
    if "PART" in entry:
        _keep_part(data, entry["PART"])
    return data


def _keep_part(data: RawData, part: str) -> None:
    left_out = {i["id"] for i in data.images if not is_in_part(i["file_name"], part)}
    data.images = [image for image in data.images if image["id"] not in left_out]
    kept = [i for i, a in enumerate(data.annotations) if a["image_id"] not in left_out]
    index = {old: new for new, old in enumerate(kept)}
    data.annotations = [data.annotations[i] for i in kept]
    data.places = [data.places[i] for i in kept]
    data.findings = [
        f if f.index is None else replace(f, index=index[f.index])
        for f in data.findings
        if f.image not in left_out and (f.index is None or f.index in index)
    ]


def read_coco(name: str, json_file: str, image_root: str) -> RawData:
    """A COCO annotation file."""
    content = parse_coco_json(json_file)
    data = RawData(name, image_root)
    wanted = {"categories": ("id", "name"), "images": ("id", "file_name", "height", "width")}
    for key, kept in (("categories", data.categories), ("images", data.images)):
        seen = set()
        for i, entry in enumerate(content[key]):
            try:
                check_entry(json_file, key, i, entry, wanted[key])
                if not isinstance(entry[wanted[key][1]], str):
                    raise ValueError(f"{key}[{i}] has a {wanted[key][1]} that is no text")
            except ValueError as error:
                data.findings.append(_broken(json_file, error))
                continue
            if entry["id"] in seen:
                text = f"{key}[{i}] has the id {entry['id']!r} of another one"
                data.findings.append(Finding("id twice", json_file, text))
            else:
                seen.add(entry["id"])
                kept.append(entry)
    ids = set()
    for i, annotation in enumerate(content["annotations"]):
        try:
            check_entry(
                json_file, "annotations", i, annotation, ("image_id", "category_id", "bbox")
            )
            check_box(json_file, annotation, i)
        except ValueError as error:
            number = annotation.get("id") if isinstance(annotation, dict) else None
            data.findings.append(_broken(json_file, error, annotation=number))
            continue
        number = annotation.get("id")
        number = number if isinstance(number, int | str) else f"annotations[{i}]"
        data.add(annotation, json_file, number)
        if number in ids:
            text = f"annotations[{i}] has the id of another one"
            data.findings.append(data.finding("annotation id twice", len(data.places) - 1, text))
        ids.add(number)
    return data


def read_voc(name: str, root: str, split: str, classes: Sequence[str] | None = None) -> RawData:
    """A split in VOC layout; without ``classes`` they are all names of it, sorted."""
    data = RawData(name, os.path.join(root, "JPEGImages"))
    found, numbers = find_image_files(root), {}
    objects = []
    for image in dict.fromkeys(split_names(root, split)):
        try:
            xml_file, image_file, tree = parse_xml(root, image, found)
            height, width = image_size_of(xml_file, tree, image_file)
        except (OSError, ValueError) as error:
            data.findings.append(_broken(annotation_file(root, image), error, image))
            continue
        file_name = os.path.relpath(image_file, data.image_root)
        data.images.append({"id": image, "file_name": file_name, "height": height, "width": width})
        objects += [(image, xml_file, i, x) for i, x in enumerate(tree.findall("object"))]
    if classes is None:
        classes = sorted({x.findtext("name") or "" for *_, x in objects})
    data.categories = [{"id": i + 1, "name": str(c)} for i, c in enumerate(classes)]
    numbers = {c: i + 1 for i, c in enumerate(classes)}
    for image, xml_file, i, element in objects:
        place = f"object {i + 1}"
        category = element.findtext("name")
        try:
            _, (x0, y0, x1, y1) = parse_object(xml_file, i, element, [category])
        except ValueError as error:
            data.findings.append(_broken(xml_file, error, image, place))
            continue
        # An unknown name is a category that is not listed.
        box = {"category_id": numbers.get(category, category), "bbox": _voc_box(x0, y0, x1, y1)}
        data.add({"image_id": image} | box, xml_file, place)
    return data


def read_yolo(name: str, yaml_file: str, split: str) -> RawData:
    """A split in YOLO layout."""
    described = read_data_yaml(yaml_file)
    data = RawData(name, described.folders[-1])
    data.categories = [{"id": i + 1, "name": c} for i, c in enumerate(described.classes)]
    first_file, labelled = "", False
    missing: list[str] = []
    for image_file in image_files(described, split, missing):
        image = os.path.relpath(image_file, data.image_root)
        try:
            height, width = image_size(image_file)
        except (OSError, ValueError) as error:
            data.findings.append(Finding("unreadable image", image_file, str(error), image))
            continue
        data.images.append({"id": image, "file_name": image, "height": height, "width": width})
        file = label_file(described, image_file)
        first_file = first_file or file
        labelled = labelled or os.path.exists(file)
        try:
            for number, line in label_lines(file):
                _add_line(data, described.classes, image, file, number, line)
        except (OSError, ValueError) as error:  # no text
            data.findings.append(_broken(file, error, image))
    data.findings += [Finding("no image", described.file, text) for text in missing]
    if first_file and not labelled:
        text = f"no image of {split} has a label file. The first would be {first_file}"
        data.findings.append(Finding("broken entry", described.file, text))
    return data


def _add_line(
    data: RawData, classes: Sequence[str], image: str, file: str, number: int, line: str
) -> None:
    place, size = f"line {number}", data.images[-1]
    try:
        parsed = parse_line(f"{file}, {place}", line, classes, size["height"], size["width"])
    except ValueError as error:
        data.findings.append(_broken(file, error, image, place))
        return
    x0, y0, x1, y1 = parsed["bbox"]
    annotation = {"image_id": image, "category_id": parsed["category_id"] + 1}
    annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    if "segmentation" in parsed:
        annotation["segmentation"] = parsed["segmentation"]
    data.add(annotation, file, place)


def read_records(name: str, records: Sequence[dict], classes: Sequence[str]) -> RawData:
    """Records in Detectron2's format, of a data set that is registered in Python."""
    data = RawData(name, "")
    data.categories = [{"id": i + 1, "name": str(c)} for i, c in enumerate(classes)]
    for i, record in enumerate(records):
        file = record["file_name"]
        try:
            if "height" in record and "width" in record:
                height, width = record["height"], record["width"]
            else:
                height, width = image_size(file)
        except (OSError, ValueError) as error:
            data.findings.append(Finding("unreadable image", file, str(error), i))
            continue
        data.images.append({"id": i, "file_name": file, "height": height, "width": width})
        for j, annotation in enumerate(record.get("annotations", ())):
            bbox = [float(x) for x in annotation["bbox"]]
            if annotation["bbox_mode"] != BoxMode.XYWH_ABS:
                bbox = BoxMode.convert(bbox, annotation["bbox_mode"], BoxMode.XYWH_ABS)
            category = annotation["category_id"] + 1
            crowd = annotation.get("iscrowd", 0)
            box = {"image_id": i, "category_id": category, "bbox": list(bbox), "iscrowd": crowd}
            data.add(box, file, f"annotation {j}")
    return data


def _voc_box(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    # Corners are pixel numbers from 1. The loader drops boxes whose corners are the same.
    width, height = (b - a + (b > a) for a, b in ((x0, x1), (y0, y1)))
    return [x0 - 1, y0 - 1, width, height]


def _broken(file: str, error: Exception, image=None, annotation=None) -> Finding:
    text = str(error).removeprefix(file).lstrip(":, ")
    return Finding("broken entry", file, text[:500], image, annotation)
