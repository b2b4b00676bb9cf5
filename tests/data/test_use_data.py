"""Training on a data set that is named by its path alone."""

import itertools
import json
import logging
import subprocess
from collections import Counter

import pytest
from detectron2.config import CfgNode
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
    layouts,
)
from fcos_d2.data.custom import read_entry
from fcos_d2.data.layouts import recognise, use_data
from fcos_d2.data.loading import load_training_sets
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


def test_test_sets_that_are_set_stay(tmp_path, monkeypatch):
    cfg = tiny_cfg()
    cfg.DATASETS.TEST = ("data_train",)
    said, _ = use_data(cfg, write_yolo(tmp_path), ["DATASETS.TEST"])
    assert cfg.DATASETS.TEST == ("data_train",) and cfg.DATASETS.TRAIN == ("data_train",)
    assert said.endswith("tested on DATASETS.TEST, which is set: ('data_train',)")
    with pytest.raises(
        ValueError, match=r"and DATASETS\.TRAIN both say what to train on: give one"
    ):
        use_data(cfg, str(tmp_path), ["DATASETS.TRAIN"])
    # Nothing is held out for an evaluation that is not to be.
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\n")
    cfg.DATASETS.TEST, cfg.DATASETS.CUSTOM = (), CfgNode(new_allowed=True)
    said, _ = use_data(cfg, str(tmp_path), ["DATASETS.TEST"])
    assert said.endswith("Trained on all, tested on DATASETS.TEST, which is set: ()")
    assert list(cfg.DATASETS.CUSTOM) == ["data_train"]
    assert "PART" not in cfg.DATASETS.CUSTOM.data_train
    cfg.DATASETS.TEST = ("data_test",)
    monkeypatch.setattr(layouts, "_LEAST_HELD_OUT", 0)
    use_data(cfg, str(tmp_path), ["DATASETS.TEST"])
    assert [cfg.DATASETS.CUSTOM[f"data_{x}"].PART for x in ("train", "test")] == ["train", "test"]


