"""The keys of INPUT that augment, beside NumPy's turns, numbers made by hand, and Detectron2."""

import cv2
import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.data import DatasetMapper as DetectronMapper
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from helpers import tiny_cfg

from fcos_d2.config import get_cfg
from fcos_d2.data import DatasetMapper

HEIGHT, WIDTH = 30, 41
BOX = [3, 5, 12, 9]


@pytest.fixture
def cfg():
    """Images keep their size, and nothing is random, until a test says what is."""
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (HEIGHT,)
    cfg.INPUT.RANDOM_FLIP = "none"
    return cfg


@pytest.fixture
def record(tmp_path):
    """A dark image with noise that has no symmetry, and one box that is white."""
    pixels = np.random.default_rng(0).integers(0, 100, (HEIGHT, WIDTH, 3), np.uint8)
    x0, y0, x1, y1 = BOX
    pixels[y0:y1, x0:x1] = 255
    return make_record(tmp_path, pixels, BOX)


def make_record(folder, pixels, *boxes):
    file = str(folder / "a.png")
    cv2.imwrite(file, pixels)
    annotations = [{"bbox": b, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for b in boxes]
    height, width = pixels.shape[:2]
    return {"file_name": file, "height": height, "width": width, "annotations": annotations}


def mapped(cfg, record, seed=0):
    """The pixels (H, W, C), and the boxes."""
    mapper = DatasetMapper(cfg, is_train=True)
    np.random.seed(seed)
    element = mapper(record)
    boxes = element["instances"].gt_boxes.tensor.numpy()
    return element["image"].permute(1, 2, 0).numpy(), boxes


def white_box(pixels):
    """The corners around what is white."""
    ys, xs = np.nonzero((pixels == 255).all(axis=2))
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
@pytest.mark.parametrize("crop", [True, False])
def test_at_the_defaults_all_is_detectron2s(cfg, record, flip, crop):
    cfg.INPUT.MIN_SIZE_TRAIN = (20, 30, 40)
    cfg.INPUT.RANDOM_FLIP = flip
    cfg.INPUT.CROP.ENABLED = crop
    mappers = DatasetMapper(cfg, is_train=True), DetectronMapper(cfg, is_train=True)
    ours, theirs = ([repr(a) for a in m.augmentations.augs] for m in mappers)
    assert ours == theirs and len(ours) == 1 + crop + (flip != "none")
    record["annotations"][0]["bbox"] = [float(x) for x in BOX]  # for Detectron2's
    for seed in range(5):
        elements = []
        for mapper in mappers:
            np.random.seed(seed)
            elements.append(mapper(record))
        assert torch.equal(elements[0]["image"], elements[1]["image"])
        boxes = [e["instances"].gt_boxes.tensor for e in elements]
        assert torch.equal(*boxes)


@pytest.mark.parametrize(
    "name, opts",
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", {}),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", {"INPUT.CROP.ENABLED": True}),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x", {}),
        ("COCO-Detection/fast_rcnn_R_50_FPN_1x", {}),  # loads proposals
    ],
)
@pytest.mark.parametrize("is_train", [True, False])
def test_models_with_more_than_boxes(name, opts, is_train):
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(f"{name}.yaml"))
    cfg.merge_from_list([x for pair in opts.items() for x in pair])
    ours, theirs = (m.from_config(cfg, is_train) for m in (DatasetMapper, DetectronMapper))
    # The keypoints' flipped order is an array, and augmentations are equal if they look equal.
    assert {k: repr(v) for k, v in ours.items()} == {k: repr(v) for k, v in theirs.items()}


def test_testing_is_not_augmented(cfg):
    plain = DatasetMapper(cfg, is_train=False)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.ROTATE_90, cfg.INPUT.COLOR = "both", True, 0.5
    cfg.INPUT.LSJ.ENABLED = True
    augmented = DatasetMapper(cfg, is_train=False)
    assert repr(plain.augmentations) == repr(augmented.augmentations)


def test_turns_are_those_of_numpy(cfg, record):
    cfg.INPUT.ROTATE_90 = True
    original = cv2.imread(record["file_name"])
    turns = set()
    for seed in range(12):
        pixels, (box,) = mapped(cfg, record, seed)
        (turn,) = (k for k in range(4) if np.array_equal(pixels, np.rot90(original, k)))
        assert box.tolist() == pytest.approx(white_box(pixels), abs=1e-5)
        turns.add(turn)
    assert turns == {0, 1, 2, 3}


def test_turned_boxes_keep_their_fraction(cfg, record):
    cfg.INPUT.ROTATE_90 = True
    x0, y0, x1, y1 = record["annotations"][0]["bbox"] = [3.25, 5.5, 12.75, 9.125]
    # A quarter turn to the left takes (x, y) to (y, WIDTH - x).
    expected = {
        0: [x0, y0, x1, y1],
        1: [y0, WIDTH - x1, y1, WIDTH - x0],
        2: [WIDTH - x1, HEIGHT - y1, WIDTH - x0, HEIGHT - y0],
        3: [HEIGHT - y1, x0, HEIGHT - y0, x1],
    }
    found = set()
    for seed in range(12):
        _, (box,) = mapped(cfg, record, seed)
        (turn,) = (k for k, e in expected.items() if box.tolist() == pytest.approx(e, abs=1e-5))
        found.add(turn)
    assert found == {0, 1, 2, 3}


