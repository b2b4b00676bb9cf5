"""Training on a data set that is named by its path alone."""

import itertools
import json
from collections import Counter

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import tiny_cfg
from test_check import write_pixels
from test_custom import write_voc
from test_yolo import write_yolo

from fcos_d2.data import (
    TrainingLoader,
    check,
    check_num_classes,
    check_same_classes,
    check_test_sets,
    custom,
)
from fcos_d2.data.layouts import use_data
from fcos_d2.engine import argument_parser, setup
from fcos_d2.model_zoo import get_config_file


@pytest.fixture
def load():
    """Registers the data sets of a config, and returns the names of the images in both."""

    def _load(cfg, read=None):
        custom.register_custom_datasets(cfg, read)
        check_test_sets(cfg)
        check_same_classes(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
        check_num_classes(cfg, "data_train")
        sets = [DatasetCatalog.get(name) for name in ("data_train", "data_test")]
        return [{r["file_name"].rpartition("/")[2] for r in records} for records in sets]

    yield _load
    for name in ("data_train", "data_test"):
        if custom._registered.pop(name, None):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_yolo(load, tmp_path):
    cfg = tiny_cfg()
    said, _ = use_data(cfg, write_yolo(tmp_path))
    assert "YOLO layout, with train, val, and 2 classes: cat, dog. Trained on train, tes" in said
    assert cfg.MODEL.FCOS.NUM_CLASSES == 2
    assert cfg.DATASETS.TRAIN == ("data_train",)
    assert load(cfg) == [{"a.png", "b.png"}] * 2


def test_classes_that_are_set_stay(load, tmp_path):
    cfg = tiny_cfg()
    use_data(cfg, write_yolo(tmp_path), ["MODEL.FCOS.NUM_CLASSES"])
    assert cfg.MODEL.FCOS.NUM_CLASSES == 3
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 3, but .* 2 classes"):
        load(cfg)


@pytest.mark.parametrize(
    "splits, taken",
    [
        (("train", "val", "test", "trainval"), "Trained on train, tested on val"),
        (("trainval", "val", "test"), "Trained on trainval, tested on test"),
        (("trainval", "val"), "Trained on trainval, tested on a tenth"),  # val is a part of it
    ],
)
def test_splits_of_voc(tmp_path, splits, taken):
    write_voc(tmp_path, [(1, 1, 10, 20)])
    lists = tmp_path / "ImageSets" / "Main"
    (lists / "train.txt").unlink()
    for split in splits:
        (lists / f"{split}.txt").write_text("a\n")
    assert taken in use_data(tiny_cfg(), str(tmp_path))[0]


def test_the_option_of_train_net(load, tmp_path):
    """From the command line to the config of a run, and to its log."""
    config = get_config_file("quick_schedules/fcos_R_18_FPN_shapes.yaml")
    root, output = write_yolo(tmp_path / "pets"), tmp_path / "output"
    args = ["--config-file", config, "--data", root, "OUTPUT_DIR", str(output)]
    cfg = setup(argument_parser("").parse_args(args))
    assert load(cfg) == [{"a.png", "b.png"}] * 2
    assert cfg.MODEL.FCOS.NUM_CLASSES == 2
    assert "has the YOLO layout, with train, val" in (output / "log.txt").read_text()


def test_nothing_to_train_on(tmp_path):
    root = write_yolo(tmp_path, yaml="val: images/val\nnames: [a]")
    with pytest.raises(ValueError, match=r"nothing to train on, but \['val'\]"):
        use_data(tiny_cfg(), root)


@pytest.mark.parametrize("name", ["coco", "voc", "yolo"])
def test_a_tenth_is_held_out(load, tmp_path, monkeypatch, name):
    names = [f"{i}.png" for i in range(60)]
    if name == "coco":
        images = [{"id": i, "file_name": n, "height": 30, "width": 40} for i, n in enumerate(names)]
        boxes = [
            {"id": i + 1, "image_id": i, "category_id": 3, "bbox": [1, 1, 9, 9]} for i in range(60)
        ]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 3, "name": "a"}]}
        (tmp_path / "labels.json").write_text(json.dumps(content))
        for n in names:
            write_pixels(tmp_path / n)
    elif name == "voc":
        write_voc(tmp_path, [(1, 1, 10, 20)])
        xml = (tmp_path / "Annotations" / "a.xml").read_text()
        for n in range(60):
            (tmp_path / "Annotations" / f"{n}.xml").write_text(xml)
            write_pixels(tmp_path / "JPEGImages" / f"{n}.png")
        listed = "\n".join(map(str, range(60)))
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_text(listed)
    else:
        write_yolo(tmp_path, yaml="train: all\nnames: [a]")
        for n in names:
            write_pixels(tmp_path / "all" / n)
            (tmp_path / "all" / f"{n[:-4]}.txt").write_text("0 0.5 0.5 1 1")
    cfg = tiny_cfg()
    parsed, parse = [], json.load
    monkeypatch.setattr(json, "load", lambda file: parsed.append(file.name) or parse(file))
    said, read = use_data(cfg, str(tmp_path))
    assert "tested on a tenth of it" in said
    custom.register_custom_datasets(cfg, read)
    check_test_sets(cfg)
    DatasetCatalog.get("data_train")
    assert parsed == [str(tmp_path / "labels.json")] * (name == "coco")
    assert not read  # it would keep the memory
    train, test = load(cfg)
    assert train | test == set(names) and not train & test
    assert 2 <= len(test) <= 12
    # The same for other images beside them, and in each layout.
    assert test == {n for n in names if custom.is_in_part(f"/elsewhere/{n}", "test")}
    checked = [check.read_registered(cfg, d) for d in ("data_train", "data_test")]
    assert [len(data.images) for data in checked] == [len(train), len(test)]
    assert [len(data.annotations) for data in checked] == [len(train), len(test)]
    if name == "coco":  # what the evaluator reads
        with open(MetadataCatalog.get("data_test").json_file) as file:
            assert {i["file_name"] for i in json.load(file)["images"]} == test


