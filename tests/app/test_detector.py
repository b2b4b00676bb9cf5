"""What the page of ``fcos app`` shows, without Gradio."""

import cv2
import numpy as np
import pytest
import torch
from helpers import make_arrays, make_detector, tiny_cfg
from PIL import Image

from fcos_d2 import Predictor
from fcos_d2.app import detector as module
from fcos_d2.app.detector import Detector
from fcos_d2.inference.drawing import draw_instances

CLASSES = ["disc", "square", "triangle"]
LEAST = 0.18  # most of the detections have more


def make(folder, cfg):
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    torch.save(
        {"model": make_detector(cfg).state_dict(), "class_names": CLASSES}, folder / "model.pth"
    )
    return Detector(Predictor(cfg), "tiny")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return make(tmp_path_factory.mktemp("model"), tiny_cfg())


@pytest.fixture
def image(tmp_path):
    (pixels,) = make_arrays([(60, 80)])
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    return pixels, str(tmp_path / "a.png")


def chosen(instances, classes):
    """The definition, one by one."""
    numbers = [CLASSES.index(name) for name in classes] or [0, 1, 2]
    kept = [
        i
        for i in range(len(instances))
        if float(instances.scores[i]) >= LEAST and int(instances.pred_classes[i]) in numbers
    ]
    return instances[torch.tensor(kept, dtype=torch.int64)]


@pytest.mark.parametrize("classes", [[], ["square"], ["triangle", "disc"]])
def test_the_picture_is_that_of_the_predictor(detector, image, classes):
    pixels, file = image
    every = detector.predictor(pixels)["instances"]
    shown = chosen(every, classes)
    assert 0 < len(shown) < len(every)
    # 640 pixels for the longer side, which has 80.
    expected = draw_instances(pixels, shown, detector.predictor.metadata, scale=8)
    found = detector.look(file)
    assert expected.shape == (480, 640, 3)
    assert (detector.picture(found, LEAST, classes) == expected).all()
    assert (detector.frame(pixels, LEAST, classes) == expected).all()


def test_a_large_picture_is_made_smaller(detector, tmp_path):
    Image.new("RGB", (3200, 800)).save(tmp_path / "large.png")
    assert detector.picture(detector.look(str(tmp_path / "large.png")), 0.5, []).shape[:2] == (
        400,
        1600,
    )


def test_a_click_finds_the_smallest_box_around_it(detector, image, monkeypatch):
    drawn = []
    origins_figure = module.origins_figure
    monkeypatch.setattr(
        module,
        "origins_figure",
        lambda x, threshold: drawn.append(x) or origins_figure(x, threshold),
    )
    found = detector.look(image[1])
    shown = chosen(found.instances, [])
    boxes = shown.pred_boxes.tensor.tolist()
    hits = 0
    for x, y in ((100, 100), (320, 240), (600, 400), (20, 470)):  # in the picture, 8 times as large
        areas = {
            (x1 - x0) * (y1 - y0): i
            for i, (x0, y0, x1, y1) in enumerate(boxes)
            if x0 <= x / 8 <= x1 and y0 <= y / 8 <= y1
        }
        picture = detector.origin(found, x, y, LEAST, [])
        assert (picture is None) == (not areas)
        if areas:
            hits += 1
            assert picture.dtype == np.uint8 and min(picture.shape[:2]) > 200
            (box,) = drawn.pop().detections.pred_boxes.tensor.tolist()
            assert box == boxes[areas[min(areas)]]
    assert hits > 1
    assert detector.origin(found, 320, 240, 1.0, []) is None and not drawn


def test_heat_maps(detector, image, tmp_path):
    classes, quality = detector.heat_maps(detector.look(image[1]))
    assert detector.has_quality and not detector.unexplained
    assert classes.shape[2] == quality.shape[2] == 3 and classes.shape[0] > quality.shape[0] > 200
    other = make(tmp_path, tiny_cfg(QUALITY="none", BOX_LOSS_WEIGHTING="none"))
    assert len(other.heat_maps(other.look(image[1]))) == 1 and not other.has_quality


def test_other_detectors_are_not_explained(tmp_path):
    cfg = tiny_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    (pixels,) = make_arrays([(60, 80)])
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    found = Detector(Predictor(cfg), "other").look(str(tmp_path / "a.png"))
    assert found.inspection is None
    assert "not of a RetinaNet" in Detector(Predictor(cfg), "other").unexplained


def wrong_file(folder, kind):
    file = folder / f"{kind}.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    if kind == "text":
        file.write_text("no image")
    elif kind == "truncated":
        cv2.imwrite(str(file), pixels)
        file.write_bytes(file.read_bytes()[:5000])
    elif kind == "deep":
        Image.fromarray(pixels[:, :, 0].astype(np.uint16)).save(file)
    elif kind == "large":
        Image.new("1", (10_000, 5_001)).save(file)
    elif kind == "bomb":
        Image.new("1", (20_000, 10_000)).save(file)
    return str(file)


@pytest.mark.parametrize(
    "kind, sentence",
    [
        ("text", "text.png is not an image that can be read."),
        ("truncated", "truncated.png cannot be read: image file is truncated"),
        ("deep", "deep.png has more than 8 bits a pixel (PIL's mode 'I;16')"),
        ("large", "large.png has 10000 x 5001 pixels, and this page takes up to 50 million."),
        ("bomb", "bomb.png is too large: Image size (200000000 pixels) exceeds limit"),
        ("missing", "missing.png cannot be read: "),
    ],
)
def test_a_wrong_file_is_a_sentence(detector, tmp_path, kind, sentence):
    with pytest.raises(ValueError) as caught:
        detector.look(wrong_file(tmp_path, kind))
    assert sentence in str(caught.value)
    assert str(tmp_path) not in str(caught.value)  # a folder of the server's is nobody's business


def test_a_thin_image_is_shown_with_its_heat_maps(detector, tmp_path):
    cv2.imwrite(str(tmp_path / "thin.png"), np.zeros((1, 6000, 3), np.uint8))
    found = detector.look(str(tmp_path / "thin.png"))
    assert detector.picture(found, LEAST, []).shape == (1, 1600, 3)
    assert all(picture.any() for picture in detector.heat_maps(found))


def test_video(detector, tmp_path, image):
    file = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(file, cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 60))
    for _ in range(3):
        writer.write(image[0])
    writer.release()
    capture = cv2.VideoCapture(file)
    pictures = list(detector.video(file, LEAST, ["square"]))
    assert len(pictures) == 3
    for picture in pictures:
        assert (picture == detector.frame(capture.read()[1], LEAST, ["square"])).all()
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"^text\.mp4 is not a video that OpenCV can read\.$"):
        next(detector.video(str(tmp_path / "text.mp4"), LEAST, []))
