"""TEST.LOSS: the losses on the test images."""

import json
import os
import signal
import time

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import ALIGNED, SIMOTA

from fcos_d2 import model_zoo
from fcos_d2.data import DatasetMapper, register_custom_datasets
from fcos_d2.engine import Stopped, Trainer, evaluate, held_out_losses
from fcos_d2.engine.held_out_losses import with_losses
from fcos_d2.engine.stopping import stop_signals
from fcos_d2.modeling.points import centerness


@pytest.fixture
def few(cfg, shapes_folder, tmp_path):
    """The config with six test images, one of them without boxes."""
    data = json.loads((shapes_folder / "shapes" / "val.json").read_text())
    with_boxes = {a["image_id"] for a in data["annotations"]}
    images = [i for i in data["images"] if i["id"] in with_boxes][:5]
    images += [i for i in data["images"] if i["id"] not in with_boxes][:1]
    assert len(images) == 6
    kept = {image["id"] for image in images}
    data["images"] = images
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in kept]
    (tmp_path / "few.json").write_text(json.dumps(data))
    cfg.DATASETS.CUSTOM.few = type(cfg)(
        {"FORMAT": "coco", "JSON": str(tmp_path / "few.json"), "IMAGES": "shapes/val"}
    )
    register_custom_datasets(cfg)
    cfg.DATASETS.TEST = ("few",)
    cfg.TEST.LOSS = True
    return cfg


def at_random(model):
    """Statistics and normalisers as after a training."""
    with torch.no_grad():
        for name, x in model.named_buffers():
            if name.endswith(("running_mean", "running_var", "ema_num_positives")):
                x.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("keys", [SIMOTA, ALIGNED], ids=lambda keys: keys["ASSIGNMENT"])
def test_rules_that_see_predictions(few, keys):
    """Beside the sums of each image. ATSS_ITERS are for trainings."""
    few.merge_from_list([x for key, value in keys.items() for x in (f"MODEL.FCOS.{key}", value)])
    few.SOLVER.ATSS_ITERS = 100 if keys is ALIGNED else 0
    model = at_random(build_model(few))
    torch.nn.init.constant_(model.head.bbox_pred.bias, 2)  # predicts boxes that meet others
    found = with_losses({}, few, model)["test"]
    of_images = held_out_losses._losses_of(model, few)
    mapper, sums = DatasetMapper(few, True, augmentations=[]), {}
    for record in DatasetCatalog.get("few"):
        for name, value in of_images([mapper(record)]).items():
            sums[name] = sums.get(name, 0) + value.item()
    for name in ("loss_fcos_cls", "loss_fcos_loc"):
        assert found[name] == pytest.approx(sums[name] / sums[f"{name}/divisor"], rel=1e-4)
    # All classes are divided by the alignments, which are no whole number.
    assert (sums["loss_fcos_cls/divisor"] % 1 == 0) == (keys is SIMOTA)


@pytest.mark.parametrize("weighting", ["quality", "none"])
def test_losses_are_those_of_all_images_by_their_positives(few, weighting):
    """Beside the training's own losses, image by image, with each batch norm fixed by hand."""
    few.MODEL.FCOS.BOX_LOSS_WEIGHTING = weighting
    model = at_random(build_model(few))
    found = with_losses({}, few, model)["test"]

    few.MODEL.FCOS.LOSS_NORMALIZER = "fg"
    plain = build_model(few)
    plain.load_state_dict(model.state_dict(), strict=False)
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    seen = []
    plain.loss.register_forward_hook(lambda m, args, losses: seen.append((args[1], losses)))
    for record in DatasetCatalog.get("few"):
        mapper = DatasetMapper(few, False)
        image = mapper(record)
        trained = DatasetMapper(few, True, augmentations=mapper.augmentations.augs)(record)
        assert torch.equal(image["image"], trained["image"])
        with torch.no_grad():
            plain([trained])
    positives = [len(targets) for targets, _ in seen]
    assert min(positives) == 0 < max(positives)
    weights = [centerness(targets.ltrb).sum().item() for targets, _ in seen]
    for name in ("loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"):
        by = weights if name == "loss_fcos_loc" and weighting == "quality" else positives
        # An image without positives is divided by 1.
        sums = [losses[name].item() * (n or 1) for n, (_, losses) in zip(by, seen, strict=True)]
        assert found.pop(name) == pytest.approx(sum(sums) / sum(by), rel=1e-4)
    total = found.pop("total_loss")
    assert not found
    assert total > 0.5


@pytest.mark.parametrize("kind", ["fcos", "faster_rcnn_fcos", "dropout"])
def test_the_model_stays_as_it_is(few, kind):
    if kind == "faster_rcnn_fcos":
        few.merge_from_file(
            model_zoo.get_config_file("quick_schedules/faster_rcnn_fcos_R_18_FPN_shapes.yaml")
        )
        few.merge_from_list(["MODEL.DEVICE", "cpu", "DATASETS.TEST", ("few",)])
    model = at_random(build_model(few))
    if kind == "dropout":
        model.head.cls_tower.append(torch.nn.Dropout(0.5))
    state = {k: x.clone() for k, x in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with EventStorage() as storage:
        losses = with_losses({}, few, model)["test"]
        assert not storage.latest()  # the training's own metrics
    of_r_cnn = {"loss_cls", "loss_box_reg", "loss_fcos_loc"}
    assert (of_r_cnn <= losses.keys()) == (kind == "faster_rcnn_fcos")
    assert all(torch.equal(state[k], x) for k, x in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert with_losses({}, few, model)["test"] == losses  # nothing is drawn anew


def test_a_training_and_an_evaluation_write_them(few, tmp_path):
    few.TEST.EVAL_PERIOD, few.SOLVER.MAX_ITER = 1, 2
    few.DATALOADER.NUM_WORKERS = 2
    trainer = Trainer(few)
    results = trainer.train()
    assert results["test"].keys() == {
        "loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr", "total_loss",
    }  # fmt: skip
    history = trainer.storage.history("test/total_loss").values()
    assert [iteration for _, iteration in history] == [0, 2]
    assert history[0][0] != history[1][0]
    rows = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    (written,) = [row for row in rows if row["iteration"] == 2]
    assert written["test/loss_fcos_cls"] == results["test"]["loss_fcos_cls"]
    few.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    assert evaluate(few)["test"] == results["test"]


def test_of_several_test_sets_each_has_its_own(few):
    DatasetCatalog.register("unknown", lambda: [
        {k: x for k, x in record.items() if k != "annotations"}
        for record in DatasetCatalog.get("few")
    ])  # fmt: skip
    few.DATASETS.TEST = ("few", "unknown")
    results = with_losses({"few": {"bbox": 1}, "unknown": {}}, few, build_model(few))
    DatasetCatalog.remove("unknown")
    assert results["few"]["bbox"] == 1
    assert results["few"]["test"]["total_loss"] > 0
    assert results["unknown"] == {}


def test_a_signal_ends_it_at_once(few, monkeypatch):
    def sleeping(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    monkeypatch.setattr(held_out_losses, "inference_on_dataset", sleeping)
    with stop_signals.recorded(), pytest.raises(Stopped):
        with_losses({}, few, build_model(few))


def test_they_are_computed_in_the_precision_of_the_training(few):
    model = build_model(few)
    exact = with_losses({}, few, model)["test"]
    few.SOLVER.AMP.ENABLED = True
    half = with_losses({}, few, model)["test"]
    assert half != exact
    for name, value in exact.items():
        assert half[name] == pytest.approx(value, rel=0.05)
