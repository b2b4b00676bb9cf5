"""One graph, traced or exported on one image, is right on all others."""

import warnings

import pytest
import torch
from detectron2.export import TracingAdapter
from helpers import GFLV2, TOOD, make_detector, make_input
from torch.export import Dim

from fcos_d2.modeling import HeadOutputs


def trace(model, image):
    """The traced model, as a function of an image."""
    adapter = TracingAdapter(model, [{"image": image}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Detectron2's own asserts
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    return lambda image: adapter.outputs_schema(traced(image))[0]["instances"]


@torch.no_grad()
def assert_same_detections(model, traced, image):
    """Compare without regard to the order of detections whose scores differ by rounding alone."""
    a, b = model([{"image": image}])[0]["instances"], traced(image)
    assert a.image_size == tuple(b.image_size.tolist())
    assert len(a) == len(b)
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
    # At the limit of detections per image, rounding may decide which one is the last.
    above_limit = a.scores > a.scores.min() + 1e-4 if len(a) == 100 else a.scores > 0
    alike = (a.pred_boxes.tensor[:, None] - b.pred_boxes.tensor).abs().amax(dim=2) < 0.01
    alike &= a.pred_classes[:, None] == b.pred_classes
    alike &= (a.scores[:, None] - b.scores).abs() < 1e-4
    assert alike.any(dim=1)[above_limit].all()
    return len(a)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"SCORE_THRESH_ON": "score", "SCORE_FUSION": "product"},
        {"QUALITY": "computed", "BOX_LOSS_WEIGHTING": "none"},
        {"QUALITY": "none", "BOX_LOSS_WEIGHTING": "none", "TOPK_CANDIDATES_TEST": 20},
        {"BOX_ACTIVATION": "exp", "NORM": "BN", "USE_DEFORMABLE": True},
        {"CLIP_BOXES": "after_nms"},
        GFLV2 | {"SCORE_THRESH_TEST": 0.02, "NMS_THRESH_TEST": 0.9},
        TOOD,
    ],
)
def test_traced_on_one_image_right_on_twenty_of_other_sizes(keys):
    model = make_detector(**keys)
    traced = trace(model, make_input(size=(64, 96))["image"])
    counts = []
    for seed in range(20):
        size = (40 + 13 * seed, 300 - 11 * seed)
        counts.append(
            assert_same_detections(model, traced, make_input(size=size, seed=seed)["image"])
        )
    assert len(set(counts)) > 3 and max(counts) > 15


def test_traced_where_nothing_is_detected():
    """What is frozen for an image without candidates must not stay for the next one."""
    model = make_detector()
    dark = torch.zeros(3, 64, 96, dtype=torch.uint8)
    bias = model.head.cls_logits.bias.clone()
    torch.nn.init.constant_(model.head.cls_logits.bias, -1e4)
    traced = trace(model, dark)
    assert assert_same_detections(model, traced, make_input(size=(96, 64))["image"]) == 0
    model.head.cls_logits.bias.data.copy_(bias)
    assert assert_same_detections(model, traced, make_input(size=(128, 96))["image"]) > 5


def test_traced_with_floating_point_images_of_one_cell_to_many():
    model = make_detector()
    traced = trace(model, make_input(size=(200, 150))["image"].float())
    for size in ((1, 1), (31, 33), (256, 384)):
        image = make_input(size=size)["image"].float()
        assert_same_detections(model, traced, image)


class DensePart(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model.runtime.run(self.model, pixels)


@pytest.mark.parametrize("keys", [{}, TOOD], ids=["FCOS", "task-aligned"])
@torch.no_grad()
def test_dense_part_is_exported_for_all_sizes(keys):
    model = make_detector(**keys)
    height, width = Dim("height", min=5, max=64), Dim("width", min=5, max=64)
    shapes = {"pixels": {2: 32 * height, 3: 32 * width}}
    exported = torch.export.export(
        DensePart(model), (torch.randn(1, 3, 160, 192),), dynamic_shapes=shapes
    ).module()
    for size in ((160, 192), (192, 160), (320, 256)):
        x = torch.randn(1, 3, *size)
        expected = DensePart(model)(x)
        actual = HeadOutputs(*exported(x))
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