@pytest.mark.parametrize(
    "splits, taken",
    [
        (("train", "val", "test", "trainval"), "Trained on train, tested on val"),
        (("trainval", "val", "test"), "Trained on trainval, tested on test"),
        (
            ("trainval", "val"),
            "Trained on trainval, tested on nothing: held out would",
        ),  # val is a part of it
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


def write_xml(file, image_file, box=(1, 1, 10, 20), name="cat", seed=0):
    write_pixels(image_file, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    corners = "".join(
        f"<{k}>{x}</{k}>" for k, x in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    file.write_text(
        f"<annotation><object><name>{name}</name><bndbox>{corners}</bndbox></object></annotation>"
    )


# Where the XML file and the image of each of the splits lie.
FOLDERS = {
    "labelImg": {"all": ("annotations/{}.xml", "images/{}.jpg")},
    "beside": {"all": ("{}.xml", "{}.jpg")},
    "deeper": {"all": ("export/set/{}.xml", "export/set/{}.png")},
    "without lists": {"all": ("Annotations/{}.xml", "JPEGImages/{}.JPG")},
    "exported": {s: (f"{s}id/{{}}.xml", f"{s}id/{{}}.jpg") for s in ("val",)}
    | {s: (f"{s}/{{}}.xml", f"{s}/{{}}.jpg") for s in ("train", "test")},
    "by split": {s: (f"{s}/xml/{{}}.xml", f"{s}/images/{{}}.jpg") for s in ("train", "val")},
    "by kind": {s: (f"xml/{s}/{{}}.xml", f"images/{s}/{{}}.jpg") for s in ("train", "val")},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_xml_files_in_any_folders(tmp_path, kind):
    for split, (xml, image) in FOLDERS[kind].items():
        for i, n in enumerate(("one", "two.x", "three 3")):
            name = f"{split} {n}"
            write_xml(tmp_path / xml.format(name), tmp_path / image.format(name), name="cd"[i % 2])
    layout = recognise(str(tmp_path))
    assert layout.format == "xml" and layout.entries.keys() == FOLDERS[kind].keys()
    for split, entry in layout.entries.items():
        assert entry["CLASSES"] == ["c", "d"]
        data = read_entry(split, entry)
        data.dropped()  # raises what cannot be read
        assert {image["id"] for image in data.images} == {
            f"{split} {n}" for n in ("one", "two.x", "three 3")
        }
        # From 1 to 10 and 1 to 20, both included.
        assert [a["bbox"] for a in data.annotations] == [[0, 0, 10, 20]] * 3


def test_images_without_xml_are_left_out_and_said(load, tmp_path):
    for i in range(60):
        write_xml(tmp_path / "xml" / f"{i}.xml", tmp_path / "images" / f"{i}.jpg")
    for i in range(60, 67):
        write_pixels(tmp_path / "images" / f"{i}.jpg")
    cfg = tiny_cfg()
    said, read = use_data(cfg, str(tmp_path))
    assert "XML layout, with all (7 images without an .xml file are left out), and 1 cl" in said
    train, test = load(cfg, read)
    assert train | test == {f"{i}.jpg" for i in range(60)} and not train & test


def test_small_images_are_not_enlarged_in_silence(load, tmp_path, caplog):
    for i in range(3):
        write_xml(tmp_path / f"{i}.xml", tmp_path / f"{i}.jpg")  # images of 40 x 30 pixels
    cfg, said = tiny_cfg(), []
    _, read = use_data(cfg, str(tmp_path))
    custom.register_custom_datasets(cfg, read)
    logging.getLogger("fcos_d2").propagate = True
    for sizes in ((60,), (61, 800), 61, 0):
        caplog.clear()
        cfg.INPUT.MIN_SIZE_TRAIN = sizes
        load_training_sets(cfg)
        said.append({m for m in caplog.messages if "on their shorter side" in m})
    assert [len(x) for x in said] == [0, 1, 1, 0]
    (text,) = said[1]
    assert "Half of the images have at most 30 pixels" in text
    assert "MIN_SIZE_TRAIN (61, 800) takes" in text and '"(60,)" INPUT' in text


def test_xml_files_that_are_unclear(tmp_path):
    (tmp_path / "pom.xml").write_text("<project/>")
    write_pixels(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"Its files: 1 \.xml, 1 \.jpg\."):
        recognise(str(tmp_path))
    for folder in ("monday", "friday"):
        write_xml(tmp_path / folder / "a.xml", tmp_path / folder / "a.jpg")
    with pytest.raises(ValueError, match=r"several folders of \.xml files for the split 'all'"):
        recognise(str(tmp_path))
    assert list(recognise(str(tmp_path / "monday")).entries) == ["all"]


def test_few_images_are_trained_on_without_evaluation(tmp_path):
    for i in range(14):
        write_xml(tmp_path / "data" / f"{i}.xml", tmp_path / "data" / f"{i}.jpg", seed=i)
    cfg = tiny_cfg()
    said, read = use_data(cfg, str(tmp_path / "data"))
    # The first byte of the SHA-256 of the names "0.jpg" to "13.jpg" is a multiple of 10 once.
    assert "tested on nothing: held out would be 1 of 14 images, too few" in said
    assert cfg.DATASETS.TEST == () and "PART" not in cfg.DATASETS.CUSTOM.data_train
    assert list(read) == ["data_train"] and len(read["data_train"].images) == 14


def test_a_yaml_of_any_name(tmp_path):
    """Beside a YAML of something else, and without splits: "images" are all of them."""
    for i in range(60):
        write_pixels(tmp_path / "images" / f"{i}.png")
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{i}.txt").write_text("1 0.5 0.5 1 1")
    (tmp_path / "training.yml").write_text("lr: 0.1")
    (tmp_path / "pets.yaml").write_text("names: [cat, dog]")
    layout = recognise(str(tmp_path))
    assert layout.format == "yolo" and list(layout.entries) == ["all"]
    data = read_entry("all", layout.entries["all"])
    assert len(data.images) == 60 and [a["category_id"] for a in data.annotations] == [2] * 60
    (tmp_path / "more.yaml").write_text("names: [cat, dog]")
    with pytest.raises(ValueError, match="several layouts: yolo, yolo"):
        recognise(str(tmp_path))


def test_what_no_layout_has_is_counted(tmp_path):
    for i in range(3):
        write_pixels(tmp_path / "a b" / f"{i}.png")
    (tmp_path / "boxes.csv").write_text("")
    with pytest.raises(
        ValueError, match=r"Its files: 3 \.png, 1 \.csv\.[\s\S]*echo 'names: "
    ) as error:
        recognise(str(tmp_path))
    # The commands make it known.
    (command,) = [x.strip() for x in str(error.value).splitlines() if "echo" in x]
    (tmp_path / "a b").rename(tmp_path / "images")
    subprocess.run(command, shell=True, check=True)
    assert recognise(str(tmp_path)).format == "yolo"
