import math

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from helpers import make_input, tiny_cfg

from fcos_d2.modeling import FCOS, FCOSHead, FCOSLoss, FCOSPostProcessor


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(tiny_cfg())


def detections(model, batch):
    model.eval()
    with torch.no_grad():
        return [x["instances"] for x in model(batch)]


def spread_logits(model):
    """Random weights as of a trained model: some locations well above the threshold."""
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.3)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.3)
    return model


def test_losses_are_finite_and_reach_every_parameter(model):
    model.train().zero_grad()
    losses = model([make_input(), make_input(seed=1)])
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    assert all(v.isfinite() and v > 0 for v in losses.values())
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without


@pytest.mark.parametrize(
    "batch",
    [
        [make_input((), ())],
        [make_input((), ()), make_input((), (), size=(32, 32))],
        [make_input(), make_input((), ())],
        [make_input(((4.0, 4.0, 4.0, 30.0),), (0,))],  # no area
        [make_input(((500.0, 500.0, 600.0, 600.0),), (0,))],  # outside the image
    ],
    ids=["empty", "both empty", "half empty", "no area", "outside"],
)
def test_images_without_positives(model, batch):
    model.train().zero_grad()
    losses = model(batch)
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("objects", [True, False])
def test_autocast(model, dtype, objects):
    batch = [make_input() if objects else make_input((), ())]
    model.train().zero_grad()
    with torch.autocast("cpu", dtype=dtype), EventStorage(0):
        losses = model(batch)
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", dtype=dtype):
        instances = detections(model, batch)[0]
    assert instances.pred_boxes.tensor.dtype == instances.scores.dtype == torch.float32


def test_logs_positives_per_image(model):
    model.train()
    with EventStorage(0) as storage:
        model([make_input(), make_input((), ())])
        positives = storage.latest()["fcos/positives_per_image"][0]
    # The box (10, 8, 50, 40) has its centre at (30, 24) and 40 x 32 pixels: level p3 only. Its
    # locations are 4 + 8 i: within 1.5 * 8 = 12 of the centre, x = 20, 28, 36 and y = 20, 28, and
    # 12 and 36 are at 12 exactly, not less. So 3 * 2 = 6, over two images 3 each.
    assert positives == 3


def test_visualisation_period():
    cfg = tiny_cfg()
    cfg.VIS_PERIOD = 1
    with EventStorage(0) as storage:
        build_model(cfg).train()([make_input()])
        assert len(storage._vis_data) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_image_with_nan_is_named(model, value, training):
    bad = make_input() | {"file_name": "broken.png"}
    bad["image"] = bad["image"].float()
    bad["image"][0, 3, 3] = value
    with pytest.raises(ValueError, match=r"broken\.png has NaN or infinite pixels"):
        model.train(training)([make_input(), bad])


def test_wrong_or_missing_annotations(model):
    with pytest.raises(ValueError, match="classes from 3 to 3, but the model has 3"):
        model.train()([make_input(classes=(3,))])
    with pytest.raises(ValueError, match="classes from -1 to -1"):
        model.train()([make_input(classes=(-1,))])
    with pytest.raises(ValueError, match="annotations are missing in training"):
        model.train()([{"image": make_input()["image"]}])


def test_a_refused_batch_leaves_no_trace(model):
    before = {k: v.clone() for k, v in model.train().state_dict().items()}
    for batch in ([{"image": make_input()["image"]}], [make_input(classes=(3,))]):
        with pytest.raises(ValueError):
            model(batch)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_detections_need_no_gradient(model):
    instances = spread_logits(model).eval()([make_input()])[0]["instances"]
    assert len(instances) > 5
    assert not instances.scores.requires_grad and not instances.pred_boxes.tensor.requires_grad


def test_detections_fit_the_requested_output_size(model):
    batch = [make_input() | {"height": 128, "width": 192}]
    instances = detections(spread_logits(model), batch)[0]
    assert instances.image_size == (128, 192)
    assert len(instances) > 5
    boxes = instances.pred_boxes.tensor
    assert (boxes >= 0).all() and (boxes <= torch.tensor([192, 128, 192, 128])).all()
    # The same image at its own size: boxes half as large.
    plain = detections(model, [make_input()])[0].pred_boxes.tensor
    torch.testing.assert_close(plain * 2, boxes)


