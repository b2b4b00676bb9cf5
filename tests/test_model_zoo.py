import copy
import os
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from helpers import make_input

from fcos_d2 import model_zoo
from fcos_d2.data import DatasetMapper
from fcos_d2.modeling import ATSSAssigner, SimOTAAssigner, TaskAlignedAssigner
from fcos_d2.runtime import FoldedConv2d

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
YAMLS = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))


TRIED = set()


def what_a_step_depends_on(cfg):
    """All but the starting weights, the length of the training, and its images."""
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS, cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER = "", (), 0
    return f"{cfg.MODEL}{cfg.SOLVER}{cfg.TEST}"


@pytest.mark.parametrize("name", YAMLS)
def test_every_config_trains_and_infers_a_step(name):
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.TIMM.PRETRAINED = False  # which downloads
    if what_a_step_depends_on(cfg) in TRIED:
        return  # with another config, which has another schedule
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    before = copy.deepcopy(model.state_dict())
    # Batch norm needs two values or more, also on P7, where the BiFPN has one.
    image = make_input(size=(64, 192) if "BiFPN" in name else (64, 64))
    with EventStorage(0):
        losses = model.train()([image])
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    optimizer.step()
    after = model.state_dict()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    # All but those that had no part in this picture, as the levels whose size no box has.
    assert sum(not torch.equal(before[n], after[n]) for n in trained) > 0.5 * len(trained)
    with torch.no_grad():
        (results,) = model.eval()([image])[0].values()
    assert len(results) <= max(cfg.TEST.DETECTIONS_PER_IMAGE, cfg.MODEL.RPN.POST_NMS_TOPK_TEST)
    TRIED.add(what_a_step_depends_on(cfg))


def reduced(cfg):
    """The same config on a small backbone."""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.NUM_GROUPS = 1
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.PRETRAINED = "mobilenetv3_small_050", False
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.FCOS.NUM_CLASSES = 3
    return cfg


def behaviour(cfg):
    """Losses and detections of a seeded model with dozens of overlapping detections."""
    torch.manual_seed(0)
    model = build_model(cfg)
    head = model.head if hasattr(model, "head") else model.proposal_generator.head
    torch.nn.init.normal_(head.cls_logits.weight, std=0.5)
    torch.nn.init.normal_(head.bbox_pred.weight, std=0.3)
    torch.nn.init.normal_(head.cls_logits.bias, std=1.0)
    torch.nn.init.constant_(head.bbox_pred.bias, 3.0)  # boxes of some strides, which overlap
    batch = [make_input(((10.0, 8.0, 100.0, 90.0), (20.0, 20.0, 60.0, 40.0)), (1, 2), (128, 128))]
    losses = {k: round(v.item(), 5) for k, v in model.train()(batch).items()}
    with torch.no_grad():
        (results,) = model.eval()(batch)[0].values()
    assert len(results) > 10
    fields = results.get_fields()
    scores = fields.get("scores", fields.get("objectness_logits"))
    boxes = fields.get("pred_boxes", fields.get("proposal_boxes")).tensor
    return losses, scores.tolist(), boxes.tolist(), sorted(model.state_dict())


def changed_fcos_keys(name):
    """The keys of MODEL.FCOS that a config sets itself, and those of the config it is based on."""
    with open(CONFIGS / name) as f:
        own = yaml.safe_load(f)
    base = own.get("_BASE_")
    if base is None:
        return {}, None
    base = os.path.normpath(Path(name).parent / base)
    return own.get("MODEL", {}).get("FCOS", {}), base


CHANGES = [(n, k) for n in YAMLS for k in changed_fcos_keys(n)[0] if k != "NUM_CLASSES"]


@pytest.mark.parametrize("name, key", CHANGES)
def test_every_key_that_a_config_changes_changes_behaviour(name, key):
    _, base = changed_fcos_keys(name)
    cfg, reverted = reduced(model_zoo.get_config(name)), reduced(model_zoo.get_config(name))
    reverted.MODEL.FCOS[key] = model_zoo.get_config(base).MODEL.FCOS[key]
    assert cfg.MODEL.FCOS[key] != reverted.MODEL.FCOS[key], "the config sets what its base has"
    try:
        before = behaviour(reverted)
    except ValueError:  # refused: the key makes sense only together with the others of the file
        for other in changed_fcos_keys(name)[0]:
            reverted.MODEL.FCOS[other] = model_zoo.get_config(base).MODEL.FCOS[other]
        base_cfg = model_zoo.get_config(base)
        reverted.SOLVER.ATSS_ITERS = base_cfg.SOLVER.ATSS_ITERS
        reverted.MODEL.FPN.IN_FEATURES = base_cfg.MODEL.FPN.IN_FEATURES
        reverted.MODEL.RESNETS.OUT_FEATURES = base_cfg.MODEL.RESNETS.OUT_FEATURES
        before = behaviour(reduced(reverted))
    assert behaviour(cfg) != before


