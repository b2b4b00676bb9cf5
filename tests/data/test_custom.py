import json

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import tiny_cfg

from fcos_d2.config import get_cfg
from fcos_d2.data import (
    check_num_classes,
    check_same_classes,
    check_test_sets,
    register_custom_datasets,
)


@pytest.fixture
def register(datasets_folder):
    """Registers entries, and removes them after the test."""
    names = set()

    def _register(**entries):
        cfg = get_cfg()
        for name, entry in entries.items():
            cfg.DATASETS.CUSTOM[name] = type(cfg)(entry)
            names.add(name)
        register_custom_datasets(cfg)

    yield _register
    from fcos_d2.data import custom

    for name in names & custom._registered.keys():
        custom._registered.pop(name)
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write_voc(root, boxes, names=("cat", "dog")):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for (x0, y0, x1, y1), name in zip(boxes, names, strict=False)
    )
    for image in ("a", "b"):
        (root / "Annotations" / f"{image}.xml").write_text(
            f"<annotation><size><width>40</width><height>30</height></size>{objects}</annotation>"
        )
        cv2.imwrite(str(root / "JPEGImages" / f"{image}.jpg"), np.zeros((30, 40, 3), np.uint8))
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")


def voc(**changes):
    entry = {"FORMAT": "voc", "ROOT": "pets", "SPLIT": "train", "CLASSES": ["cat", "dog"]}
    return entry | changes


def test_voc(register, datasets_folder):
    write_voc(datasets_folder / "pets", [(1, 1, 10, 20), (5, 6, 40, 30)])
    register(pets=voc())
    dicts = DatasetCatalog.get("pets")
    assert [d["image_id"] for d in dicts] == ["a", "b"]
    # VOC's corners are pixel numbers from 1, both included: 1..10 covers 0 to 10.
    assert [a["bbox"] for a in dicts[0]["annotations"]] == [[0, 0, 10, 20], [4, 5, 40, 30]]
    assert [a["category_id"] for a in dicts[0]["annotations"]] == [0, 1]
    assert MetadataCatalog.get("pets").evaluator_type == "coco"


def test_loading_reports_what_the_pascal_voc_evaluator_cannot_read(register, datasets_folder):
    write_voc(datasets_folder / "pets", [(1, 1, 10, 20)])
    register(pets=voc(EVALUATOR="pascal_voc"))
    assert MetadataCatalog.get("pets").evaluator_type == "pascal_voc"
    with pytest.raises(ValueError, match=r"a\.xml: .* needs <pose>.* set EVALUATOR 'coco'"):
        DatasetCatalog.get("pets")


def test_boxes_without_area_are_dropped_with_one_warning(register, datasets_folder, caplog):
    write_voc(datasets_folder / "pets", [(7, 8, 7, 8), (5, 6, 40, 30)])
    register(pets=voc())
    dicts = DatasetCatalog.get("pets")
    assert [len(d["annotations"]) for d in dicts] == [1, 1]
    (record,) = [r for r in caplog.records if r.name == "fcos_d2.data.raw_data"]
    assert "dropped 2 box(es)" in record.message
    assert "a (7, 8, 7, 8); b (7, 8, 7, 8)" in record.message


def test_unlisted_class_is_named(register, datasets_folder):
    write_voc(datasets_folder / "pets", [(1, 1, 9, 9)], names=("bird",))
    register(pets=voc())
    message = r"a\.xml: <object> number 1 has the <name> 'bird', .*\['cat', 'dog'\]"
    with pytest.raises(ValueError, match=message):
        DatasetCatalog.get("pets")