def test_both_flips(cfg, record):
    cfg.INPUT.RANDOM_FLIP = "both"
    original = cv2.imread(record["file_name"])
    found = set()
    for seed in range(16):
        pixels, (box,) = mapped(cfg, record, seed)
        (axes,) = (a for a in ((), (0,), (1,), (0, 1)) if (pixels == np.flip(original, a)).all())
        assert box.tolist() == pytest.approx(white_box(pixels), abs=1e-5)
        found.add(axes)
    assert len(found) == 4


def test_jitter_that_enlarges_cuts_and_drops_boxes(cfg, record):
    """Scale 2 of SIZE 40: 30 x 41 pixels fit into 80, so that they become 59 x 80."""
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE = True, 40
    cfg.INPUT.LSJ.MIN_SCALE = cfg.INPUT.LSJ.MAX_SCALE = 2.0
    boxes = [[16, 10, 26, 20], [0, 0, 21, 30], [0, 0, 2, 2], [20, 0, 41, 30]]
    record["annotations"] = [dict(record["annotations"][0], bbox=b) for b in boxes]
    sizes = set()
    for seed in range(8):
        pixels, found = mapped(cfg, record, seed)
        draws = np.random.RandomState(seed)
        draws.uniform(2, 2)  # the scale
        share = draws.uniform()
        offset = np.round(np.array([80 - 40, 59 - 40]) * share)
        moved = np.array(boxes) * np.tile([80 / 41, 59 / 30], 2) - np.tile(offset, 2)
        moved = moved.clip(0, 40)
        moved = moved[(moved[:, 0] < moved[:, 2]) & (moved[:, 1] < moved[:, 3])]
        assert pixels.shape == (40, 40, 3)
        assert found == pytest.approx(moved.astype(np.float32), abs=1e-4)
        sizes.add(len(found))
    assert sizes == {3, 4}  # the small box in the corner is in some of them


def test_jitter_that_shrinks_pads(cfg, record):
    """Scale 0.5 of SIZE 82: half of 82 is the width of the image, which stays as it is."""
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE = True, 82
    cfg.INPUT.LSJ.MIN_SCALE = cfg.INPUT.LSJ.MAX_SCALE = 0.5
    cfg.INPUT.COLOR = 0.5  # which leaves the grey of the padding
    pixels, (box,) = mapped(cfg, record)
    assert pixels.shape == (82, 82, 3) and box.tolist() == pytest.approx(BOX)
    assert (pixels[HEIGHT:] == 128).all() and (pixels[:, WIDTH:] == 128).all()
    assert not (pixels[:HEIGHT, :WIDTH] == 128).all(axis=2).any()


def test_scales_are_between_the_bounds(cfg, tmp_path):
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE = True, 100
    cfg.INPUT.LSJ.MIN_SCALE, cfg.INPUT.LSJ.MAX_SCALE = 0.2, 0.9
    record = make_record(tmp_path, np.full((50, 50, 3), 255, np.uint8), [0, 0, 50, 50])
    sides = [mapped(cfg, record, seed)[1][0, 2] for seed in range(40)]
    assert 20 <= min(sides) < 30 and 80 < max(sides) <= 90


@pytest.mark.parametrize("format", ["BGR", "RGB"])
def test_colours(cfg, tmp_path, format):
    """A plain image, by the formulas of PIL's ImageEnhance."""
    red, green, blue = 140.0, 100.0, 60.0
    record = make_record(tmp_path, np.full((8, 8, 3), (blue, green, red), np.uint8))
    record["annotations"] = []
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.COLOR, cfg.INPUT.FORMAT = (8,), 0.4, format
    for seed in range(5):
        draws = np.random.RandomState(seed)
        draws.randint(8, 9)  # the size
        brightness, contrast, saturation = draws.uniform(0.6, 1.4, 3)
        rgb = (brightness * np.array([red, green, blue])).clip(0, 255)
        rgb = (contrast * rgb + (1 - contrast) * rgb.mean()).clip(0, 255)
        grey = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
        rgb = (saturation * rgb + (1 - saturation) * grey).clip(0, 255)
        pixels, _ = mapped(cfg, record, seed)
        found = pixels if format == "RGB" else pixels[:, :, ::-1]
        # Each of the three steps cuts off a fraction, which the next ones enlarge by 1.4 at most:
        # 1 + 1.4 + 1.4 * 1.4 = 4.4. With red and blue exchanged in the grey it is up to 6 more.
        assert np.abs(found - rgb).max() < 4.4


def test_a_crop_without_a_box_trains(cfg, record):
    """Detectron2's key. The box is in the corner: some crops have it, cut or whole, others not."""
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [10, 10]
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    mapper, elements = DatasetMapper(cfg, is_train=True), {}
    for seed in range(40):
        np.random.seed(seed)
        element = mapper(record)
        elements[len(element["instances"])] = element
        box = element["instances"].gt_boxes.tensor
        assert (box >= 0).all() and (box <= 64).all()
    assert set(elements) == {0, 1}
    losses = build_model(cfg)([elements[0]])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())


