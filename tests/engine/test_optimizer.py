"""SOLVER.OPTIMIZER and SOLVER.LAYER_DECAY, and how their state resumes."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as build_detectron2s
from helpers import tiny_cfg
from test_resuming import EVALUATION, run

from fcos_d2 import load_cfg, model_zoo
from fcos_d2.checkpoint import read_checkpoint
from fcos_d2.engine import Trainer
from fcos_d2.engine.optimizer import build_optimizer

ADAMW = {"OPTIMIZER": "AdamW", "BASE_LR": 1e-4, "WEIGHT_DECAY": 0.05, "WEIGHT_DECAY_BIAS": 0.0}


def with_solver(cfg, **keys):
    cfg.SOLVER.update(keys)
    return cfg


def groups(model, optimizer):
    """{name of a parameter: (rate, weight decay)}"""
    names = {x: name for name, x in model.named_parameters()}
    return {
        names[x]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for x in group["params"]
    }


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: EVALUATION))


def test_the_default_is_detectron2s():
    cfg = with_solver(tiny_cfg(), BIAS_LR_FACTOR=2.0, WEIGHT_DECAY_BIAS=0.0)
    model = build_model(cfg)
    ours, theirs = build_optimizer(cfg, model), build_detectron2s(cfg, model)
    assert groups(model, ours) == groups(model, theirs)
    assert ours.defaults == theirs.defaults and type(ours).__name__ == "SGDWithGradientClip"


def test_adamw_with_detectron2s_keys():
    cfg = with_solver(tiny_cfg(), **ADAMW, WEIGHT_DECAY_NORM=0.01)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert type(optimizer).__name__ == "AdamWWithGradientClip"  # SOLVER.CLIP_GRADIENTS
    found = groups(model, optimizer)
    assert found["head.cls_logits.weight"] == (1e-4, 0.05)
    assert found["head.cls_logits.bias"] == (1e-4, 0.0)
    assert found["head.cls_tower.1.weight"] == (1e-4, 0.01)  # GN
    assert len(found) == len(list(model.parameters()))


def test_rates_fall_from_stage_to_stage():
    cfg = with_solver(tiny_cfg(), LAYER_DECAY=0.5)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    rates = {
        name: rate / cfg.SOLVER.BASE_LR for name, (rate, _) in groups(model, optimizer).items()
    }
    assert optimizer.defaults["momentum"] == cfg.SOLVER.MOMENTUM
    stages = ["stem", "res2", "res3", "res4", "res5"]
    for i, stage in enumerate(stages):
        prefix = f"backbone.bottom_up.{stage}."
        assert {x for name, x in rates.items() if name.startswith(prefix)} == {0.5 ** (5 - i)}
    others = {x for name, x in rates.items() if not name.startswith("backbone.bottom_up.")}
    assert others == {1.0}


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # Stem and four stages: five steps.
        ("convnext_atto", {"stem_1": 5, "stages_0": 4, "stages_3": 1}),
        # Stem and seven stages of blocks; the stem's norm comes before them.
        ("mobilenetv3_small_050", {"conv_stem": 7, "bn1": 7, "blocks.0": 6, "blocks.5": 1}),
        ("resnet18", {"conv1": 5, "bn1": 5, "layer1": 4, "layer4": 1}),
    ],
)
def test_stages_of_timm(name, rates):
    pytest.importorskip("timm")
    cfg = with_solver(tiny_cfg(), **ADAMW, LAYER_DECAY=0.5)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TIMM.NAME = "build_fcos_timm_fpn_backbone", name
    model = build_model(cfg)
    found = groups(model, build_optimizer(cfg, model))
    for module, exponent in rates.items():
        prefix = f"backbone.bottom_up.model.{module}."
        of_module = {rate for n, (rate, _) in found.items() if n.startswith(prefix)}
        assert of_module == {1e-4 * 0.5**exponent}, module
    gains = [n for n in found if n.endswith(".gamma")]
    assert len(gains) == (0 if name != "convnext_atto" else 12)
    assert all(found[n][1] == 0 for n in gains)  # decayed as norms are


def test_a_large_batch_may_have_a_large_rate():
    cfg = with_solver(tiny_cfg(), OPTIMIZER="AdamW", BASE_LR=0.004, IMS_PER_BATCH=256)  # RTMDet's
    assert build_optimizer(cfg, build_model(cfg)).defaults["lr"] == 0.004


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"OPTIMIZER": "Adam"}, r"one of \['SGD', 'AdamW'\], got 'Adam'"),
        ({"OPTIMIZER": "AdamW"}, r"0\.02 is a rate for SGD.*0\.0001 for 16 images.*0\.05"),
        ({"LAYER_DECAY": 0.0}, r"LAYER_DECAY must be in \(0, 1\], got 0\.0"),
        ({"LAYER_DECAY": 0.9, "BIAS_LR_FACTOR": 2.0}, "set one of them to 1.0"),
    ],
)
def test_values_that_cannot_be(keys, message):
    cfg = with_solver(tiny_cfg(), **keys)
    with pytest.raises(ValueError, match=message):
        build_optimizer(cfg, build_model(cfg))


def test_a_backbone_without_known_stages_is_refused():
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="no stages in the backbone Linear"):
        build_optimizer(with_solver(tiny_cfg(), LAYER_DECAY=0.9), model)


def test_the_config_of_convnext_has_the_rates_of_its_authors():
    name = "COCO-Detection/fcos_timm_convnext_tiny_FPN_1x.yaml"
    solver = load_cfg(model_zoo.get_config_file(name)).SOLVER
    assert {key: solver[key] for key in ADAMW} == ADAMW
    assert solver.LAYER_DECAY == 0.95 and solver.IMS_PER_BATCH == 16


@pytest.mark.usefixtures("no_evaluation")
def test_adamw_and_cosine_resume_exactly(cfg, tmp_path):
    with_solver(cfg, **ADAMW, LAYER_DECAY=0.8, LR_SCHEDULER_NAME="WarmupCosineLR", STEPS=())
    cfg.SEED = 3
    cfg.MODEL.WEIGHTS = str(tmp_path / "initial.pth")
    torch.save(Trainer.build_model(cfg).state_dict(), cfg.MODEL.WEIGHTS)
    runs = {}
    for name, stops in {"stopped": (3, 5), "undisturbed": ()}.items():
        cfg.OUTPUT_DIR = str(tmp_path / name)
        (tmp_path / name).mkdir()
        for i, stop in enumerate(stops):
            run(cfg, resume=i > 0, killed_before=stop)
        trainer = run(cfg, resume=bool(stops))
        moments = [x for s in trainer.optimizer.state.values() for x in s.values()]
        runs[name] = [*trainer.model.state_dict().values(), *moments]
    assert len(runs["stopped"]) > 300
    pairs = zip(runs["stopped"], runs["undisturbed"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.usefixtures("no_evaluation")
def test_another_optimizer_cannot_go_on(cfg, tmp_path, caplog):
    run(cfg, killed_before=3)
    # A checkpoint of before there was a choice: it was SGD, and nothing has changed.
    file = tmp_path / "model_0000001.pth"
    checkpoint = read_checkpoint(str(file))
    lines = checkpoint["config"].splitlines(keepends=True)
    new_keys = ("  OPTIMIZER:", "  LAYER_DECAY:", "  ACCUMULATE:", "  EMA:", "    DECAY:")
    checkpoint["config"] = "".join(x for x in lines if not x.startswith(new_keys))
    assert len(lines) == checkpoint["config"].count("\n") + 5
    torch.save(checkpoint, file)
    Trainer(cfg).resume_or_load()
    assert "The config differs" not in caplog.text
    with_solver(cfg, **ADAMW)
    trainer = Trainer(cfg)
    with pytest.raises(ValueError, match=r"SOLVER\.OPTIMIZER was SGD and is AdamW.*MODEL\.WEIGHTS"):
        trainer.resume_or_load()
