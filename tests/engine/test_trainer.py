import json
import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import JSONWriter
from helpers import ALIGNED

from fcos_d2 import model_zoo
from fcos_d2.data import register_custom_datasets
from fcos_d2.engine import BestCheckpointer, Trainer, evaluate, setup


class Stop(HookBase):
    """Ends the run as a kill would, in the middle of an iteration."""

    def before_step(self):
        if self.trainer.iter == 5:
            raise KeyboardInterrupt


def test_resumed_run_continues_from_the_last_checkpoint(cfg, monkeypatch):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: {}))
    killed = Trainer(cfg)
    killed.register_hooks([Stop()])
    states = {}

    class Remember(HookBase):
        def after_step(self):
            optimizer = self.trainer.optimizer
            states[self.trainer.iter] = (
                self.trainer.model.loss.ema_num_positives.item(),
                optimizer.param_groups[0]["lr"],
                [s["momentum_buffer"].clone() for s in optimizer.state.values()],
                {k: v.clone() for k, v in self.trainer.model.state_dict().items()},
            )

    killed.register_hooks([Remember()])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    # Checkpoints after the iterations 1 and 3 (counted from 0); iteration 4 is lost.
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4
    ema, lr, momentum, weights = states[3]
    assert resumed.model.loss.ema_num_positives.item() == ema != 100
    buffers = [s["momentum_buffer"] for s in resumed.optimizer.state.values()]
    assert len(buffers) == len(momentum) > 10
    assert all(torch.equal(a, b) for a, b in zip(buffers, momentum, strict=True))
    for key, value in weights.items():
        assert torch.equal(value, resumed.model.state_dict()[key])

    resumed.model.loss.ema_num_positives.fill_(1e6)
    resumed.train()
    assert resumed.iter == 6
    # STEPS (3,): a tenth of the rate from the fourth iteration on, also after resuming.
    assert lr == pytest.approx(cfg.SOLVER.BASE_LR * 0.1)
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(cfg.SOLVER.BASE_LR * 0.1)
    # Training goes on with the buffer: two more steps of momentum 0.9 keep 0.81 of 1e6, and the
    # few positives of two images add next to nothing.
    assert resumed.model.loss.ema_num_positives.item() == pytest.approx(0.81e6, rel=1e-3)


def test_the_newest_checkpoints_are_kept(cfg, monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: {}))
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINTS_KEPT = 1, 2
    killed = Trainer(cfg)
    killed.register_hooks([Stop()])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "model_0000003.pth", "model_0000004.pth"
    ]  # fmt: skip
    # The run goes on from the older one, and deletes those of its first process.
    (tmp_path / "model_0000004.pth").write_bytes(b"damaged")
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4
    resumed.train()
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "model_0000004.pth", "model_0000005.pth", "model_final.pth"
    ]  # fmt: skip
    cfg.SOLVER.CHECKPOINTS_KEPT = -1
    with pytest.raises(ValueError, match="CHECKPOINTS_KEPT must be at least 1, or 0 for all, got"):
        Trainer(cfg)


def test_best_checkpoint_survives_a_resumed_run(cfg, monkeypatch):
    aps = iter([20.0, 30.0, 25.0, 28.0, 40.0])
    monkeypatch.setattr(
        Trainer, "test", classmethod(lambda *args: {"bbox": {"AP": next(aps), "AP50": 1.0}})
    )
    cfg.TEST.EVAL_PERIOD = 2
    cfg.SOLVER.MAX_ITER = 4
    Trainer(cfg).train()  # 20 after iteration 1, 30 at the end, after iteration 3

    def best():
        saved = torch.load(f"{cfg.OUTPUT_DIR}/model_best.pth")
        return saved["best_metric"], saved["best_iter"], saved["iteration"]

    assert best() == (30.0, 3, 3)
    cfg.SOLVER.MAX_ITER = 8
    longer = Trainer(cfg)
    longer.resume_or_load(resume=True)
    assert longer.start_iter == 4
    longer.train()  # 25 and 28: neither replaces it
    assert best() == (30.0, 3, 3)
    cfg.SOLVER.MAX_ITER = 10
    longest = Trainer(cfg)
    longest.resume_or_load(resume=True)
    longest.train()  # 40 does
    assert best() == (40.0, 9, 9)