_TOWERS = ("share", "cls", "bbox")


@pytest.mark.parametrize("name", [n for n in YAMLS if "dcnv2" in n])
def test_deformable_layers_are_where_the_config_says(name):
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    names = [
        n for n, m in build_model(cfg).named_modules() if type(m).__name__.endswith("DeformConv")
    ]
    stages = {n.split(".")[2] for n in names if "bottom_up" in n}
    assert stages == ({"res4", "res5"} if "X_101" in name else {"res3", "res4", "res5"})
    # Two modules each: the layer and, inside, its operator.
    towers = {n: sum(name.startswith(f"head.{n}_tower") for name in names) for n in _TOWERS}
    is_tood = "tood" in name  # the first two of its stack
    assert towers == (
        {"share": 4, "cls": 0, "bbox": 0} if is_tood else {"share": 0, "cls": 2, "bbox": 2}
    )


def test_lazy_config_builds_the_model_of_the_yaml():
    lazy = model_zoo.get_config("common/models/fcos.py").model
    ours = instantiate(lazy)
    cfg = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    yaml = build_model(cfg)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in yaml.state_dict().items()
    }
    ours.load_state_dict(yaml.state_dict())
    batch = [make_input(size=(64, 64))]
    for key, value in yaml.train()(batch).items():
        torch.testing.assert_close(ours.train()(batch)[key], value)
    folded = [m for m in ours.modules() if isinstance(m, FoldedConv2d)]
    assert len(folded) == 53  # as many as in the YAML's model, and all of ResNet-50
    lazy.head.quality = "iou"
    with pytest.raises(ValueError, match="the same quality, got head 'iou', loss 'centerness'"):
        instantiate(lazy)


