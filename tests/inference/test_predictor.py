"""Predictor beside Detectron2's DefaultPredictor, image by image."""

import itertools

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from helpers import make_arrays, tiny_cfg

import fcos_d2
from fcos_d2.inference import onnx_predictor
from fcos_d2.modeling.images import check_finite

# The shorter side becomes 128: (96, 144) and (64, 97) are (128, 192) and (128, 194) to the network,
# and (128, 192) and (128, 224) with padding.
SIZES = [(96, 144), (144, 96), (64, 97), (96, 144), (150, 150), (96, 144), (64, 96), (96, 140)]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    torch.manual_seed(0)  # the fixture of all tests comes later
    cfg = tiny_cfg()
    model = DefaultPredictor(cfg).model
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.3)
    cfg.MODEL.WEIGHTS = str(tmp_path_factory.mktemp("weights") / "model.pth")
    torch.save(model.state_dict(), cfg.MODEL.WEIGHTS)
    return cfg


def assert_same(detections, expected):
    detections, expected = detections["instances"], expected["instances"]
    assert detections.image_size == expected.image_size
    assert len(detections) == len(expected) > 5
    torch.testing.assert_close(detections.scores, expected.scores, rtol=1e-4, atol=1e-6)
    # Nearly equal scores may change places; the boxes of each class are the same all together.
    a, b = (
        torch.cat([x.pred_boxes.tensor.sum(1), x.pred_classes * 1.0])
        for x in (detections, expected)
    )
    torch.testing.assert_close(a.sort().values, b.sort().values, rtol=1e-4, atol=1e-2)


@pytest.fixture
def batches(monkeypatch):
    """Sizes of the batches that a predictor runs."""

    def watch(predictor):
        sizes = []
        forward = predictor.model.forward

        def record(batch):
            sizes.append(len(batch))
            return forward(batch)

        monkeypatch.setattr(predictor.model, "forward", record)
        return sizes

    return watch