def test_best_checkpoint_hook_comes_right_after_evaluation(cfg):
    built = Trainer(cfg)._hooks
    (evaluation,) = (i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
    assert isinstance(built[evaluation + 1], BestCheckpointer)


def test_the_schedule_follows_the_images_that_are_trained_on(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: {"bbox": {"AP": 1.0}}))
    cfg.SOLVER.EPOCHS, cfg.SOLVER.IMS_PER_BATCH = 2, 2
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.01  # 5 of the 542 images that have boxes
    trainer = Trainer(cfg, given=["TEST.EVAL_PERIOD"])
    assert trainer.max_iter == 5  # 2 times 5 images, 2 a batch
    trainer.train()
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (written["SOLVER"]["MAX_ITER"], written["SOLVER"]["EPOCHS"]) == (5, 2)
    assert written["TEST"]["EVAL_PERIOD"] == cfg.TEST.EVAL_PERIOD
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 4
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").open()]
    assert [row["epoch"] for row in rows if "total_loss" in row] == [2.0]


def test_a_run_stopped_beside_the_end_of_atss_goes_on_as_if_it_was_not(cfg, monkeypatch):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: {}))
    for key, value in ALIGNED.items():
        cfg.MODEL.FCOS[key] = value
    cfg.SOLVER.ATSS_ITERS, cfg.SEED = 5, 3
    whole, stopped = cfg.clone(), cfg.clone()
    whole.OUTPUT_DIR, stopped.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/whole", f"{cfg.OUTPUT_DIR}/stopped"
    rules = []

    class Rule(HookBase):
        def after_step(self):
            rules.append(type(self.trainer.model.assigner.now(True)).__name__)

    torch.manual_seed(0)  # the same weights at the start
    trainer = Trainer(whole)
    trainer.register_hooks([Rule()])
    trainer.train()
    assert rules == ["ATSSAssigner"] * 5 + ["TaskAlignedAssigner"]
    torch.manual_seed(0)
    killed = Trainer(stopped)
    killed.register_hooks([Stop()])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = Trainer(stopped)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4
    resumed.train()
    ends = [torch.load(f"{c.OUTPUT_DIR}/model_final.pth")["model"] for c in (whole, stopped)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_atss_iterations_of_the_epochs_reach_the_model(cfg):
    for key, value in ALIGNED.items():
        cfg.MODEL.FCOS[key] = value
    cfg.SOLVER.ATSS_ITERS, cfg.SOLVER.EPOCHS, cfg.SOLVER.STEPS = 2, 1, ()  # 2 of 6 iterations
    trainer = Trainer(cfg)
    expected = trainer.max_iter // 3
    assert (trainer.cfg.SOLVER.ATSS_ITERS, trainer.model.assigner.atss_iters) == (expected,) * 2
    assert expected > 2


def test_evaluates_by_the_type_of_the_data_set(cfg, tmp_path):
    for name in ("shapes_val", "shapes_train"):
        DatasetCatalog.get(name)  # the evaluator reads the file that this names
    assert isinstance(Trainer.build_evaluator(cfg, "shapes_val"), COCOEvaluator)
    # Detections on several data sets do not write over each other.
    both = cfg.clone()
    both.DATASETS.TEST = ("shapes_val", "shapes_train")
    for name in both.DATASETS.TEST:
        folder = Trainer.build_evaluator(both, name)._output_dir
        assert folder == os.path.join(cfg.OUTPUT_DIR, "inference", name)
    (tmp_path / "Annotations").mkdir()
    MetadataCatalog.get("voc_like").set(
        evaluator_type="pascal_voc", dirname=str(tmp_path), split="x", year=2007, thing_classes=[]
    )
    assert isinstance(Trainer.build_evaluator(cfg, "voc_like"), PascalVOCDetectionEvaluator)
    MetadataCatalog.remove("voc_like")
    with pytest.raises(NotImplementedError, match="'nothing' has evaluator_type None"):
        Trainer.build_evaluator(cfg, "nothing")


def test_masks_are_evaluated_where_a_model_predicts_them(cfg, tmp_path):
    square = [10, 10, 30, 10, 30, 30, 10, 30]
    data = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 40}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400,
             "iscrowd": 0, "segmentation": [square]}
        ],
        "categories": [{"id": 1, "name": "square"}],
    }  # fmt: skip
    (tmp_path / "masks.json").write_text(json.dumps(data))
    entry = {"FORMAT": "coco", "JSON": str(tmp_path / "masks.json"), "IMAGES": str(tmp_path)}
    cfg.DATASETS.CUSTOM["with_masks"] = type(cfg)(entry)
    register_custom_datasets(cfg)
    (record,) = DatasetCatalog.get("with_masks")
    evaluator = Trainer.build_evaluator(cfg, "with_masks")
    evaluator.reset()
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[:, 10:30, 10:30] = True
    detections = Instances((40, 40), pred_boxes=Boxes([[10, 10, 30, 30]]), pred_masks=mask)
    detections.scores, detections.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    evaluator.process([record], [{"instances": detections}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)


def test_other_classes_in_the_test_set_are_an_error_before_training(cfg, tmp_path):
    file = Path(cfg.DATASETS.CUSTOM.shapes_val.JSON)
    data = json.loads((Path(os.environ["DETECTRON2_DATASETS"]) / file).read_text())
    names = [category["name"] for category in data["categories"]]
    for category, name in zip(data["categories"], names[::-1], strict=True):
        category["name"] = name
    (tmp_path / "swapped.json").write_text(json.dumps(data))
    cfg.DATASETS.CUSTOM.shapes_val.JSON = str(tmp_path / "swapped.json")
    register_custom_datasets(cfg)
    with pytest.raises(ValueError, match=r"'shapes_val' has the classes .* in another order"):
        Trainer(cfg)


def test_proposals_are_evaluated_by_their_recall(cfg):
    cfg.merge_from_file(model_zoo.get_config_file("quick_schedules/fcos_rpn_R_18_FPN_shapes.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    results = Trainer.test(cfg, Trainer.build_model(cfg))["box_proposals"]
    assert {"AR@100", "AR@1000"} <= results.keys()
    assert 0 <= results["AR@100"] <= results["AR@1000"] < 50  # at random


def test_wrong_number_of_classes_is_an_error_before_training(cfg):
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    message = r"NUM_CLASSES is 80, but .*'shapes_val' has 3 classes: \['disc', 'square', "
    with pytest.raises(ValueError, match=message):
        Trainer(cfg)
    with pytest.raises(ValueError, match="'shapes_val' has 3 classes"):
        Trainer.build_test_loader(cfg, "shapes_val")


@pytest.mark.parametrize(
    ("opts", "frozen", "norms"),
    [
        # The stem and res2 of R-50: 64*3*7*7, then 64*64 + 64*64*9 + 64*256 + 64*256 for the
        # shortcut, and twice 256*64 + 64*64*9 + 64*256; all norms are FrozenBN.
        (["BACKBONE.FREEZE_AT", 2, "RESNETS.NORM", "FrozenBN"], 222_400, 53),
        (["BACKBONE.FREEZE_AT", 2, "RESNETS.NORM", "BN"], 222_400, 11),
        (["BACKBONE.FREEZE_AT", 1, "RESNETS.NORM", "GN"], 9_408 + 2 * 64, 0),
        (["RESNETS.NORM", "FrozenBN"], 0, 53),
    ],
)
def test_a_random_start_must_learn_all_of_the_backbone(cfg, opts, frozen, norms):
    wide = ["STEM_OUT_CHANNELS", 64, "WIDTH_PER_GROUP", 64, "RES2_OUT_CHANNELS", 256]
    opts = [f"MODEL.{x}" if i % 2 == 0 else x for i, x in enumerate(opts)]
    opts += [f"MODEL.RESNETS.{x}" if i % 2 == 0 else x for i, x in enumerate(wide)]
    cfg.merge_from_list(opts)
    message = rf"{frozen:,} frozen values and {norms} fixed batch norms .*FREEZE_AT 0"
    with pytest.raises(ValueError, match=message):
        Trainer(cfg).resume_or_load(resume=False)
    Trainer(cfg)  # building alone is no start


@pytest.mark.parametrize("stopped", [False, True])
def test_a_diverged_training_saves_nothing_and_says_where(cfg, tmp_path, stopped):
    class Diverge(HookBase):
        def before_step(self):
            if self.trainer.iter == 3:
                torch.nn.init.constant_(trainer.model.head.cls_logits.bias, float("nan"))
                if stopped:
                    os.kill(os.getpid(), signal.SIGTERM)

    cfg.SOLVER.CHECKPOINT_PERIOD = 5
    trainer = Trainer(cfg)
    trainer.register_hooks([Diverge()])
    with pytest.raises(FloatingPointError, match="Loss became infinite or NaN at iteration=3"):
        trainer.train()
    assert not list(tmp_path.glob("*.pth"))


def test_an_error_in_the_last_step_is_no_end(cfg, tmp_path, monkeypatch):
    """Detectron2 evaluates then; other processes would wait for this one in their last step."""

    class Fail(HookBase):
        def before_step(self):
            if self.trainer.iter == 5:
                raise OSError("in the last step")

    cfg.TEST.EVAL_PERIOD = 0
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: evaluations.append(args)))
    evaluations, closed = [], []
    trainer = Trainer(cfg)
    trainer.register_hooks([Fail()])
    monkeypatch.setattr(JSONWriter, "close", lambda self: closed.append(self))
    with pytest.raises(OSError, match="in the last step"):
        trainer.train()
    assert not evaluations and len(closed) == 1
    assert not (tmp_path / "model_best.pth").exists()


def test_an_error_in_the_last_evaluation_closes_the_writers(cfg, monkeypatch):
    def fail(*args):
        raise OSError("in the evaluation")

    closed = []
    monkeypatch.setattr(Trainer, "test", classmethod(fail))
    monkeypatch.setattr(JSONWriter, "close", lambda self: closed.append(self))
    with pytest.raises(OSError, match="in the evaluation"):
        Trainer(cfg).train()
    assert len(closed) == 1


def test_augmentation_is_evaluated_at_the_end_of_training(cfg, evaluated_models):
    cfg.TEST.EVAL_PERIOD = 2
    cfg.SOLVER.MAX_ITER = 4
    Trainer(cfg).train()
    assert evaluated_models == ["FCOS", "FCOS", "FCOSWithTTA"]
    metrics = Path(cfg.OUTPUT_DIR, "metrics.json").read_text()
    assert '"bbox_TTA/AP": 1.0' in metrics


def test_best_proposals_are_kept_by_their_recall(cfg, tmp_path, monkeypatch):
    recalls = iter([50.0, 40.0])
    monkeypatch.setattr(
        Trainer, "test", classmethod(lambda *args: {"box_proposals": {"AR@1000": next(recalls)}})
    )
    cfg.merge_from_file(model_zoo.get_config_file("quick_schedules/fcos_rpn_R_18_FPN_shapes.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 2, 2, 1
    cfg.OUTPUT_DIR = str(tmp_path)
    Trainer(cfg).train()
    best = torch.load(tmp_path / "model_best.pth")
    assert (best["best_metric"], best["best_iter"]) == (50.0, 0)


def test_missing_config_file_is_said():
    with pytest.raises(ValueError, match="Name a config: --config-file"):
        setup(SimpleNamespace(config_file="", opts=[]))


@pytest.mark.parametrize("resume", [False, True])
def test_an_output_folder_elsewhere_is_refused_at_once(resume):
    config = model_zoo.get_config_file("quick_schedules/fcos_R_18_FPN_shapes.yaml")
    args = {"config_file": config, "opts": ["OUTPUT_DIR", "s3://bucket/run"], "resume": resume}
    with pytest.raises(ValueError, match="'s3://bucket/run' is no local folder"):
        setup(SimpleNamespace(**args))


def test_augmentation_of_other_models_is_refused_at_once():
    args = SimpleNamespace(
        config_file=model_zoo.get_config_file("Ablations/retinanet_R_50_FPN_1x.yaml"),
        opts=["TEST.AUG.ENABLED", "True"],
    )
    with pytest.raises(ValueError, match=r"TEST.AUG is offered for .* not 'RetinaNet'"):
        setup(args)


def test_gradients_are_clipped_where_the_ablation_says_so():
    cfg = model_zoo.get_config("Ablations/iccv_no_gn_R_50_FPN_1x.yaml")
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    optimizer = Trainer.build_optimizer(cfg, layers)
    before = [p.detach().clone() for p in layers.parameters()]
    for p in layers.parameters():
        p.grad = torch.full_like(p, 1e6)
    optimizer.step()
    # Each gradient is cut to norm 1, so that no parameter moves by more than the rate (and by what
    # weight decay adds, 1e-4 of a parameter below 1).
    for old, new in zip(before, layers.parameters(), strict=True):
        moved = (new - old).norm().item()
        assert moved == pytest.approx(cfg.SOLVER.BASE_LR, rel=1e-3)


def test_evaluation_without_fitting_weights_is_refused(cfg, tmp_path):
    with pytest.raises(ValueError, match=r"Name the weights to evaluate: MODEL\.WEIGHTS FILE"):
        evaluate(cfg)
    with pytest.raises(ValueError, match="There is no checkpoint in OUTPUT_DIR"):
        evaluate(cfg, resume=True)
    weights = Trainer.build_model(cfg).state_dict()
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    backbone = {k: v for k, v in weights.items() if k.startswith("backbone")}
    torch.save(backbone, cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match=r"do not fit the config: \d+ tensors .*head\.cls_tower"):
        evaluate(cfg)


def test_training_says_how_much_was_loaded(cfg, tmp_path, caplog):
    weights = Trainer.build_model(cfg).state_dict()
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    logging.getLogger("fvcore").propagate = True
    caplog.set_level(logging.INFO, logger="fvcore.common.checkpoint")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")

    def load(chosen):
        torch.save(chosen, cfg.MODEL.WEIGHTS)
        Trainer(cfg).resume_or_load(resume=False)

    chosen = {k: v for k, v in weights.items() if k.startswith("backbone")}
    load(chosen)
    count, total = (sum(x.numel() for x in w.values()) for w in (chosen, weights))
    assert f"Loaded {count:,} of the model's {total:,} values from the file" in caplog.text
    with pytest.raises(ValueError, match=r"nothing could be loaded\. The file has x, the model"):
        load({"x": torch.zeros(3)})
    stem = {k: v for k, v in weights.items() if ".stem." in k}
    with pytest.raises(ValueError, match="nothing but the stem of the backbone could be loaded"):
        load(stem)


@pytest.mark.parametrize("content", [b"damaged", None])
def test_best_checkpoint_without_a_record_does_not_stop_a_resumed_run(cfg, monkeypatch, content):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: {"bbox": {"AP": 5.0}}))
    cfg.TEST.EVAL_PERIOD, cfg.SOLVER.MAX_ITER = 2, 2
    Trainer(cfg).train()
    best = Path(cfg.OUTPUT_DIR) / "model_best.pth"
    if content is None:  # as Detectron2's own hook writes it
        torch.save({"model": {}, "iteration": 1}, best)
        content = best.read_bytes()
    best.write_bytes(content)
    cfg.SOLVER.MAX_ITER = 4
    longer = Trainer(cfg)
    longer.resume_or_load(resume=True)
    longer.train()
    assert torch.load(best)["best_metric"] == 5.0
    assert (best.parent / "model_best_unknown.pth").read_bytes() == content


def test_augmentation_starts_from_the_original_pixels(cfg, monkeypatch):
    DatasetCatalog.get("shapes_val")  # the evaluator reads the file that this names
    sizes = []

    def record(cls, cfg, model, evaluators=None):
        batch = next(iter(cls.build_test_loader(cfg, cfg.DATASETS.TEST[0])))
        sizes.append((tuple(batch[0]["image"].shape[1:]), (batch[0]["height"], batch[0]["width"])))
        return {}

    monkeypatch.setattr(Trainer, "test", classmethod(record))
    cfg.INPUT.MIN_SIZE_TEST = 64
    Trainer.test_with_TTA(cfg, Trainer.build_model(cfg))
    ((size, original),) = sizes
    assert size == original


def test_evaluate_the_last_checkpoint(cfg, monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, cfg, model, evaluators: model))
    trainer = Trainer(cfg)
    torch.nn.init.constant_(trainer.model.head.cls_logits.bias, 0.5)
    trainer.checkpointer.save("model_x")
    assert (evaluate(cfg, resume=True).head.cls_logits.bias == 0.5).all()
    cfg.MODEL.WEIGHTS = str(tmp_path / "zero.pth")
    torch.nn.init.constant_(trainer.model.head.cls_logits.bias, 0.0)
    torch.save(trainer.model.state_dict(), cfg.MODEL.WEIGHTS)
    assert (evaluate(cfg).head.cls_logits.bias == 0).all()
    logging.getLogger("detectron2").handlers.clear()