def test_rare_classes_are_seen_more_often(load, tmp_path):
    """Of ten images one has class 1, all have class 0: with a threshold of 1 sqrt(1 / 0.1) times,
    3.16, and the other nine once: 12.16 images in an epoch."""
    write_yolo(tmp_path, yaml="train: all\nval: all\nnames: [a, b]")
    for i in range(10):
        write_pixels(tmp_path / "all" / f"{i}.png")
        text = "0 0.5 0.5 1 1" + "\n1 0.5 0.5 1 1" * (i == 3)
        (tmp_path / "all" / f"{i}.txt").write_text(text)
    config = get_config_file("quick_schedules/fcos_R_18_FPN_shapes.yaml")
    args = ["--config-file", config, "--data", str(tmp_path), "OUTPUT_DIR", str(tmp_path / "out")]
    args += ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    args += ["DATALOADER.REPEAT_THRESHOLD", "1.0", "SEED", "0"]
    cfg = setup(argument_parser("").parse_args(args))
    load(cfg)
    loader = TrainingLoader(cfg, dict)
    assert loader.images_per_epoch == pytest.approx(9 + 10**0.5)
    indices = list(itertools.islice(loader.indices(), 2000))
    counts = Counter(loader.dataset[0, 0, i]["file_name"].rpartition("/")[2] for i in indices)
    epochs = 2000 / (9 + 10**0.5)
    assert counts["3.png"] / epochs == pytest.approx(10**0.5, abs=0.1)
    assert counts["4.png"] / epochs == pytest.approx(1, abs=0.05)


def test_wrong_parts(load):
    cfg = tiny_cfg()
    voc = {"FORMAT": "voc", "ROOT": "x", "SPLIT": "x", "CLASSES": ["x"], "PART": "test"}
    for entry in (voc | {"PART": "third"}, voc | {"EVALUATOR": "pascal_voc"}):
        cfg.DATASETS.CUSTOM.data_test = type(cfg)(entry)
        with pytest.raises(ValueError, match=r"data_test\.PART must be one of"):
            custom.register_custom_datasets(cfg)