@pytest.mark.parametrize("input_format", ["BGR", "RGB"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_equals_default_predictor(cfg, batches, input_format, batch_size):
    cfg = cfg.clone()
    cfg.INPUT.FORMAT = input_format
    default, images = DefaultPredictor(cfg), make_arrays(SIZES)
    expected = [default(image) for image in images]
    predictor = fcos_d2.Predictor(cfg, batch_size)
    sizes = batches(predictor)
    for a, b in zip(predictor(images), expected, strict=True):
        assert_same(a, b)
    # Padded to (128, 192): five of them; (192, 128), (128, 224) and (128, 128): one each.
    assert sorted(sizes) == {1: [1] * 8, 2: [1, 1, 1, 1, 2, 2], 8: [1, 1, 1, 5]}[batch_size]
    assert_same(predictor(images[2]), expected[2])
    in_rgb = fcos_d2.Predictor(cfg, batch_size, channels="RGB")
    assert_same(in_rgb(images[2][:, :, ::-1]), expected[2])
    assert_same(predictor(images[2].astype("float64")), default(images[2].astype("float64")))


def test_a_long_thin_image(cfg):
    """Its height would be 0 where its width is the longest allowed: Detectron2 raises an error."""
    (image,) = make_arrays([(1, 6000)])
    predictor, longest = fcos_d2.Predictor(cfg), cfg.INPUT.MAX_SIZE_TEST
    assert longest / 6000 < 0.5
    assert predictor.model_input(image, "BGR")["image"].shape == (3, 1, longest)
    assert onnx_predictor._resized((1, 6000), cfg.INPUT.MIN_SIZE_TEST, longest) == (1, longest)
    found = predictor(image)["instances"]
    assert found.image_size == (1, 6000)
    assert (found.pred_boxes.tensor[:, 3] <= 1).all()


def test_files_and_directory(cfg, tmp_path):
    images = make_arrays(SIZES)
    for i, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f"{i}.PNG"), image)
    (tmp_path / "notes.txt").write_text("not an image")
    predictor = fcos_d2.Predictor(cfg, 3, channels="RGB")  # files know their own
    default = DefaultPredictor(cfg)
    detections = list(predictor.directory(tmp_path))
    names = [str(tmp_path / f"{i}.PNG") for i in range(len(images))]
    assert [name for name, _ in detections] == names
    for (_, a), image in zip(detections, images, strict=True):
        assert_same(a, default(image))
    assert_same(predictor(tmp_path / "1.PNG"), default(images[1]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"No image in .*empty: no file ends with"):
        predictor.directory(tmp_path / "empty")


def test_video(cfg, tmp_path):
    file = tmp_path / "video.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 5, (144, 96))
    for image in make_arrays([(96, 144)] * 5):
        writer.write(image)
    writer.release()
    predictor, default = fcos_d2.Predictor(cfg, 2, channels="RGB"), DefaultPredictor(cfg)
    capture, count = cv2.VideoCapture(str(file)), 0
    for frame, detections in predictor.video(file):
        assert np.array_equal(frame, capture.read()[1])
        assert_same(detections, default(frame))
        count += 1
    assert count == 5
    assert len(list(predictor.video(cv2.VideoCapture(str(file))))) == 5
    with pytest.raises(OSError, match=r"cannot open the video .*missing\.avi"):
        predictor.video(tmp_path / "missing.avi")


def test_pairs_have_the_images_themselves(cfg):
    images, predictor = make_arrays(SIZES), fcos_d2.Predictor(cfg, 2)
    pairs = predictor.pairs(images)
    for image, expected, (same, detections) in zip(images, predictor(images), pairs, strict=True):
        assert same is image
        assert_same(detections, expected)
    ((_, in_rgb),) = predictor.pairs([images[0][:, :, ::-1]], "RGB")
    assert_same(in_rgb, predictor(images[0]))


def test_endless_stream_comes_in_order_with_few_held_back(cfg):
    # One image of a rare size must not hold back the others for ever.
    rare, common = make_arrays([(144, 96), (96, 144)])
    taken = 0

    def camera():
        nonlocal taken
        for image in itertools.chain([rare], itertools.repeat(common)):
            taken += 1
            yield image

    results = fcos_d2.Predictor(cfg, 2).stream(camera())
    for i in range(12):
        size = next(results)["instances"].image_size
        assert size == ((144, 96) if i == 0 else (96, 144))
        assert taken <= i + 4 * 2


def test_detections_before_a_bad_image_are_not_lost(cfg, tmp_path):
    image = make_arrays(SIZES)[0]
    predictor = fcos_d2.Predictor(cfg)
    results = predictor.stream([image, image, image[:, :, 0]])
    assert len(next(results)["instances"]) == len(next(results)["instances"]) > 5
    with pytest.raises(ValueError, match=r"Image 2 must be an array of \(H, W, 3\), got shape"):
        next(results)
    with pytest.raises(ValueError, match=r"Image 0 must be an array .*, got list"):
        predictor([[1, 2]])
    for bad in (np.zeros((0, 9, 3), np.uint8), np.zeros((9, 9, 3), np.int32)):
        with pytest.raises(ValueError, match="Image 0 must have pixels of uint8 or floating"):
            predictor(bad)
    results = predictor.stream([image, np.full((9, 9, 3), np.nan)])
    assert len(next(results)["instances"]) > 5
    with pytest.raises(ValueError, match="The image number 1 has NaN or infinite pixels"):
        next(results)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"broken\.png"):
        predictor(tmp_path / "broken.png")
    assert predictor([]) == []


def test_weights_that_do_not_fill_the_model(cfg, tmp_path):
    cfg = cfg.clone()
    weights = build_model(cfg).state_dict()
    del weights["head.bbox_pred.weight"]
    weights["head.cls_logits.bias"] = torch.zeros(99)
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save(weights, cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match=r"do not fit the config: 2 tensors .*bbox_pred"):
        fcos_d2.Predictor(cfg)


def test_wrong_arguments(cfg):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        fcos_d2.Predictor(cfg, 0)
    with pytest.raises(ValueError, match="'BGR' or 'RGB', got 'L'"):
        fcos_d2.Predictor(cfg, channels="L")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_check_finite(dtype):
    largest = torch.finfo(dtype).max
    # Of all but float16 the sum of such pixels is not finite, though each pixel is.
    for pair in ([largest, largest], [largest, -largest]):
        check_finite(torch.tensor(pair * 9, dtype=dtype), "a.png")
    check_finite(torch.zeros(3, 0, 0, dtype=dtype), "a.png")
    for bad in (float("nan"), float("inf"), -float("inf")):
        image = torch.rand(3, 4, 5).to(dtype)
        image[1, 2, 3] = bad
        with pytest.raises(ValueError, match=r"The image a\.png has NaN or infinite pixels"):
            check_finite(image, "a.png")


def test_check_finite_passes_whole_numbers():
    check_finite(torch.full((3, 4, 5), 255, dtype=torch.uint8), "a.png")