def test_coco(register, datasets_folder):
    data = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 30, "width": 40}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 4, "bbox": [1, 2, 3, 4], "iscrowd": 0}
        ],
        "categories": [{"id": 4, "name": "cat"}],
    }
    (datasets_folder / "a.json").write_text(json.dumps(data))
    register(cats={"FORMAT": "coco", "JSON": "a.json", "IMAGES": "images"})
    (record,) = DatasetCatalog.get("cats")
    assert record["file_name"] == str(datasets_folder / "images" / "a.jpg")
    assert record["annotations"][0]["category_id"] == 0
    cfg = tiny_cfg()
    with pytest.raises(
        ValueError, match=r"NUM_CLASSES is 3, but the data set 'cats' has 1 classes: \['cat'\]"
    ):
        check_num_classes(cfg, "cats")
    cfg.MODEL.FCOS.NUM_CLASSES = 1
    check_num_classes(cfg, "cats")
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    check_num_classes(cfg, "cats")
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    with pytest.raises(ValueError, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES is 80, but"):
        check_num_classes(cfg, "cats")


def test_registering_again(register, datasets_folder):
    register(pets=voc())
    register(pets=voc())
    register(pets=voc(CLASSES=["cat"]))
    assert MetadataCatalog.get("pets").thing_classes == ["cat"]


def test_registering_again_after_it_was_removed(register, datasets_folder):
    register(pets=voc())
    DatasetCatalog.remove("pets")
    register(pets=voc())
    assert "pets" in DatasetCatalog


def test_another_datasets_folder(register, datasets_folder, monkeypatch):
    register(pets=voc())
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_folder / "other"))
    register(pets=voc())
    assert MetadataCatalog.get("pets").dirname == str(datasets_folder / "other" / "pets")


def test_a_split_of_one_image_and_a_split_that_is_a_number(register, datasets_folder):
    write_voc(datasets_folder / "pets", [(1, 1, 10, 20)])
    listed = datasets_folder / "pets" / "ImageSets" / "Main" / "2007.txt"
    listed.write_text("b\nb\n")  # an image that is listed twice is taken once
    register(pets=voc(SPLIT=2007))
    assert [r["image_id"] for r in DatasetCatalog.get("pets")] == ["b"]


def test_names_with_spaces_and_other_image_formats(register, datasets_folder):
    root = datasets_folder / "pets"
    write_voc(root, [(1, 1, 10, 20)])
    for old, new, suffix in (("a", "my cat", ".png"), ("b", "#2 b.v1", ".JPG")):
        (root / "Annotations" / f"{old}.xml").rename(root / "Annotations" / f"{new}.xml")
        (root / "JPEGImages" / f"{old}.jpg").rename(root / "JPEGImages" / f"{new}{suffix}")
    (root / "ImageSets" / "Main" / "train.txt").write_text("my cat\n#2 b.v1\n\n")
    register(pets=voc())
    files = [r["file_name"] for r in DatasetCatalog.get("pets")]
    assert files == [str(root / "JPEGImages" / x) for x in ("my cat.png", "#2 b.v1.JPG")]
    register(pets=voc(EVALUATOR="pascal_voc"))
    with pytest.raises(
        ValueError, match=r"my cat\.xml: the PASCAL VOC evaluator cannot read names"
    ):
        DatasetCatalog.get("pets")


def edit_voc(root, old, new):
    file = root / "Annotations" / "a.xml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_size_is_taken_from_the_image_where_the_file_has_none(register, datasets_folder):
    root = datasets_folder / "pets"
    write_voc(root, [(1, 1, 10, 20)])
    edit_voc(root, "<size><width>40</width><height>30</height></size>", "")
    register(pets=voc())
    first, second = DatasetCatalog.get("pets")
    assert (first["height"], first["width"]) == (second["height"], second["width"]) == (30, 40)
    (root / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"a\.xml has no <size> .*a\.jpg cannot be read"):
        DatasetCatalog.get("pets")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("<xmax>10</xmax>", "<xmax>ten</xmax>", r"a\.xml: <object> number 1 has no <bndbox> with"),
        ("<xmax>10</xmax>", "<xmax>inf</xmax>", r"number 1 has no <bndbox> with four numbers"),
        ("<xmax>10</xmax>", "", r"a\.xml: <object> number 1 has no <bndbox> with four numbers"),
        ("</annotation>", "", r"a\.xml is not an XML file, or is cut short"),
        ("<name>cat</name>", "", r"number 1 has the <name> None"),
    ],
)
def test_faults_in_a_voc_file_are_named(register, datasets_folder, old, new, message):
    write_voc(datasets_folder / "pets", [(1, 1, 10, 20)])
    edit_voc(datasets_folder / "pets", old, new)
    register(pets=voc())
    with pytest.raises(ValueError, match=message):
        DatasetCatalog.get("pets")


