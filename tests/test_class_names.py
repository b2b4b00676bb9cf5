"""A trained model knows its classes, and what was trained on others is not taken for it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import Visualizer
from helpers import tiny_cfg

from fcos_d2 import Predictor, load_cfg
from fcos_d2.data import register_custom_datasets
from fcos_d2.engine import Trainer, evaluate
from fcos_d2.inference import predict

CLASSES = ["disc", "square", "triangle"]


@pytest.fixture
def cfg(shapes_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    cfg = tiny_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    Path(cfg.OUTPUT_DIR).mkdir()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 2, 1
    register_custom_datasets(cfg)
    return cfg


@pytest.fixture
def trained(cfg, monkeypatch):
    """The folder of a run."""
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "test", classmethod(lambda *args: {}))
        Trainer(cfg).train()
    return Path(cfg.OUTPUT_DIR)


def other_classes(shapes_folder, folder, names):
    """The validation set with other names of its classes, as an entry of DATASETS.CUSTOM."""
    data = json.loads((shapes_folder / "shapes" / "val.json").read_text())
    for category, name in zip(data["categories"], names, strict=True):
        category["name"] = name
    (folder / "others.json").write_text(json.dumps(data))
    images = str(shapes_folder / "shapes" / "val")
    return {"FORMAT": "coco", "JSON": str(folder / "others.json"), "IMAGES": images}


def forget():
    """As in another process, on a machine without the data."""
    for name in ("shapes_train", "shapes_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_checkpoints_and_the_config_of_a_run_say_the_classes(trained):
    saved = torch.load(trained / "model_final.pth", weights_only=True)
    assert saved["class_names"] == CLASSES and saved["category_ids"] == [1, 2, 3]
    (trained / "from_checkpoint.yaml").write_text(saved["config"])
    for file in ("config.yaml", "from_checkpoint.yaml"):
        cfg = load_cfg(str(trained / file))
        assert cfg.DATASETS.CUSTOM.shapes_val.CLASSES == CLASSES
        assert cfg.MODEL.FCOS.NUM_CLS_CONVS == 1


def test_predictors_show_names_where_the_data_is_not(trained, monkeypatch, tmp_path):
    forget()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    cfg = load_cfg(str(trained / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(trained / "model_final.pth")
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.0
    image = np.zeros((64, 64, 3), np.uint8)
    for predictor in (DefaultPredictor(cfg), Predictor(cfg)):
        assert list(predictor.metadata.thing_classes) == CLASSES
        instances = predictor(image)["instances"][:1]
        drawn = Visualizer(image, predictor.metadata).draw_instance_predictions(instances)
        (label,) = [text.get_text() for text in drawn.ax.texts]
        assert label.split()[0] in CLASSES
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN = ()
    assert Predictor(cfg).metadata.thing_classes == CLASSES  # of the checkpoint


def test_weights_without_names_are_loaded_as_before(trained):
    cfg = load_cfg(str(trained / "config.yaml"))
    saved = torch.load(trained / "model_final.pth")
    torch.save(saved["model"], trained / "plain.pth")
    cfg.MODEL.WEIGHTS = str(trained / "plain.pth")
    evaluate(cfg)
    assert Predictor(cfg).metadata.thing_classes == CLASSES  # of the data set
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN = ()
    assert Predictor(cfg).metadata.get("thing_classes", None) is None


@pytest.mark.parametrize(
    ("names", "how"),
    [(["a", "b", "c"], "unlike"), (["square", "disc", "triangle"], "in another order than")],
)
def test_evaluation_on_other_classes_is_refused(trained, shapes_folder, tmp_path, names, how):
    cfg = load_cfg(str(trained / "config.yaml"))
    entry = other_classes(shapes_folder, tmp_path, names)
    cfg.DATASETS.CUSTOM.others = type(cfg)(entry, new_allowed=True)
    cfg.DATASETS.TEST = ("others",)
    cfg.MODEL.WEIGHTS = str(trained / "model_final.pth")
    register_custom_datasets(cfg)
    with pytest.raises(ValueError, match=rf"'others' has the classes \['{names[0]}.*{how} the det"):
        evaluate(cfg)


def test_classes_of_a_coco_entry_must_be_those_of_its_file(trained, shapes_folder, tmp_path):
    entry = other_classes(shapes_folder, tmp_path, ["a", "b", "c"])
    cfg = load_cfg(str(trained / "config.yaml"))
    cfg.DATASETS.CUSTOM.others = type(cfg)({**entry, "CLASSES": CLASSES}, new_allowed=True)
    register_custom_datasets(cfg)
    with pytest.raises(ValueError, match=r"others\.json has the classes \['a'.*CLASSES of the"):
        DatasetCatalog.get("others")


@pytest.mark.parametrize("names", [["a", "b", "c"], ["a", "b", "c", "d"]])
def test_fine_tuning_starts_the_class_layer_anew(
    trained, shapes_folder, tmp_path, monkeypatch, caplog, names
):
    """Also where the number of classes is the same."""
    logging.getLogger("fvcore").propagate = True
    caplog.set_level(logging.INFO, logger="fvcore.common.checkpoint")
    before = torch.load(trained / "model_final.pth")["model"]
    cfg = load_cfg(str(trained / "config.yaml"))
    entry = other_classes(shapes_folder, tmp_path, names[:3])
    data = json.loads(Path(entry["JSON"]).read_text())
    data["categories"] += [{"id": 9, "name": name} for name in names[3:]]
    Path(entry["JSON"]).write_text(json.dumps(data))
    cfg.DATASETS.CUSTOM.others = type(cfg)(entry, new_allowed=True)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("others",)
    cfg.MODEL.FCOS.NUM_CLASSES = len(names)
    cfg.MODEL.WEIGHTS = str(trained / "model_final.pth")
    cfg.OUTPUT_DIR = str(tmp_path)
    register_custom_datasets(cfg)
    trainer = Trainer(cfg)
    initial = trainer.model.head.cls_logits.weight.detach().clone()
    trainer.resume_or_load(resume=False)
    assert torch.equal(trainer.model.head.cls_logits.weight, initial)
    for name, value in trainer.model.state_dict().items():
        assert name.startswith("head.cls_logits") or torch.equal(value, before[name])
    line = next(x for x in caplog.messages if "of the model's" in x)
    assert line.endswith("Initial values keep head.cls_logits.weight, head.cls_logits.bias")


def test_predictions_have_the_category_ids_of_the_data_set(trained, shapes_folder, tmp_path):
    """Also where the data set is not at hand: COCO's tools compare results by these numbers."""
    forget()
    image = str(shapes_folder / "shapes" / "val" / "0001.png")
    predict.main(["--weights", str(trained / "model_final.pth"), "--input", image, "--json",
                  "--output", str(tmp_path / "out"),
                  "MODEL.FCOS.SCORE_THRESH_TEST", "0.0"])  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    truth = json.loads((shapes_folder / "shapes" / "val.json").read_text())
    ids = {category["name"]: category["id"] for category in truth["categories"]}
    assert ids == {"disc": 1, "square": 2, "triangle": 3}
    assert len(results["annotations"]) == 100
    assert {c["name"]: c["id"] for c in results["categories"]} == ids
    assert {r["category_id"] for r in results["annotations"]} <= set(ids.values())