def test_save_and_load_gives_the_same_detections(tmp_path):
    cfg = tiny_cfg(LOSS_NORMALIZER="ema_fg")
    first = spread_logits(build_model(cfg))
    first.train()([make_input()])  # moves the loss normaliser and the batch norm statistics
    DetectionCheckpointer(first, str(tmp_path)).save("model")
    second = build_model(cfg)
    DetectionCheckpointer(second).load(str(tmp_path / "model.pth"))
    assert second.loss.ema_num_positives == first.loss.ema_num_positives != 100
    a, b = (detections(m, [make_input()])[0] for m in (first, second))
    assert len(a) > 5
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    assert torch.equal(a.scores, b.scores)
    assert torch.equal(a.pred_classes, b.pred_classes)


def test_overfits_one_image():
    torch.manual_seed(1)
    model = build_model(tiny_cfg()).train()
    batch = [make_input(((10.0, 8.0, 50.0, 40.0), (56.0, 20.0, 90.0, 60.0)), (1, 2))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        optimizer.step()
    instances = detections(model, batch)[0]
    instances = instances[instances.scores > 0.4]
    truth = Boxes(batch[0]["instances"].gt_boxes.tensor)
    iou, which = pairwise_iou(truth, instances.pred_boxes).max(dim=1)
    assert (iou > 0.75).all()
    assert instances.pred_classes[which].tolist() == [1, 2]


def test_ranges_must_be_as_many_as_levels():
    with pytest.raises(ValueError, match=r"5 REGRESSION_RANGES for the 4 levels"):
        build_model(tiny_cfg(IN_FEATURES=["p3", "p4", "p5", "p6"], TOP_LEVELS=1))


def test_levels_go_from_fine_to_coarse():
    levels = ["p4", "p3", "p5", "p6", "p7"]
    with pytest.raises(ValueError, match=r"from the finest to the coarsest .*\[16, 8, 32, 64, 128"):
        build_model(tiny_cfg(IN_FEATURES=levels))


@pytest.mark.gpu
def test_gpu_annotations_with_a_wrong_class_are_errors():
    cfg = tiny_cfg()
    cfg.MODEL.DEVICE = "cuda"
    batch = [make_input(classes=(3,))]
    batch[0]["instances"] = batch[0]["instances"].to("cuda")
    with pytest.raises(ValueError, match="classes from 3 to 3, but the model has 3"):
        build_model(cfg).train()(batch)


def test_unknown_feature_is_named():
    with pytest.raises(ValueError, match=r"IN_FEATURES names \['p8'\], but the backbone makes"):
        build_model(tiny_cfg(IN_FEATURES=["p3", "p8"], TOP_LEVELS=0))


@pytest.mark.parametrize(
    "part, other, message",
    [
        ("head", {"quality": "iou"}, r"quality, got head 'iou', loss 'centerness', post-proc"),
        (
            "loss",
            {"quality": "none", "box_loss_weighting": "none"},
            r"quality, got head 'centerness', loss 'none', post-processor 'centerness'",
        ),
        ("post_processor", {"quality": "computed"}, r"quality, .*post-processor 'computed'"),
        ("head", {"num_classes": 20}, r"num_classes, got head 20, detector 3"),
        (
            "head",
            {"input_shape": [ShapeSpec(channels=64, stride=4 * 2**i) for i in range(5)]},
            r"strides, got head \(4, 8, 16, 32, 64\), backbone \(8, 16, 32, 64, 128\)",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(part, other, message):
    parts = FCOS.from_config(tiny_cfg())
    shapes = list(parts["backbone"].output_shape().values())
    kinds = {
        "head": (FCOSHead, {"input_shape": shapes, "num_classes": 3}),
        "loss": (FCOSLoss, {}),
        "post_processor": (FCOSPostProcessor, {}),
    }
    kind, arguments = kinds[part]
    parts[part] = kind(**arguments)
    FCOS(**parts)
    parts[part] = kind(**(arguments | other))
    with pytest.raises(ValueError, match=message):
        FCOS(**parts)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_autocast(dtype):
    cfg = tiny_cfg()
    cfg.MODEL.DEVICE = "cuda"
    model = build_model(cfg).train()
    with torch.autocast("cuda", dtype=dtype), EventStorage(0):
        losses = model([make_input(), make_input((), ())])
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
def test_gpu_equals_cpu():
    cfg = tiny_cfg()
    on_cpu = spread_logits(build_model(cfg))
    cfg.MODEL.DEVICE = "cuda"
    on_gpu = build_model(cfg)
    on_gpu.load_state_dict(on_cpu.state_dict())
    batch = [make_input(), make_input((), ())]
    a, b = on_cpu.train()(batch), on_gpu.train()(batch)
    for key, value in a.items():
        torch.testing.assert_close(b[key].cpu(), value, rtol=1e-3, atol=1e-4)
