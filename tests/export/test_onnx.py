"""Exported files in ONNX Runtime beside the PyTorch models they were made from."""

import copy
import json
import re
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.modeling import build_model
from helpers import assert_same_detections, make_input, tiny_cfg

import fcos_d2
from fcos_d2.export import ExportError, check, to_onnx
from fcos_d2.export import onnx as exporter

# (N, H, W), none of them the traced one: less than a cell, smaller and larger, both ways.
SHAPES = [(1, 1, 1), (2, 3, 70), (1, 64, 96), (3, 150, 201), (1, 333, 97), (1, 480, 640)]


def run(file, images):
    """What a file gives for images (N, 3, H, W)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})


@torch.no_grad()
def compare(model, file, shapes, dtype, seed=0):
    """Assert that each image of each batch has the model's detections. Returns how many."""
    counts = []
    for n, height, width in shapes:
        images = [make_input(size=(height, width), seed=seed + i)["image"] for i in range(n)]
        boxes, scores, classes, num = run(file, torch.stack(images).to(dtype))
        for i, image in enumerate(images):
            expected = model([{"image": image}])[0]["instances"]
            k = num[i]
            assert_same_detections(boxes[i, :k], scores[i, :k], classes[i, :k], expected)
            assert not boxes[i, k:].any() and not scores[i, k:].any() and not classes[i, k:].any()
            counts.append(k)
    print(counts)
    return counts


def test_group_norm_relu_centerness_float32(command):
    _, model, file, _ = command
    counts = compare(model, file, SHAPES, torch.float32)
    assert min(counts) == 0 and max(counts) == 100 and len(set(counts)) > 4


def test_batch_norm_exp_iou_three_levels_uint8_clipped_last(batch_norm):
    model, file, difference = batch_norm
    assert difference < 1e-3
    counts = compare(model, file, SHAPES, torch.uint8)
    assert max(counts) > 20 and len(set(counts)) > 4


def test_deformable_and_computed_quality(deformable):
    model, file, difference = deformable
    assert difference < 1e-3
    counts = compare(model, file, SHAPES, torch.float32)
    assert max(counts) > 10 and len(set(counts)) > 3
    assert onnx.load(file).opset_import[0].version == 19


def test_joint_score_and_distributions(gfl):
    model, file, difference = gfl
    assert difference < 1e-3
    counts = compare(model, file, SHAPES, torch.float32)
    assert max(counts) > 10 and len(set(counts)) > 3


def test_boxes_whose_sides_come_from_other_places(task_aligned):
    model, file, difference = task_aligned
    assert difference < 1e-3
    counts = compare(model, file, SHAPES, torch.float32)
    assert max(counts) > 10 and len(set(counts)) > 3


