"""A data set with every fault: each is found, at its place, and the cleaned copy has none."""

import json
import math

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from test_custom import write_voc
from test_yolo import write_yolo

from fcos_d2.config import get_cfg
from fcos_d2.data import check
from fcos_d2.data.coco import can_be_evaluated, cleaned, read_coco
from fcos_d2.data.custom import read_entry
from fcos_d2.data.findings import count
from fcos_d2.data.layouts import recognise
from fcos_d2.data.raw_data import RawData
from fcos_d2.data.voc import files_of_split, names_of_objects, read_voc
from fcos_d2.data.yolo import read_yolo

# Annotation 1 is good; the kinds of the others, in an image of 40 x 30 pixels.
BOXES = {
    1: ([2, 2, 10, 10], None),
    2: ([2, 2, 10, 0], "a box without area"),
    3: ([12, 2, -10, 5], "a negative width or height"),
    4: ([math.nan, 2, 10, 5], "NaN or infinity in the box"),
    5: ([2, 2, math.inf, 5], "NaN or infinity in the box"),
    6: ([50, 2, 10, 5], "box outside of the image"),
    7: ([-10, 2, 10, 5], "box outside of the image"),
    8: ([-1, 2, 400, 5], "box larger than the image"),
    9: ([35, 20, 10, 5], "box beyond the edge"),
    10: ([30.5, 20, 10, 10.5], None),  # half a pixel beyond the edge
    11: ([2, 2, 10, 10], "box twice"),
    12: ([2, 2, 10, 10.2], "box nearly twice"),  # IoU 1 / 1.02
}


def write_pixels(file, seed=0, size=(40, 30), **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, **options)


