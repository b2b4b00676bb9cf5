"""Memory layout and precision of the dense part: neither changes what is computed."""

import copy

import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import pairwise_iou
from helpers import make_input, tiny_cfg

from fcos_d2.runtime import Runtime


@pytest.fixture
def logits_of():
    """Dtype and channels-last-ness of the class logits of every call of a model's head."""

    def watch(model):
        seen = []

        def record(module, inputs, outputs):
            last = [x.is_contiguous(memory_format=torch.channels_last) for x in outputs[0]]
            seen.append((outputs[0][0].dtype, all(last)))

        model.head.register_forward_hook(record)
        return seen

    return watch


def trained(cfg):
    """Class logits as of a trained model: some locations far above the threshold."""
    model = build_model(cfg)
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.3)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.1)
    torch.nn.init.constant_(model.head.bbox_pred.bias, 2)
    return model


@torch.no_grad()
def detect(model, *batch):
    model.eval()
    return [x["instances"] for x in model(list(batch))]


def test_channels_last_on_cpu_gives_the_same(monkeypatch, logits_of):
    start = trained(tiny_cfg())
    seen, results = [], []
    for channels_last in (True, False):
        model = copy.deepcopy(start)
        layouts = logits_of(model)
        if not channels_last:
            monkeypatch.setattr(model.runtime, "run", lambda model, images: model.dense(images))
        detections = detect(model, make_input(), make_input(seed=1))
        model.train().zero_grad()
        losses = model([make_input(), make_input((), ())])
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        seen += layouts
        results.append((detections, {k: v.detach() for k, v in losses.items()}, gradients))
    # The second level has 8 x 12 cells, where both layouts differ.
    # On CPU the two images run one by one; then the batch in training.
    assert [x[1] for x in seen] == [True] * 3 + [False] * 3
    (detections, losses, gradients), (detections2, losses2, gradients2) = results
    for a, b in zip(detections, detections2, strict=True):
        assert len(a) > 20
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
        assert torch.equal(a.pred_classes, b.pred_classes)
    torch.testing.assert_close(losses, losses2, rtol=1e-4, atol=1e-6)
    for name, a in gradients.items():
        # Element by element rounding shows more, where a ReLU is just open or just closed.
        assert (a - gradients2[name]).norm() <= 1e-3 * a.norm(), name


def test_channels_last_on_cpu_alone():
    class Identity(torch.nn.Module):
        def dense(self, images):
            return images

    images = torch.rand(1, 3, 8, 8)
    on_cpu = Runtime().run(Identity(), images)
    assert torch.equal(on_cpu, images) and on_cpu.is_contiguous(memory_format=torch.channels_last)
    elsewhere = images.to("meta")
    assert Runtime().run(Identity(), elsewhere) is elsewhere


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_finds_the_same(name, logits_of):
    cfg = tiny_cfg()
    full = trained(cfg)
    cfg.MODEL.FCOS.PRECISION_TEST = name
    half = build_model(cfg)
    half.load_state_dict(full.state_dict())
    seen = logits_of(half)
    a, b = (detect(m, make_input())[0] for m in (full, half))
    assert seen == [(getattr(torch, name), True)]
    assert b.scores.dtype == b.pred_boxes.tensor.dtype == torch.float32
    # Rounding errors of 2^-9 a layer: each clear detection has its twin, at nearly its score.
    clear = a[a.scores > 0.1 + a.scores.min()]
    assert len(clear) > 10
    same_class = clear.pred_classes[:, None] == b.pred_classes[None]
    iou, twin = (pairwise_iou(clear.pred_boxes, b.pred_boxes) * same_class).max(dim=1)
    assert (iou > 0.9).float().mean() > 0.9
    assert (clear.scores - b.scores[twin])[iou > 0.9].abs().max() < 0.05
    assert all(p.dtype == torch.float32 for p in half.parameters())


def test_precision_test_leaves_training_alone(logits_of):
    model = build_model(tiny_cfg(PRECISION_TEST="bfloat16")).train()
    seen = logits_of(model)
    model([make_input()])
    assert seen[0][0] == torch.float32


def test_precision_through_the_default_predictor(logits_of):
    predict = DefaultPredictor(tiny_cfg(PRECISION_TEST="bfloat16"))
    seen = logits_of(predict.model)
    image = make_input()["image"].permute(1, 2, 0).numpy()
    assert predict(image)["instances"].image_size == (64, 96)
    assert seen[0][0] == torch.bfloat16


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"FCOS.PRECISION_TEST must be one of .*'int8'"):
        build_model(tiny_cfg(PRECISION_TEST="int8"))


@pytest.mark.gpu
def test_training_step_never_waits_for_the_gpu():
    cfg = tiny_cfg()
    cfg.MODEL.DEVICE = "cuda"
    model = build_model(cfg).train()
    batch = [make_input(), make_input((), ())]
    sum(model(batch).values()).backward()  # the first call sets up cuDNN
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(model(batch).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
