"""OnnxPredictor beside fcos_d2.Predictor and Detectron2's DefaultPredictor."""

import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances
from helpers import assert_same_detections, make_arrays
from PIL import Image

import fcos_d2
from fcos_d2.app.detector import Detector
from fcos_d2.export import OnnxPredictor
from fcos_d2.inference import onnx_predictor

# The shorter side becomes 128 and the longer one at most 1333.
SIZES = [(96, 144), (96, 144), (144, 96), (64, 97), (150, 150), (9, 100), (128, 128)]


def assert_same(detections, expected):
    detections, expected = detections["instances"], expected["instances"]
    assert detections.image_size == expected.image_size
    boxes, scores = detections.pred_boxes, detections.scores
    assert boxes.dtype == scores.dtype == np.float32
    assert len(detections) == len(scores)
    return assert_same_detections(boxes, scores, detections.pred_classes, expected)


@pytest.fixture(scope="module")
def predictors(command):
    cfg, _, file, _ = command
    return OnnxPredictor(file), fcos_d2.Predictor(cfg), DefaultPredictor(cfg)


def test_equals_the_other_predictors(predictors):
    ours, theirs, default = predictors
    assert ours.class_names == ["red", "green", "blue"]
    images = make_arrays(SIZES)
    counts = []
    for image, a, b in zip(images, ours(images), theirs(images), strict=True):
        counts.append(assert_same(a, b))
        assert_same(a, default(image))
    assert max(counts) > 10 and len(set(counts)) > 3
    assert_same(ours(images[3]), default(images[3]))
    assert ours([]) == []


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_floating_point_images(predictors, dtype):
    ours, theirs, _ = predictors
    for image in make_arrays(SIZES):
        image = (image * 0.77).astype(dtype)
        # PyTorch rounds the resized pixels of float16 to it.
        assert_same(ours(image), theirs(image.astype("float32") if dtype == "float16" else image))


def test_files_and_channels(predictors, command, tmp_path):
    image = make_arrays(SIZES)[3]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(image[:, :, 0]).save(tmp_path / "grey.jpg")
    Image.fromarray(image).save(tmp_path / "a.jpg")
    for name in ("turned.png", "grey.jpg", "a.jpg"):
        detections = predictors[0](tmp_path / name)
        assert assert_same(detections, predictors[1](tmp_path / name)) > 2
    assert predictors[0](str(tmp_path / "turned.png"))["instances"].image_size == (97, 64)
    in_rgb = OnnxPredictor(command[2], channels="RGB")
    assert_same(in_rgb(image[:, :, ::-1]), predictors[1](image))


def test_a_model_of_rgb_and_uint8(batch_norm, tmp_path):
    model, file, _ = batch_norm
    proto = onnx.load(file)
    for entry in proto.metadata_props:
        if entry.key == "min_size":
            entry.value = "0"  # images as they are
    onnx.save(proto, tmp_path / "model.onnx")
    ours, image = OnnxPredictor(tmp_path / "model.onnx"), make_arrays([(150, 201)])[0]
    pixels = torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy())
    with torch.no_grad():
        assert assert_same(ours(image), model([{"image": pixels}])[0]) > 20
    with pytest.raises(ValueError, match="pixels of float64, but the file was exported for uint8"):
        ours(image * 1.0)


def test_batches_of_one_size_in_order(predictors, command, monkeypatch):
    images = make_arrays([(96, 144)] * 3 + [(144, 96)] + [(192, 288)] * 2)
    batched = OnnxPredictor(command[2], 2)
    sizes, run = [], batched.session.run

    class Session:
        def run(self, names, inputs):
            sizes.append(len(inputs["images"]))
            return run(names, inputs)

    monkeypatch.setattr(batched, "session", Session())
    for a, b in zip(batched(images), predictors[1](images), strict=True):
        assert_same(a, b)
    assert sizes == [2, 1, 1, 2]
    results = batched.stream([*images[:3], images[0][:, :, 0]])
    assert [len(next(results)) for _ in range(3)] == [1, 1, 1]  # those before the bad one
    with pytest.raises(ValueError, match=r"Image 3 must be an array of \(H, W, 3\), got shape"):
        next(results)