ALL_KEYS = ["INPUT.ROTATE_90", True, "INPUT.COLOR", 0.9, "INPUT.RANDOM_FLIP", "both"]
CROP = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative_range"]
LSJ = ["INPUT.LSJ.ENABLED", True, "INPUT.LSJ.SIZE", 64]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (40, 30)])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("keys", [CROP, LSJ])
def test_small_and_grey_images_and_those_without_boxes(cfg, tmp_path, size, channels, keys):
    cfg.merge_from_list(ALL_KEYS + keys)
    pixels = np.full((*size, channels), 200, np.uint8)
    for boxes in ((), ([0, 0, size[1], size[0]],)):
        for seed in range(4):
            found, mapped_boxes = mapped(cfg, make_record(tmp_path, pixels, *boxes), seed)
            assert found.ndim == 3 and found.shape[2] == 3 and found.dtype == np.uint8
            assert len(mapped_boxes) <= len(boxes)


@pytest.mark.parametrize(
    "opts, match",
    [
        ({"RANDOM_FLIP": "diagonal"}, r"RANDOM_FLIP must be one of .*'both'.*got 'diagonal'"),
        ({"RANDOM_FLIP": ""}, "RANDOM_FLIP must be one of"),
        ({"COLOR": -0.1}, r"COLOR must be 0.0 \(off\) or a strength below 1.*got -0.1"),
        ({"COLOR": 1.0}, "COLOR must be"),
        ({"COLOR": float("nan")}, "COLOR must be"),
        ({"LSJ.SIZE": 0}, r"LSJ needs .*'SIZE': 0.*defaults are"),
        ({"LSJ.SIZE": -5}, "LSJ needs"),
        ({"LSJ.SIZE": 9}, "LSJ needs .*at least one pixel"),  # 0.9 pixels at MIN_SCALE
        ({"LSJ.MIN_SCALE": 0.0}, "LSJ needs"),
        ({"LSJ.MIN_SCALE": 3.0}, "LSJ needs 0 < MIN_SCALE <= MAX_SCALE"),
        ({"LSJ.MAX_SCALE": float("inf")}, "LSJ needs"),
        ({"LSJ.MAX_SCALE": float("nan")}, "LSJ needs"),
        ({"CROP.ENABLED": True}, "LSJ and INPUT.CROP both cut"),
        ({"FORMAT": "L"}, r"LSJ.ENABLED need an INPUT.FORMAT of \['BGR', 'RGB'\], got 'L'"),
    ],
)
def test_wrong_values_are_errors_at_the_start(cfg, opts, match):
    cfg.INPUT.LSJ.ENABLED = any("LSJ" in key for key in opts) or not {"RANDOM_FLIP", "COLOR"} & {
        *opts
    }
    cfg.merge_from_list([x for key, value in opts.items() for x in (f"INPUT.{key}", value)])
    with pytest.raises(ValueError, match=match):
        DatasetMapper(cfg, is_train=True)
    cfg.INPUT.LSJ.SIZE = 64
    DatasetMapper(cfg, is_train=False)  # which does not augment


@pytest.mark.parametrize(
    "kind, size",
    [
        ("relative", [0.0, 0.5]), ("relative_range", [0.5, 1.5]), ("relative", [-0.5, 0.5]),
        ("relative", [0.5]), ("relative", [float("nan"), 0.5]), ("absolute", [0.9, 0.9]),
        ("absolute", [0, 10]), ("absolute_range", [20, 10]), ("relativ", [0.5, 0.5]),
        ("absolute", [10, 10, 10]), ("absolute_range", []),
    ],
)  # fmt: skip
def test_wrong_crops(cfg, kind, size):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, kind, size
    with pytest.raises(ValueError, match=rf"INPUT\.CROP needs .*got '{kind}'"):
        DatasetMapper(cfg, is_train=True)


@pytest.mark.parametrize(
    "kind, size",
    [("relative", [1.0, 0.1]), ("absolute", [9, 4]), ("absolute_range", [4, 4])],
)
def test_right_crops(cfg, record, kind, size):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, kind, size
    pixels, _ = mapped(cfg, record)
    # (30, 4), (9, 4) and (4, 4) pixels, whose shorter side becomes 30.
    expected = {"relative": (225, 30), "absolute": (68, 30), "absolute_range": (30, 30)}
    assert pixels.shape[:2] == pytest.approx(expected[kind], abs=1)


def test_a_mask_that_is_cut_gets_its_box_anew(cfg):
    cfg.MODEL.MASK_ON = True
    assert not DatasetMapper(cfg, is_train=True).recompute_boxes
    cfg.INPUT.LSJ.ENABLED = True
    assert DatasetMapper(cfg, is_train=True).recompute_boxes
    cfg.MODEL.MASK_ON = False
    assert not DatasetMapper(cfg, is_train=True).recompute_boxes
