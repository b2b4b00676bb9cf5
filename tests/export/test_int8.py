import json
import sys

import cv2
import numpy as np
import onnx
import pytest
import torch
from helpers import make_detector, tiny_cfg

from fcos_d2.export import ExportError, OnnxPredictor, int8, quantize, to_onnx
from fcos_d2.export.__main__ import calibration_images, main
from fcos_d2.inference.onnx_predictor import Detections


def images(count, seed=0):
    """(H, W, 3) uint8: blocks of colour, of two sizes."""
    rng = np.random.default_rng(seed)
    blocks = [rng.integers(0, 256, (4, 5, 3)).astype(np.uint8) for _ in range(count)]
    return [cv2.resize(x, (160, 128 + 32 * (i % 2)), interpolation=0) for i, x in enumerate(blocks)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A file in float32, of a detector that finds something."""
    file = tmp_path_factory.mktemp("int8") / "model.onnx"
    names = ["red", "green", "blue"]
    to_onnx(make_detector(tiny_cfg()), file, class_names=names, min_size=128, max_size=200)
    return file


def test_a_quantized_file(exported, tmp_path):
    target = tmp_path / "new" / "int8.onnx"
    check = quantize(exported, target, images(12))
    assert check.agreement > 80
    assert check.images == 12
    # The input and the weights of each convolution have 8 bits, but not those of the predictors of
    # classes, boxes and centerness, of each of the five levels.
    nodes = {output: node for node in onnx.load(target).graph.node for output in node.output}
    convolutions = [node for node in nodes.values() if node.op_type == "Conv"]
    of_8_bits = [
        [nodes[x].op_type == "DequantizeLinear" for x in node.input[:2] if x in nodes]
        for node in convolutions
    ]
    assert of_8_bits.count([True, True]) == len(convolutions) - 3 * 5 > 15
    assert target.stat().st_size < 0.6 * exported.stat().st_size

    before, after = OnnxPredictor(exported), OnnxPredictor(target)
    assert after.settings == before.settings | {"precision": "int8"}
    # Beside what calibrated it: the best detection of a new image is the same one, roughly.
    best = [[x(image)["instances"].scores[0] for x in (before, after)] for image in images(4, 1)]
    for expected, actual in best:
        assert actual == pytest.approx(expected, abs=0.05)
        assert actual != expected


def test_what_cannot_be_quantized(exported, tmp_path, monkeypatch):
    target = tmp_path / "int8.onnx"
    target.write_text("an earlier one")
    with pytest.raises(ValueError, match="There is no image to calibrate with"):
        quantize(exported, target, [])
    with pytest.raises(IsADirectoryError, match="is a folder: name the file to write"):
        quantize(exported, tmp_path, images(2))
    with pytest.raises(OSError, match=r"missing\.jpg"):
        quantize(exported, target, [tmp_path / "missing.jpg"])
    with pytest.raises(ValueError, match="Image 1 must have pixels of uint8"):
        quantize(exported, target, [*images(1), images(1)[0].astype(np.uint16)])
    monkeypatch.setattr(int8, "LEAST_AGREEMENT", 100.1)
    with pytest.raises(ExportError, match=r"the limit 100.1\. No file was written"):
        quantize(exported, target, images(2))
    monkeypatch.undo()
    assert target.read_text() == "an earlier one"
    assert [x.name for x in tmp_path.iterdir()] == ["int8.onnx"]
    quantize(exported, target, images(2))
    with pytest.raises(ValueError, match="has been quantised before"):
        quantize(target, tmp_path / "again.onnx", images(2))
    raw = tmp_path / "raw.onnx"
    proto = onnx.load(exported)
    for entry in proto.metadata_props:
        entry.value = '"raw"' if entry.key == "outputs" else entry.value
    onnx.save(proto, raw)
    with pytest.raises(ValueError, match="export it without --raw"):
        quantize(raw, target, images(2))


def detections(boxes, scores, classes):
    arrays = np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32)
    return Detections((100, 100), *arrays, np.array(classes, np.int64))


def test_agreement_by_hand():
    square, other = [0, 0, 10, 10], [50, 50, 90, 90]
    # Of float32's three, the third is no truth: 0.3 is less than half of 0.8.
    exact = [detections([square, other, [0, 50, 9, 60]], [0.8, 0.4, 0.3], [0, 1, 0])]
    assert int8._agreement(exact, exact) == pytest.approx(100)
    # The square's IoU with a box of 10 x 8.2 is 0.82: right at 7 of the 10 thresholds, up to 0.80.
    moved = [detections([[0, 0, 10, 8.2], other], [0.7, 0.5], [0, 1])]
    assert int8._agreement(exact, moved) == pytest.approx((70 + 100) / 2)
    # The wrong class: the square is not found, and class 1 has a better detection that is wrong.
    wrong = [detections([square, other], [0.7, 0.5], [1, 1])]
    assert int8._agreement(exact, wrong) == pytest.approx((0 + 50) / 2)
    assert int8._agreement(exact, [detections([], [], [])]) == 0
    with pytest.raises(ValueError, match="finds nothing on the images"):
        int8._agreement([detections([], [], [])], exact)


def test_the_images_of_a_calibration_are_evenly_taken(tmp_path, shapes_folder, monkeypatch):
    for i in range(10):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "text.txt").write_text("no image")
    cfg = tiny_cfg()
    files = calibration_images(cfg, str(tmp_path), 4)
    assert [x[-5:] for x in files] == ["0.png", "2.png", "5.png", "7.png"]
    assert len(calibration_images(cfg, str(tmp_path), 200)) == 10
    with pytest.raises(ValueError, match="No data set 'nothing' is registered"):
        calibration_images(cfg, "nothing", 4)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN has no image.*--calibrate"):
        calibration_images(cfg, None, 4)


def test_the_command(tmp_path, monkeypatch, capsys):
    cfg = tiny_cfg()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save(make_detector(cfg).state_dict(), cfg.MODEL.WEIGHTS)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(images(6)):
        cv2.imwrite(str(folder / f"{i}.png"), image)
    argv = ["--config-file", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "x.onnx")]
    options = ["--int8", "--calibrate", str(folder), "--images", "4", "INPUT.MIN_SIZE_TEST", "128"]
    main([*argv, *options, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"])
    said = capsys.readouterr().out
    assert "Calibrating with 4 images" in said
    assert "INT8 beside float32, on 4 of the images: " in said
    metadata = {x.key: json.loads(x.value) for x in onnx.load(tmp_path / "x.onnx").metadata_props}
    assert metadata["precision"] == "int8"
    assert metadata["min_size"] == 128

    for wrong, message in (
        (["--int8", "--raw"], "--int8 compares detections"),
        (["--calibrate", "x"], "--calibrate is for --int8"),
        (["--int8", "--images", "0"], "--images must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            main([*argv, *wrong])
        assert message in capsys.readouterr().err
    assert "onnxruntime.quantization" in sys.modules