def test_lazy_config_changed_to_gfl_is_that_of_the_yaml():
    lazy = model_zoo.get_config("common/models/fcos.py").model
    lazy.assigner = L(ATSSAssigner)()
    lazy.head.update(box_activation="distribution", quality="joint")
    lazy.loss.update(
        quality="joint", cls_loss_type="quality_focal", box_loss_weighting="score",
        box_loss_weight=2.0,
    )  # fmt: skip
    lazy.post_processor.quality = "joint"
    lazy.location_offset = 0.0
    cfg = model_zoo.get_config("Successors/gfl_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.FCOS.TOP_RELU = "cpu", True
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    ours, yaml = instantiate(lazy), build_model(cfg)
    ours.load_state_dict(yaml.state_dict())
    ours.pixel_mean, ours.pixel_std = yaml.pixel_mean, yaml.pixel_std
    batch = [make_input(size=(64, 64))]
    found = ours.train()(batch)
    assert set(found) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_dfl"}
    for key, value in yaml.train()(batch).items():
        torch.testing.assert_close(found[key], value)


def test_lazy_config_with_a_rule_that_sees_predictions():
    lazy = model_zoo.get_config("common/models/fcos.py").model
    lazy.assigner = L(SimOTAAssigner)(candidate_topk=7)
    losses = instantiate(lazy).train()([make_input(size=(64, 64))])
    assert all(x.isfinite() for x in losses.values())
    lazy.assigner = L(TaskAlignedAssigner)(atss_iters=5)
    with pytest.raises(ValueError, match="'task_aligned' and BOX_LOSS_WEIGHTING 'alignment' need"):
        instantiate(lazy)


COMPLETE = ["COCO-Detection/fcos_R_50_FPN_1x", "quick_schedules/fcos_R_18_FPN_shapes"]


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_lazy_configs_are_their_yamls(name, shapes_folder, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    lazy, cfg = model_zoo.get_config(f"{name}.py"), model_zoo.get_config(f"{name}.yaml")
    assert set(lazy) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    cfg.MODEL.DEVICE = "cpu"
    models = {"lazy": instantiate(lazy.model), "yaml": build_model(cfg)}
    parameters = [
        {n: (p.shape, p.requires_grad) for n, p in m.named_parameters()} for m in models.values()
    ]
    assert parameters[0] == parameters[1]
    assert torch.equal(models["lazy"].pixel_mean, models["yaml"].pixel_mean)
    assert torch.equal(models["lazy"].pixel_std, models["yaml"].pixel_std)

    lazy.optimizer.params.model = models["lazy"]
    optimizers = [instantiate(lazy.optimizer), build_optimizer(cfg, models["yaml"])]
    clipped = cfg.SOLVER.CLIP_GRADIENTS.ENABLED  # then with half the learning rate: see the config
    assert lazy.optimizer.lr == cfg.SOLVER.BASE_LR / (2 if clipped else 1)
    decays = [{(g["weight_decay"], g["momentum"]) for g in o.param_groups} for o in optimizers]
    assert decays[0] == decays[1]
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    multiplier = instantiate(lazy.lr_multiplier)
    rates = build_lr_scheduler(cfg, optimizers[1])
    for step in (0, 20, *cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER - 1):
        rates.last_epoch = step
        expected = rates.get_lr()[0] / cfg.SOLVER.BASE_LR
        assert multiplier(step / cfg.SOLVER.MAX_ITER) == pytest.approx(expected)

    loaders = lazy.dataloader
    assert [loaders.train.dataset.names] == list(cfg.DATASETS.TRAIN)
    assert [loaders.test.dataset.names] == list(cfg.DATASETS.TEST)
    assert loaders.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    mappers = [instantiate(loader.mapper) for loader in (loaders.train, loaders.test)]
    for is_train, mapper in zip((True, False), mappers, strict=True):
        expected = DatasetMapper(cfg, is_train=is_train)
        resize, *flip = mapper.augmentations.augs
        expected_resize, *expected_flip = expected.augmentations.augs
        assert set(resize.short_edge_length) == set(expected_resize.short_edge_length)
        assert resize.max_size == expected_resize.max_size
        assert str(flip) == str(expected_flip)
        assert mapper.image_format == expected.image_format


def test_a_complete_lazy_config_trains_a_step(shapes_folder, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    lazy = model_zoo.get_config("quick_schedules/fcos_R_18_FPN_shapes.py")
    model = instantiate(lazy.model)
    lazy.optimizer.params.model = model
    optimizer = instantiate(lazy.optimizer)
    before = copy.deepcopy(model.head.state_dict())
    batch = next(iter(instantiate(lazy.dataloader.train)))
    assert len(batch) == 4
    sum(model(batch).values()).backward()
    optimizer.step()
    changed = [not torch.equal(before[k], v) for k, v in model.head.state_dict().items()]
    assert sum(changed) > 0.5 * len(changed)
    test_record = next(iter(instantiate(lazy.dataloader.test)))
    with torch.no_grad():
        assert "instances" in model.eval()(test_record)[0]
    assert instantiate(lazy.dataloader.evaluator) is not None


def test_get_builds_a_lazy_config(tmp_path):
    name = "quick_schedules/fcos_R_18_FPN_shapes"
    first = model_zoo.get(f"{name}.yaml", weights="", device="cpu")
    torch.save({"model": first.state_dict()}, tmp_path / "m.pth")
    second = model_zoo.get(f"{name}.py", weights=str(tmp_path / "m.pth"), device="cpu")
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert model_zoo.get("common/models/fcos.py", device="cpu").num_classes == 80


@pytest.mark.parametrize("name", ["x.yaml", "x.py"])
def test_unknown_config_lists_what_there_is(name):
    with pytest.raises(FileNotFoundError) as error:
        model_zoo.get_config(name)
    assert str(error.value).startswith(f"No config {name!r}. The configs are: ")
    for known in ("fcos_R_50_FPN_1x.yaml", "common/models/fcos.py"):
        assert known in str(error.value)


def test_get_builds_from_a_checkpoint(tmp_path):
    name = "quick_schedules/fcos_R_18_FPN_shapes.yaml"
    first = model_zoo.get(name, weights="", device="cpu")
    torch.save({"model": first.state_dict()}, tmp_path / "m.pth")
    second = model_zoo.get(name, weights=str(tmp_path / "m.pth"), device="cpu")
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])


def test_wheel_holds_the_configs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"fcos_d2/configs/{y}" for y in YAMLS} <= set(names)
    assert "fcos_d2/py.typed" in names
    assert {"fcos_d2/modeling/fcos.py", "fcos_d2/configs/common/models/fcos.py"} <= set(names)