def broken_coco(folder):
    """The annotation file; its first image is there, and has the boxes above."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 30, "width": 40} for i in (1, 2, 2, 3)]
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, (box, _) in BOXES.items()
    ]
    box = [20, 2, 9, 9]
    annotations += [
        {"id": 20, "image_id": 1, "category_id": 7, "bbox": box},
        {"id": 21, "image_id": 9, "category_id": 1, "bbox": box},
        {"id": 22, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3]},
        {"id": 22, "image_id": 2, "category_id": 1, "bbox": box},
        {"id": 22, "image_id": 2, "category_id": 2, "bbox": box},
        {"id": 24, "image_id": 2, "category_id": 1, "bbox": [1, 1, 30, 20], "iscrowd": 1},
        {"id": 25, "category_id": 1, "bbox": box},
        {"id": [26], "image_id": 2, "category_id": 1, "bbox": [1, 1, 3, 3]},
        "not an annotation",
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}]
    content = {
        "images": [
            *images,
            {"id": 4, "file_name": 5, "height": 30, "width": 40},
            {"id": 5, "file_name": "5.png", "height": 10**400, "width": 40},
        ],
        "annotations": annotations,
        "categories": [*categories, {"id": 1, "name": "cat again"}],
    }
    file = folder / "train.json"
    file.write_text(json.dumps(content))
    return file


def found_in(data):
    return [*data.findings, *check.check_annotations(data)]


def test_faults_of_annotations(tmp_path):
    file = str(broken_coco(tmp_path))
    findings = found_in(read_coco("pets", file, str(tmp_path)))
    by_annotation = [(f.annotation, f.kind) for f in findings if f.annotation is not None]
    expected = [(i, kind) for i, (_, kind) in BOXES.items() if kind]
    expected += [
        (20, "unknown category"),
        (21, "annotation without image"),
        (22, "broken entry"),
        (22, "annotation id twice"),
        (22, "box twice, of two classes"),
        (24, "crowd"),
        (25, "broken entry"),
    ]
    assert sorted(by_annotation) == sorted(expected)
    assert all(f.file == file for f in findings if f.annotation is not None)
    others = [(f.kind, f.image) for f in findings if f.annotation is None]
    assert sorted(others, key=str) == sorted(
        [
            ("id twice", None),  # image 2
            ("id twice", None),  # category 1
            ("broken entry", None),  # image 4, whose file_name is no text
            ("broken entry", None),  # image 5, whose height is no size
            ("broken entry", None),  # the annotation that is text
            ("image without boxes", 3),
            ("class without boxes", None),  # cow
        ],
        key=str,
    )
    assert count(findings)["error"] == 7 + 4 + 5  # of boxes, other annotations, others


def slow_fault(box, size):
    """The definition, box by box."""
    (x, y, width, height), (right, bottom) = box, size
    if not all(map(math.isfinite, box)):
        return "NaN or infinity in the box"
    if width < 0 or height < 0:
        return "a negative width or height"
    if width == 0 or height == 0:
        return "a box without area"
    if x >= right or y >= bottom or x + width <= 0 or y + height <= 0:
        return "box outside of the image"
    if width > right + 1 or height > bottom + 1:
        return "box larger than the image"
    beyond = max(-x, -y, x + width - right, y + height - bottom)
    return "box beyond the edge" if beyond > 1 else None


def test_faults_of_many_boxes_are_those_found_one_by_one():
    rng = np.random.default_rng(0)
    data = RawData("random", "")
    data.categories = [{"id": i, "name": str(i)} for i in (1, 2)]
    sizes = {i: rng.integers(20, 60, 2).tolist() for i in range(9)}
    for i, (width, height) in sizes.items():
        data.add_image(i, f"{i}.png", (height, width))
    expected, twice, first = [], [], {}
    for index in range(2000):
        image, category = int(rng.integers(10)), int(rng.integers(1, 3))  # image 9 is not listed
        box = (rng.integers(-8, 70, 4) / rng.choice([1, 4])).tolist()
        if rng.random() < 0.1:
            box[rng.integers(4)] = rng.choice([math.nan, math.inf, -math.inf, 0.0, 1e308]).item()
        if index and rng.random() < 0.1:
            other = data.annotations[rng.integers(index)]
            image, box = other["image_id"], other["bbox"]
        data.add({"image_id": image, "category_id": category, "bbox": box}, "file", index)
        fault = slow_fault(box, sizes[image]) if image in sizes else "annotation without image"
        expected += [(fault, index)] if fault else []
        if fault in (None, "box beyond the edge"):
            other = first.setdefault((image, *box), (index, category))
            of_two = ", of two classes" * (other[1] != category)
            twice += [(f"box twice{of_two}", index)] if other[0] != index else []
    assert len({kind for kind, _ in expected}) == 7 and len(twice) > 5
    assert sorted((f.kind, f.index) for f in data.faulty_boxes()) == sorted(expected)
    findings = check.check_annotations(data, nearly_twice=False)
    found = [(f.kind, f.index) for f in findings if f.index is not None]
    assert sorted(found) == sorted(expected + twice)


def test_cleaned(tmp_path):
    file = broken_coco(tmp_path)
    data = read_coco("pets", str(file), str(tmp_path))
    clean = tmp_path / "clean.json"
    clean.write_text(json.dumps(cleaned(data, found_in(data))))
    # The loader need not repair it.
    again = read_coco("pets", str(clean), str(tmp_path))
    assert can_be_evaluated(again, again.dropped())
    content = json.loads(clean.read_text())
    boxes = {tuple(a["bbox"]) for a in content["annotations"] if a["image_id"] == 1}
    # Clipped is 9, from 35 to 40.
    assert boxes == {(2, 2, 10, 10), (2, 2, 10, 10.2), (30.5, 20, 10, 10.5), (35, 20, 5, 5)}
    assert count(found_in(again))["error"] == 0


def test_faults_of_images(tmp_path):
    write_pixels(tmp_path / "good.png")
    write_pixels(tmp_path / "GOOD.JPG", 1)
    write_pixels(tmp_path / "other size.png", 2, (30, 30))
    write_pixels(tmp_path / "cut.png", 3)
    write_pixels(tmp_path / "cut.jpg", 4)
    for name in ("cut.png", "cut.jpg"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("<html>404</html>")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("I;16", (40, 30)).save(tmp_path / "16 bits.png")
    exif = Image.Exif()
    for orientation, name in ((3, "upside down.jpg"), (6, "turned.jpg"), (3, "turned.tif")):
        exif[0x0112] = orientation
        write_pixels(tmp_path / name, 10 + len(name), exif=exif)
    write_pixels(tmp_path / "Käfer.bmp")  # the same pixels as good.png
    expected = {
        "good.png": [], "GOOD.JPG": [], "Käfer.bmp": [],
        "other size.png": ["other size than annotated"],
        "cut.png": ["truncated image"], "cut.jpg": ["truncated image"],
        "empty.png": ["unreadable image"], "text.png": ["unreadable image"],
        "folder.png": ["no image"], "link.png": ["no image"], "missing.png": ["no image"],
        "16 bits.png": ["more than 8 bits"],
        "upside down.jpg": ["turned by EXIF"],
        "turned.jpg": ["other size than annotated", "turned by EXIF"],
        "turned.tif": ["TIFF turned by EXIF"],
    }  # fmt: skip
    data = RawData("pets", str(tmp_path))
    data.images = [{"id": n, "file_name": n, "height": 30, "width": 40} for n in expected]
    findings, hashes = check.check_images(data)
    kinds = {name: [f.kind for f in findings if f.image == name] for name in expected}
    assert kinds == expected
    (turned,) = [f for f in findings if f.image == "turned.jpg" and "size" in f.kind]
    assert turned.text.endswith("which is its size before it is turned by EXIF")

    (twice,) = check.check_same_images({"train": hashes})
    assert (twice.kind, twice.file) == ("image twice", str(tmp_path / "Käfer.bmp"))
    good = str(tmp_path / "good.png")
    of_test = {"a copy.png": hashes[good], "another.png": b"other pixels"}
    leaks = check.check_same_images({"train": {good: hashes[good]}, "test": of_test})
    assert [(f.kind, f.file) for f in leaks] == [("image in two sets", "a copy.png")]

    kept = {image["id"] for image in cleaned(data, findings)["images"]}
    assert kept == {"good.png", "GOOD.JPG", "Käfer.bmp", "upside down.jpg"}


def test_voc(tmp_path):
    root = tmp_path / "pets"
    write_voc(root, [(1, 1, 10, 20), (5, 5, 5, 9), (5, 6, 60, 30), (9, 9, 3, 12), (1, 1, "x", 2)],
              ("cat", "dog", "dog", "dog", "dog"))  # fmt: skip
    (root / "Annotations" / "b.xml").write_text("<annotation>")
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\n")
    data = read_voc("pets", str(root), "train", ["dog", "cow"])
    findings = {(f.file.rpartition("/")[2], f.annotation): f.kind for f in found_in(data)}
    assert findings == {
        ("a.xml", "object 1"): "unknown category",
        ("a.xml", "object 2"): "a box without area",
        ("a.xml", "object 3"): "box larger than the image",
        ("a.xml", "object 4"): "a negative width or height",
        ("a.xml", "object 5"): "broken entry",
        ("b.xml", None): "broken entry",
        ("c.xml", None): "broken entry",
        ("pets", None): "class without boxes",
    }
    assert names_of_objects(files_of_split(str(root), "train")) == ["cat", "dog"]


def test_yolo(tmp_path):
    root = write_yolo(
        tmp_path, "0 0.5 0.5 0.5 0.5\n9 0 0 1 1\n0 0.5 0.5 0 0.5\n1 0.9 0.9 0.6 0.2\n"
    )
    (tmp_path / "images" / "train" / "c.png").write_text("not an image")
    (tmp_path / "labels" / "train" / "b.txt").write_bytes(b"\xff\xfe")
    data = read_yolo("pets", root, "train")
    findings = {(f.file.rpartition("/")[2], f.annotation): f.kind for f in found_in(data)}
    assert findings == {
        ("a.txt", "line 2"): "broken entry",
        ("a.txt", "line 3"): "a box without area",
        ("a.txt", "line 4"): "box beyond the edge",
        ("b.txt", None): "broken entry",
        ("c.png", None): "unreadable image",
        ("b.png", None): "image without boxes",
    }
    assert data.annotations[0]["bbox"] == [10, 7.5, 20, 15]


def test_yolo_without_label_files(tmp_path):
    root = write_yolo(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "elsewhere")
    kinds = {(f.kind, f.severity) for f in read_yolo("pets", root, "train").findings}
    assert kinds == {("broken entry", "error")}


def test_yolo_images_of_a_list_that_are_not_there(tmp_path):
    root = write_yolo(tmp_path, yaml="train: list.txt\nnames: [cat]")
    (tmp_path / "list.txt").write_text("gone.png\nimages/train/a.png\ngone too.png\n")
    data = read_yolo("pets", root, "train")
    assert [(f.kind, f.text.rpartition("/")[2]) for f in data.findings] == [
        ("no image", "list.txt, line 1: the image gone.png is not there"),
        ("no image", "list.txt, line 3: the image gone too.png is not there"),
    ]
    assert len(data.images) == 1 and len(cleaned(data, data.findings)["images"]) == 1


def test_data_registered_in_python(tmp_path):
    write_pixels(tmp_path / "a.png")
    box = {"bbox": [1, 1, 5, 1], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    DatasetCatalog.register(
        "in_python", lambda: [{"file_name": str(tmp_path / "a.png"), "annotations": [box]}]
    )
    MetadataCatalog.get("in_python").set(thing_classes=["cat"])
    try:
        data = check.read_registered(get_cfg(), "in_python")
    finally:
        DatasetCatalog.remove("in_python")
        MetadataCatalog.remove("in_python")
    assert [f.kind for f in found_in(data)] == ["a box without area"]
    assert check.check_images(data)[0] == []
    with pytest.raises(ValueError, match="No data set 'in_python' is registered"):
        check.read_registered(get_cfg(), "in_python")


def test_one_line_about_records():
    boxes = [[2, 2, 10, 10], [2, 2, 10, 10], [35, 20, 10, 5], [20, 2, 30, 12], [2, 2, 10, 10.2]]
    modes = [BoxMode.XYWH_ABS] * 3 + [BoxMode.XYXY_ABS, BoxMode.XYWH_ABS]
    annotations = [
        {"bbox": box, "bbox_mode": mode, "category_id": i % 2}
        for i, (box, mode) in enumerate(zip(boxes, modes, strict=True))
    ]
    record = {"file_name": "a.png", "height": 30, "width": 40, "annotations": annotations}
    without_size = {"file_name": "b.png", "annotations": annotations}
    line = check.summary("x", [record, without_size], ["a", "b"])
    assert line == (
        "x: 1 images, 5 boxes; box twice, of two classes (1), box beyond the edge (1): "
        "`fcos check` says where"
    )
    assert check.summary("x", [record], ["a"]).startswith("x: 1 images, 5 boxes; unknown category")
    fine = {**record, "annotations": annotations[:1]}
    assert check.summary("x", [fine], ()) == "x: 1 images, 1 boxes; their annotations are fine"


def test_rare_classes(tmp_path):
    """40 images with boxes: a in 36 of them, b in 4, c in 3, d in 1, e in none; one has no box.

    Less than a tenth of 36 are c and d. With t = 36 / 40 = 0.9, sqrt(t / (3 / 40)) = sqrt(12) =
    3.46 and sqrt(36) = 6.
    """
    of_class = {1: range(36), 2: range(36, 40), 3: range(10, 13), 4: [10]}
    categories = [{"id": i + 1, "name": name} for i, name in enumerate("abcde")]
    annotations = [
        {"image_id": i, "category_id": c, "bbox": box}
        for c, images in of_class.items()
        for i in images
        for box in ([1, 1, 9, 9], [2, 2, 9, 9])  # two boxes in an image count once
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": 30, "width": 40} for i in range(41)]
    annotations = [{"id": i + 1} | a for i, a in enumerate(annotations)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = read_coco("cells", str(tmp_path / "a.json"), str(tmp_path))
    rarest, rare = check.check_rare_classes(data)
    assert (rarest.kind, rarest.severity, rarest.file) == ("rare class", "note", "cells")
    assert rarest.text == (
        "d is in 1 of 40 images, the most frequent class in 36. With DATALOADER.SAMPLER_TRAIN "
        "RepeatFactorTrainingSampler and DATALOADER.REPEAT_THRESHOLD 0.9 each of its images is "
        "seen about 6.0 times in an epoch"
    )
    assert rare.text.startswith("c is in 3 of") and "about 3.5 times" in rare.text
    assert check.check_rare_classes(RawData("none", "", source="")) == []


def test_classes_of_several_sets():
    sets = []
    for name, classes in (("a", "xy"), ("b", "yx"), ("c", "xyz"), ("d", "xy")):
        categories = [{"id": i, "name": c} for i, c in enumerate(classes)]
        sets.append(RawData(name, "", categories))
    findings = check.check_sets(sets)
    assert [f.file for f in findings] == ["b", "c"]
    assert "in another order than a" in findings[0].text and "unlike a" in findings[1].text


def coco_file(file, image="a.png"):
    write_image = {"id": 1, "file_name": image, "height": 30, "width": 40}
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": [write_image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    file.write_text(json.dumps(content))


def test_layouts(tmp_path):
    write_yolo(tmp_path / "yolo")
    write_voc(tmp_path / "voc" / "VOC2007", [(1, 1, 10, 20)])
    coco = tmp_path / "coco"
    for split in ("train2017", "val2017"):
        coco_file(coco / "annotations" / f"instances_{split}.json")
        coco_file(coco / "annotations" / f"captions_{split}.json")
        write_pixels(coco / split / "a.png")
    exported = tmp_path / "exported"
    for split in ("train", "valid"):
        coco_file(exported / split / "_annotations.coco.json")
        write_pixels(exported / split / "a.png")
    coco_file(tmp_path / "one" / "latest.json")  # is no test set
    write_pixels(tmp_path / "one" / "images" / "a.png")
    expected = {
        "yolo": ("yolo", ["train", "val"]), "yolo/data.yaml": ("yolo", ["train", "val"]),
        "voc": ("voc", ["train"]), "voc/VOC2007": ("voc", ["train"]),
        "coco": ("coco", ["train", "val"]), "exported": ("coco", ["train", "val"]),
        "coco/annotations/instances_val2017.json": ("coco", ["val"]),
        "one": ("coco", ["all"]), "one/latest.json": ("coco", ["all"]),
    }  # fmt: skip
    for path, (name, splits) in expected.items():
        layout = recognise(str(tmp_path / path))
        assert (layout.format, list(layout.entries)) == (name, splits), path
        for split, entry in layout.entries.items():
            assert len(read_entry(split, entry).images) >= 1
    assert layout.entries["all"]["IMAGES"] == str(tmp_path / "one" / "images")
    assert recognise(str(tmp_path / "voc")).entries["train"]["CLASSES"] == ["cat"]


@pytest.mark.parametrize(
    "classes, images, labels",
    [
        ("classes.txt", "images", "labels"),  # Label Studio's export
        ("labels/classes.txt", "images", "labels"),  # labelImg, with a folder for what it saves
        ("classes.txt", ".", "."),  # labelImg, without
        ("obj.names", "obj_train_data", "obj_train_data"),  # CVAT's export of YOLO 1.1
    ],
)
def test_yolo_labels_with_a_list_of_classes(tmp_path, classes, images, labels):
    for image in ("a", "b"):
        (tmp_path / images).mkdir(exist_ok=True)
        write_pixels(tmp_path / images / f"{image}.png")
    (tmp_path / labels).mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="no known layout"):
        recognise(str(tmp_path))  # without classes
    (tmp_path / classes).write_text("cat\n\nbig dog\n")
    (tmp_path / labels / "b.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (tmp_path / "notes.json").write_text(json.dumps({"categories": []}))
    for path in (tmp_path, tmp_path / classes):
        layout = recognise(str(path))
        assert (layout.format, list(layout.entries)) == ("yolo", ["all"])
        data = read_entry("pets", layout.entries["all"])
        assert data.classes == ["cat", "big dog"]
        first, second = data.training_records()
        assert not first["annotations"] and second["annotations"][0]["category_id"] == 1
    (tmp_path / classes).write_text("\n")
    with pytest.raises(ValueError, match=r"(classes\.txt|obj\.names): names must be a list of cl"):
        recognise(str(tmp_path))


def test_a_list_of_classes_without_labels_is_no_layout(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\n")
    write_pixels(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"no known layout\. Its files: 1 \."):
        recognise(str(tmp_path))
    # Where boxes are in VOC's format, labelImg's list of all the classes it offers says nothing.
    (tmp_path / "a.xml").write_text("<annotation><object><name>dog</name></object></annotation>")
    for classes in ("cat\n", "\n"):
        (tmp_path / "classes.txt").write_text(classes)
        layout = recognise(str(tmp_path))
        assert (layout.format, layout.entries["all"]["CLASSES"]) == ("xml", ["dog"])


def test_what_is_no_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere"):
        recognise(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"has no known layout\. Its files: none\."):
        recognise(str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="neither a folder"):
        recognise(str(tmp_path / "a.txt"))
    write_yolo(tmp_path)
    coco_file(tmp_path / "train.json", "z.png")
    with pytest.raises(ValueError, match=r"train\.json: its first image, 'z\.png', is in none of"):
        recognise(str(tmp_path))
    write_pixels(tmp_path / "z.png")
    with pytest.raises(ValueError, match="has several layouts: yolo, coco"):
        recognise(str(tmp_path))
    coco_file(tmp_path / "annotations" / "train.json", "z.png")
    with pytest.raises(ValueError, match="several files for the split 'train'"):
        recognise(str(tmp_path))