def test_detections_become_instances(predictors):
    """As docs/export.md has it."""
    d = predictors[0](make_arrays(SIZES)[0])["instances"]
    instances = Instances(
        d.image_size,
        pred_boxes=Boxes(torch.from_numpy(d.pred_boxes)),
        scores=torch.from_numpy(d.scores),
        pred_classes=torch.from_numpy(d.pred_classes),
    )
    assert_same({"instances": d}, {"instances": instances})


def test_wrong_images(predictors, tmp_path):
    ours = predictors[0]
    with pytest.raises(ValueError, match=r"Image 0 must be an array .*, got list"):
        ours([[1, 2]])
    for bad in (np.zeros((0, 9, 3), np.uint8), np.zeros((9, 9, 3), np.int32)):
        with pytest.raises(ValueError, match="Image 0 must have pixels of uint8 or floating"):
            ours(bad)
    with pytest.raises(ValueError, match="image number 0 has NaN or infinite pixels"):
        ours(np.full((9, 9, 3), np.nan))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"broken\.png"):
        ours(tmp_path / "broken.png")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "16.png")
    with pytest.raises(ValueError, match="more than 8 bits a pixel"):
        ours(tmp_path / "16.png")


def test_the_page_shows_the_same(predictors, tmp_path):
    ours, theirs, _ = predictors
    Image.fromarray(make_arrays(SIZES)[0]).save(tmp_path / "a.png")
    a, b = (Detector(x, "name").look(str(tmp_path / "a.png")) for x in (ours, theirs))
    arrays = (x.numpy() for x in (a.instances.pred_boxes.tensor, a.instances.scores))
    assert assert_same_detections(*arrays, a.instances.pred_classes.numpy(), b.instances) > 5
    assert (a.image == b.image).all() and b.inspection and not a.inspection
    assert "ONNX" in Detector(ours, "name").unexplained
    shown = Detector(ours, "name").kept(a.instances, 0.0, ["green"])
    assert set(shown.pred_classes.tolist()) == {1}


def test_wrong_files_and_arguments(command, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        OnnxPredictor(command[2], 0)
    with pytest.raises(ValueError, match="'BGR' or 'RGB', got 'L'"):
        OnnxPredictor(command[2], channels="L")
    with pytest.raises(FileNotFoundError):
        OnnxPredictor(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot load .*text\.onnx"):
        OnnxPredictor(tmp_path / "text.onnx")
    proto = onnx.load(command[2])
    metadata = {x.key: x for x in proto.metadata_props}
    metadata["outputs"].value = '"raw"'
    onnx.save(proto, tmp_path / "raw.onnx")
    with pytest.raises(ValueError, match="gives the maps of the head: export it without --raw"):
        OnnxPredictor(tmp_path / "raw.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=r"foreign\.onnx has no metadata of fcos_d2"):
        OnnxPredictor(tmp_path / "foreign.onnx")


CODE = """
import sys
import numpy as np
from onnx_predictor import OnnxPredictor
instances = OnnxPredictor(sys.argv[1])(np.load(sys.argv[2]))["instances"]
np.savez(sys.argv[3], **vars(instances))
"""


def test_runs_without_pytorch_detectron2_and_fcos_d2(predictors, command, tmp_path):
    shutil.copy(onnx_predictor.__file__, tmp_path)
    absent = ("torch", "torchvision", "detectron2", "fcos_d2", "fvcore", "cv2", "onnx")
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
    )
    image = make_arrays(SIZES)[0]
    np.save(tmp_path / "image.npy", image)
    result = subprocess.run(
        [sys.executable, "-c", CODE, command[2], tmp_path / "image.npy", tmp_path / "out.npz"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    out = np.load(tmp_path / "out.npz")
    expected = predictors[1](image)["instances"]
    arrays = (out["pred_boxes"], out["scores"], out["pred_classes"])
    assert assert_same_detections(*arrays, expected) > 5
