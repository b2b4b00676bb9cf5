"""Data sets in YOLO layout: good ones of several makers, and each way in which one can be wrong."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from fcos_d2.config import get_cfg, load_cfg
from fcos_d2.data import custom, with_class_names
from fcos_d2.data.image_files import image_size
from fcos_d2.data.yolo import read_yolo

HEIGHT, WIDTH = 30, 40


def write_image(file, mode="RGB", **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (WIDTH, HEIGHT)).save(file, **options)


def write_yolo(root, labels="0 0.5 0.5 0.25 0.5\n", yaml=None):
    """Two images in train, the first with labels, and the same in val."""
    for split in ("train", "val"):
        for image in ("a", "b"):
            write_image(root / "images" / split / f"{image}.png")
        (root / "labels" / split).mkdir(parents=True)
        (root / "labels" / split / "a.txt").write_text(labels)
    write_yaml(root, yaml or "train: images/train\nval: images/val\nnames: [cat, dog]\n")
    return str(root)


def write_yaml(root, text):
    (root / "data.yaml").write_text(text, encoding="utf-8")


def load_yolo(root, split):
    """What training takes."""
    data = read_yolo("pets", root, split)
    return data.training_records(), data.classes


def boxes(records):
    return [[a["bbox"] for a in r["annotations"]] for r in records]


def test_boxes_and_polygons_in_pixels(tmp_path):
    root = write_yolo(tmp_path, "0 0.5 0.5 0.25 0.5\n\n1 0.25 0 0.5 0.5 0 1\n")
    (first, second), classes = load_yolo(root, "train")
    assert classes == ["cat", "dog"]
    assert first["file_name"] == str(tmp_path / "images" / "train" / "a.png")
    assert (first["height"], first["width"], second["annotations"]) == (HEIGHT, WIDTH, [])
    assert first["annotations"] == [
        # centre (20, 15), 10 wide and 15 high
        {"category_id": 0, "bbox_mode": BoxMode.XYXY_ABS, "bbox": [15, 7.5, 25, 22.5]},
        {
            "category_id": 1,
            "bbox_mode": BoxMode.XYXY_ABS,
            "bbox": [0, 0, 20, 30],
            "segmentation": [[10, 0, 20, 15, 0, 30]],
        },
    ]
    assert len({r["image_id"] for r in load_yolo(root, "val")[0]}) == 2


@pytest.mark.parametrize(
    "yaml",
    [
        "train: ../images/train\nnames: {0: cat, 1: dog}\nnc: 2",  # Roboflow's way
        "path: /not/here\ntrain: images/train\nnames: ['cat', 'dog']",
        "path: images\ntrain: [train]\nnames:\n  1: dog\n  0: cat",
        "path: ..\\{name}\r\ntrain: images\\train\r\nnames:\r\n- cat\r\n- dog\r\n",
        "\ufefftrain: list.txt\nnames: [cat, dog]",
    ],
)
def test_layouts_of_several_makers(tmp_path, yaml):
    root = tmp_path / "pets"
    write_yolo(root, "0 0.5 0.5 0.25 0.5\r\n", yaml.replace("{name}", "pets"))
    (root / "list.txt").write_text("./images/train/a.png\r\nimages\\train\\b.png\r\n")
    for data in (root, root / "data.yaml"):
        records, classes = load_yolo(str(data), "train")
        assert classes == ["cat", "dog"]
        assert [r["file_name"] for r in records] == [
            str(root / "images" / "train" / f"{x}.png") for x in "ab"
        ]
        assert boxes(records) == [[[15, 7.5, 25, 22.5]], []]


def test_splits_first_and_labels_beside_images(tmp_path):
    write_image(tmp_path / "train" / "images" / "sub" / "Käfer 1.v2.JPG")
    write_image(tmp_path / "train" / "images" / "._a.jpg")
    labels = tmp_path / "train" / "labels" / "sub" / "Käfer 1.v2.txt"
    labels.parent.mkdir(parents=True)
    labels.write_text("0 0.5 0.5 1 1")
    write_image(tmp_path / "flat" / "a.bmp")
    (tmp_path / "flat" / "a.txt").write_text("0 0.5 0.5 1 1")
    write_yaml(tmp_path, "train: [../train/images, flat, flat/a.bmp]\nnames: [Käfer]")
    records, classes = load_yolo(str(tmp_path), "train")
    assert classes == ["Käfer"]
    assert boxes(records) == [[[0, 0, 40, 30]]] * 2  # a.bmp, named twice, is there once


def test_a_list_of_classes_in_the_working_folder(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("0 0.5 0.5 1 1")
    (tmp_path / "classes.txt").write_text("cat\n")
    monkeypatch.chdir(tmp_path)
    records, classes = load_yolo("classes.txt", "all")
    assert (classes, boxes(records)) == (["cat"], [[[0, 0, 40, 30]]])


def test_links(tmp_path):
    root = write_yolo(tmp_path / "pets")
    folder = tmp_path / "pets" / "images" / "train"
    (folder / "loop").symlink_to(folder)
    (folder / "c.png").symlink_to(folder / "a.png")
    (tmp_path / "pets" / "labels" / "train" / "c.txt").symlink_to("/not/here")
    assert len(load_yolo(root, "val")[0]) == 2
    with pytest.raises(FileNotFoundError, match=r"c\.txt"):
        load_yolo(root, "train")


@pytest.mark.parametrize(
    "line, message",
    [
        ("0 0.5 0.5 0.2", r"a\.txt, line 2 has 3 numbers behind the class"),
        ("0", r"line 2 has 0 numbers behind the class"),
        ("0 0.5 0.5 0.2 0.2 0.9", "line 2 has 5 numbers behind the class. A box has 4"),
        ("0 0 0 1 0 1 1 0", "line 2 has 7 numbers behind the class.*a polygon an even number"),
        ("2 0.5 0.5 0.2 0.2", "line 2 has the class 2, but there are 2 classes, from 0 to 1"),
        ("-1 0.5 0.5 0.2 0.2", "line 2 has the class -1"),
        ("0.5 0.5 0.5 0.2 0.2", r"line 2 has the class 0\.5"),
        ("nan 0.5 0.5 0.2 0.2", "line 2 has the class nan"),
        ("cat 0.5 0.5 0.2 0.2", "line 2 has something else than numbers: 'cat 0.5"),
        ("0,0.5,0.5,0.2,0.2", "line 2 has something else than numbers"),
        ("0 0.5 0.5 1.5 0.2", r"line 2 has 1\.5, which is not in \[0, 1\]"),
        ("0 0.5 0.5 -0.1 0.2", r"line 2 has -0\.1"),
        ("0 0.5 nan 0.1 0.2", "line 2 has nan, which"),
        ("0 0.5 0.5 inf 0.2", "line 2 has inf, which"),
        ("1 120 50 20 10", "line 2 has 120, which"),
        ("0 0 0 1 0 1 2", r"line 2 has 2, which is not in \[0, 1\]"),
        ("x" * 100_000, r"numbers: 'x{80}'$"),
    ],
)
def test_faults_in_a_label_file_are_named(tmp_path, line, message):
    root = write_yolo(tmp_path, f"0.0 0.5 0.5 1 1\n{line}\n")
    with pytest.raises(ValueError, match=message):
        load_yolo(root, "train")


def test_a_label_file_that_is_no_text(tmp_path):
    root = write_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").write_bytes(b"\xff\xfe0\x00")
    with pytest.raises(ValueError, match=r"a\.txt is not a text file"):
        load_yolo(root, "train")


def test_boxes_without_area_are_dropped_with_one_warning(tmp_path, caplog):
    root = write_yolo(tmp_path, "0 0.5 0.5 0 0.1\n0 0.5 0.5 1 1\n1 0 0 0.5 0 1 0\n")
    assert boxes(load_yolo(root, "train")[0]) == [[[0, 0, 40, 30]], []]
    (record,) = [r for r in caplog.records if r.name == "fcos_d2.data.raw_data"]
    assert "split train: dropped 2 box(es) without area" in record.message
    assert "a.txt, line 1; " in record.message and "a.txt, line 3" in record.message


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("", "it has no 'names'"),
        ("[1, 2]", "it has no 'names'"),
        ("names: [a\n", "is not a YAML file of plain data"),
        ("names: !!python/object/apply:os.system ['touch hacked']", "is not a YAML file of plain"),
        ("names: []", "names must be a list of classes"),
        ("names: cat", "names must be a list of classes"),
        ("names: [no, yes]", "the name of class 0, False, is no text: put it in quotes"),
        ("names: [cat, 1.5]", r"class 1, 1\.5, is no text"),
        ("names: {1: cat, 2: dog}", r"numbered from 0 to 1 without gaps, got \[1, 2\]"),
        ("names: {a: cat}", "without gaps"),
        ("names: [cat]\nnc: 3", "nc is 3, but there are 1 names"),
        ("names: [cat]\nkpt_shape: [17, 3]", "keypoints, which are not read"),
        ("names: [cat]\ntrain: {a: b}", "train must be a path or a list of paths"),
        ("names: [cat]\ntrain: x\npath: [1]", "path must be a folder"),
        ("names: [cat]\nval: images/val", r"has no split 'train'; it has \['val'\]"),
        ("names: [cat]\ntrain:", r"has no split 'train'; it has \['all'\]"),
        ("names: [cat]\ntrain: labels", "the split 'train', .'labels'., has no images"),
        (f"{BOMB}names: [*j]", "the name of class 0, .* is no text"),
    ],
)
def test_faults_in_data_yaml_are_named(tmp_path, yaml, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_yolo(tmp_path, yaml=yaml or "\n")
    with pytest.raises(ValueError, match=message) as error:
        load_yolo(root, "train")
    assert "data.yaml" in str(error.value) and len(str(error.value)) < 2000
    assert not (tmp_path / "hacked").exists()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.yaml"):
        load_yolo(str(tmp_path / "data.yaml"), "train")
    with pytest.raises(ValueError, match=r"must have one YAML file with .names., but has none"):
        load_yolo(str(tmp_path), "train")
    root = write_yolo(tmp_path, yaml="train: img\nval: list.txt\nnames: [cat]")
    with pytest.raises(FileNotFoundError, match=r"data\.yaml: train is not there: .*/img"):
        load_yolo(root, "train")
    (tmp_path / "list.txt").write_text("images/train/a.png\nc.png\n")
    with pytest.raises(FileNotFoundError, match=r"list\.txt, line 2: the image c\.png is not"):
        load_yolo(root, "val")
    (tmp_path / "images" / "train" / "a.png").write_text("not an image")
    (tmp_path / "list.txt").write_text("images/train/a.png\n")
    with pytest.raises(OSError, match=r"a\.png"):
        load_yolo(root, "val")


def test_labels_at_another_place(tmp_path):
    root = write_yolo(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "Labels")
    with pytest.raises(ValueError, match=r"None of the 2 images .*would be .*labels/train/a\.txt"):
        load_yolo(root, "train")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_those_after_the_turn_by_exif(tmp_path, suffix, orientation):
    """Compared with the pixels that Detectron2 reads."""
    from detectron2.data.detection_utils import read_image

    file = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_image(file, exif=exif)
    assert image_size(str(file)) == read_image(str(file)).shape[:2]
    if suffix != "tif":  # there PIL has turned it already, and Detectron2 does once more
        assert (image_size(str(file)) == (WIDTH, HEIGHT)) == (orientation in (6, 8))


def test_sizes_need_no_pixels(tmp_path):
    for file in (tmp_path / "a.png", tmp_path / "b.jpg"):
        pixels = np.random.default_rng(0).integers(0, 255, (300, 200, 3), np.uint8)
        Image.fromarray(pixels).save(file)
        file.write_bytes(file.read_bytes()[:1000])
        assert image_size(str(file)) == (300, 200)
    write_image(tmp_path / "c.png", mode="I;16")
    assert image_size(str(tmp_path / "c.png")) == (HEIGHT, WIDTH)


def test_images_beyond_the_limit(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.png is too large"):
        image_size(str(tmp_path / "a.png"))


@pytest.fixture
def pets(datasets_folder):
    """A config with the registered data set."""
    write_yolo(datasets_folder / "pets")
    cfg = get_cfg()
    cfg.DATASETS.CUSTOM.pets = type(cfg)({"FORMAT": "yolo", "DATA": "pets", "SPLIT": "train"})
    yield cfg
    if custom._registered.pop("pets", None):
        DatasetCatalog.remove("pets")
        MetadataCatalog.remove("pets")


def test_as_a_custom_data_set(pets, datasets_folder, tmp_path):
    custom.register_custom_datasets(pets)
    assert len(DatasetCatalog.get("pets")) == 2
    metadata = MetadataCatalog.get("pets")
    assert (metadata.thing_classes, metadata.evaluator_type) == (["cat", "dog"], "coco")
    # The config of a run says the classes, and is read where the data are not.
    described = tmp_path / "run.yaml"
    described.write_text(with_class_names(pets).dump())
    (datasets_folder / "pets" / "data.yaml").write_text("train: images/train\nnames: [dog, cat]")
    load_cfg(str(described))
    assert MetadataCatalog.get("pets").thing_classes == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"classes \['dog', 'cat'\], but CLASSES of .* 'pets'"):
        DatasetCatalog.get("pets")


def test_evaluation_with_the_coco_evaluator(pets, tmp_path):
    """Detections at the ground truth have an AP of 100, as Detectron2's evaluator finds it."""
    import torch
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    custom.register_custom_datasets(pets)
    records = DatasetCatalog.get("pets")
    evaluator = COCOEvaluator("pets", output_dir=str(tmp_path), allow_cached_coco=False)
    evaluator.reset()
    for record in records:
        annotations = record["annotations"]
        found = Instances((record["height"], record["width"]))
        found.pred_boxes = Boxes(torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4))
        found.scores = torch.ones(len(annotations))
        found.pred_classes = torch.tensor([a["category_id"] for a in annotations]).long()
        evaluator.process([record], [{"instances": found}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100)
    (converted,) = tmp_path.glob("*coco_format.json")
    assert len(json.loads(converted.read_text())["images"]) == 2