def test_images_of_a_batch_do_not_touch_one_another(command):
    _, _, file, _ = command
    images = torch.stack([make_input(size=(150, 201), seed=i)["image"] for i in range(2)]).float()
    black = torch.zeros_like(images[0])
    alone = run(file, images[:1])
    together = run(file, torch.stack([black, images[0], images[1], images[0]]))
    assert alone[3][0] > 10
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(b[1], a[0], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(b[3], a[0], rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_equal_scores_in_the_models_order(command, tmp_path):
    """Where all locations are alike, order alone decides what NMS and the limits leave."""
    model, proto = copy.deepcopy(command[1]), onnx.load(command[2])
    initializers = {x.name: x for x in proto.graph.initializer}
    state = model.head.state_dict()
    for name in ("cls_logits.weight", "bbox_pred.weight", "ctrness.weight", "cls_logits.bias"):
        state[name].zero_()
        initializer = initializers[f"model.head.{name}"]
        initializer.CopyFrom(onnx.numpy_helper.from_array(state[name].numpy(), initializer.name))
    onnx.save(proto, tmp_path / "alike.onnx")
    image = make_input(size=(200, 333))["image"]
    boxes, scores, classes, (count,) = run(tmp_path / "alike.onnx", image[None].float())
    expected = model([{"image": image}])[0]["instances"]
    assert count == len(expected) == 100
    np.testing.assert_allclose(boxes[0], expected.pred_boxes.tensor, rtol=1e-5)
    np.testing.assert_allclose(scores[0], expected.scores, rtol=1e-5)
    assert np.array_equal(classes[0], expected.pred_classes)


def test_the_command_says_how_large_the_difference_is(command):
    _, _, file, stdout = command
    assert [p.name for p in file.parent.iterdir()] == ["model.onnx"]
    assert f"Exported to {file}" in stdout
    assert "Class names: red, green, blue" in stdout
    assert float(re.search(r"Largest difference .*: (\S+) \(limit 0.001\)", stdout)[1]) < 1e-3


def test_inputs_outputs_and_metadata(command, batch_norm):
    session = onnxruntime.InferenceSession(command[2])
    inputs = [(x.name, x.type, x.shape) for x in session.get_inputs()]
    assert inputs == [("images", "tensor(float)", ["batch", 3, "height", "width"])]
    outputs = {x.name: (x.type, x.shape) for x in session.get_outputs()}
    assert outputs == {
        "boxes": ("tensor(float)", ["batch", 100, 4]),
        "scores": ("tensor(float)", ["batch", 100]),
        "classes": ("tensor(int64)", ["batch", 100]),
        "num_detections": ("tensor(int64)", ["batch"]),
    }
    model = onnx.load(command[2])
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 18
    values = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    assert values == {
        "fcos_d2_version": fcos_d2.__version__, "outputs": "detections", "input_type": "float32",
        "channel_order": "BGR", "min_size": 128, "max_size": 1333, "num_classes": 3,
        "class_names": ["red", "green", "blue"], "category_ids": [1, 2, 3],
        "levels": ["p3", "p4", "p5", "p6", "p7"],
        "strides": [8, 16, 32, 64, 128], "location_offset": 0.5, "quality": "centerness",
        "score_fusion": "sqrt", "score_thresh": 0.05, "score_thresh_on": "class",
        "topk_candidates": 1000, "nms_thresh": 0.6, "clip_boxes": "before_nms",
        "detections_per_image": 100,
    }  # fmt: skip
    session = onnxruntime.InferenceSession(batch_norm[1])
    assert session.get_inputs()[0].type == "tensor(uint8)"
    values = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    assert (values["channel_order"], values["class_names"]) == ("RGB", None)


@torch.no_grad()
def test_raw_maps(raw):
    model, file, difference = raw
    assert difference < 1e-3
    session = onnxruntime.InferenceSession(file)
    names = [x.name for x in session.get_outputs()]
    assert names == ["class_logits_p4", "ltrb_p4", "quality_logits_p4"]
    for n, height, width in SHAPES:
        images = torch.stack([make_input(size=(height, width), seed=i)["image"] for i in range(n)])
        outputs = model.head_outputs(model.preprocess_image([{"image": x} for x in images]))
        maps = (outputs.class_logits[0], outputs.ltrb[0], outputs.quality_logits[0])
        for a, b in zip(session.run(None, {"images": images.float().numpy()}), maps, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-3)


# ---- What is wrong is found, and leaves nothing behind ----


@pytest.fixture
def quick(monkeypatch, command):
    """Exports take the file of ``command``, whatever the model; the check has one small batch."""
    monkeypatch.setattr(exporter, "_export", lambda *args: onnx.load(command[2]))
    monkeypatch.setattr(check, "_SHAPES", ((2, 130, 201),))
    return command[1]


def change_weights(model):
    model.head.bbox_pred.bias += 0.01


CHANGES = {
    "weights": change_weights,
    "nms": lambda model: setattr(model.post_processor, "nms_thresh", 0.5),
    "fusion": lambda model: setattr(model.post_processor, "score_fusion", "product"),
    "clipping": lambda model: setattr(model.post_processor, "clip_boxes", "after_nms"),
    "pixels": lambda model: model.pixel_mean.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_file_that_differs_is_not_kept(quick, tmp_path, change):
    model = copy.deepcopy(quick)
    CHANGES[change](model)
    file = tmp_path / "model.onnx"
    file.write_text("an earlier file")
    with pytest.raises(ExportError, match=r"the largest difference is .*, the limit 0\.001"):
        to_onnx(model, file)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert file.read_text() == "an earlier file"


def test_an_earlier_file_is_replaced(quick, tmp_path):
    file = tmp_path / "model.onnx"
    file.write_text("an earlier file")
    assert to_onnx(quick, file) < 1e-3
    assert onnx.load(file).graph.output[0].name == "boxes"


def test_a_file_that_cannot_be_written_is_said_before_the_export(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "_export", lambda *args: pytest.fail("exported"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        to_onnx(quick, tmp_path / "file" / "model.onnx")
    with pytest.raises(OSError, match="is a folder: name the file to write"):
        to_onnx(quick, tmp_path)
    with pytest.raises(OSError, match="No such file"):
        to_onnx(quick, "/proc/model.onnx")


def test_what_cannot_be_exported_is_refused(quick, tmp_path, monkeypatch):
    file = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match=r"Only META_ARCHITECTURE 'FCOS' .* not 'Linear'"):
        to_onnx(torch.nn.Linear(1, 1), file)
    with pytest.raises(ValueError, match="must be 'float32' or 'uint8', got 'int8'"):
        to_onnx(quick, file, input_type="int8")
    with pytest.raises(ValueError, match="opset must be 18 or higher, got 17"):
        to_onnx(quick, file, opset=17)
    with pytest.raises(ValueError, match="2 class names, but the model has 3 classes"):
        to_onnx(quick, file, class_names=["a", "b"])
    with pytest.raises(ValueError, match="4 category ids, but the model has"):
        to_onnx(quick, file, category_ids=[1, 2, 3, 4])
    deformable = build_model(tiny_cfg(USE_DEFORMABLE=True))
    with pytest.raises(ValueError, match="19 or higher with deformable convolutions, got 18"):
        to_onnx(deformable, file, opset=18)
    for limit in (-1, 0):
        model = copy.deepcopy(quick)
        model.post_processor.max_detections_per_image = limit
        with pytest.raises(ValueError, match=f"TEST.DETECTIONS_PER_IMAGE to 1 .* of {limit}"):
            to_onnx(model, file)
    model = copy.deepcopy(quick)
    model.head.cls_logits.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite values, e\.g\. in head\.cls_log"):
        to_onnx(model, file)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[onnx\]'"):
        to_onnx(quick, file)
    assert not list(tmp_path.iterdir())


def test_scripting_says_what_to_use():
    model = build_model(tiny_cfg())
    with pytest.raises(NotImplementedError, match=r"cannot be scripted\. Export it with") as error:
        torch.jit.script(torch.nn.Sequential(model))  # Detectron2's export_model.py wraps it, too
    assert "\n" not in str(error.value)