def write_coco(file, names):
    file.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.jpg", "height": 30, "width": 40}],
                "annotations": [],
                "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
            }
        )
    )
    return {"FORMAT": "coco", "JSON": str(file), "IMAGES": "images"}


def test_classes_of_train_and_test_are_compared(register, datasets_folder):
    entries = {
        "train": write_coco(datasets_folder / "1.json", ["cat", "dog"]),
        "same": write_coco(datasets_folder / "2.json", ["cat", "dog"]),
        "swapped": write_coco(datasets_folder / "3.json", ["dog", "cat"]),
        "other": write_coco(datasets_folder / "4.json", ["cat", "cow"]),
    }
    register(**entries)
    check_same_classes(["train"], ["same"])
    with pytest.raises(ValueError, match=r"'swapped' has the classes .*in another order than 'tr"):
        check_same_classes(["train"], ["same", "swapped"])
    with pytest.raises(ValueError, match=r"\['cat', 'cow'\], unlike 'train', .*\['cat', 'dog'\]"):
        check_same_classes(["train"], ["other"])


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            {"FORMAT": "csv"},
            r"pets\.FORMAT must be one of \['coco', 'voc', 'yolo', 'xml'\], got 'csv'",
        ),
        ({"FORMAT": "voc", "ROOT": "x"}, r"must have the keys \['CLASSES', 'FORMAT'"),
        (voc(JSON="x"), r"may have \['EVALUATOR', 'PART'\], got .*'JSON'"),
        (
            voc(FORMAT="coco", JSON="x", IMAGES="x"),  # a base config declares it as voc
            r"pets has keys of several formats \(FORMAT 'coco', but also ROOT, SPLIT\): a base "
            "config declares pets with another FORMAT. Give the data set another name, and put",
        ),
        (voc(FORMAT="yolo", DATA="x"), r"several formats \(FORMAT 'yolo', but also ROOT\)"),
        (voc(EVALUATOR="lvis"), "EVALUATOR must be 'coco' or 'pascal_voc'"),
    ],
)
def test_errors_say_what_is_wrong(register, entry, message):
    with pytest.raises(ValueError, match=message):
        register(pets=entry)


def test_test_sets_are_looked_at_before_the_training(register, datasets_folder):
    write_voc(datasets_folder / "pets", [(5, 5, 20, 20)])
    coco = {"FORMAT": "coco", "JSON": "missing.json", "IMAGES": "pets"}
    register(pets=voc(), other=coco)
    cfg = tiny_cfg(NUM_CLASSES=2)

    def check(*names):
        cfg.DATASETS.TEST = names
        check_test_sets(cfg)

    check("pets")
    check()
    with pytest.raises(ValueError, match="No data set 'pest' is registered"):
        check("pets", "pest")
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        check("other")
    (datasets_folder / "pets" / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images .*'pets' are not there.*b\.jpg"):
        check("pets")
    (datasets_folder / "pets" / "ImageSets" / "Main" / "train.txt").write_text("")
    with pytest.raises(ValueError, match=r"'pets' .* has no images"):
        check("pets")
    cfg.MODEL.FCOS.NUM_CLASSES = 3
    with pytest.raises(ValueError, match="'pets' has 2 classes"):
        check("pets")


def test_name_of_a_built_in_data_set(register):
    with pytest.raises(ValueError, match="voc_2007_train: a data set with this name"):
        register(voc_2007_train=voc())


@pytest.mark.shared
@pytest.mark.parametrize(
    "split, images, dropped",
    [
        ("train", 205, "BloodImage_00343 (181, 329, 181, 329)"),
        ("val", 87, "BloodImage_00338 (504, 337, 504, 337)"),
        ("test", 72, None),
    ],
)
@pytest.mark.parametrize("evaluator", ["coco", "pascal_voc"])
def test_bccd(register, bccd_root, split, images, dropped, evaluator, caplog):
    classes = ["RBC", "WBC", "Platelets"]
    register(bccd=voc(ROOT=bccd_root, SPLIT=split, CLASSES=classes, EVALUATOR=evaluator))
    assert len(DatasetCatalog.get("bccd")) == images
    warnings = [r.message for r in caplog.records if r.name == "fcos_d2.data.raw_data"]
    assert len(warnings) == (dropped is not None)
    assert all(dropped in w for w in warnings)
