"""Small models and inputs, and slow, obvious references for the fast code."""

import math
import os
import random
import socket
import subprocess
import sys
from contextlib import suppress

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from hypothesis import strategies as st

import fcos_d2
from fcos_d2.modeling import HeadOutputs, Levels

RANGES = [(0, 64), (64, 128), (128, 256), (256, 512), (512, math.inf)]
STRIDES = [8, 16, 32, 64, 128]
LEVELS = Levels(tuple(STRIDES))


def free_port():
    """A port for processes that listen later, in a range that systems do not give out meanwhile."""
    for port in random.Random().sample(range(20000, 32000), 50):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return str(port)
    raise OSError("50 ports from 20000 to 32000 are taken")


# Overrides that make the demo's detector light, where only training and its files matter: 0.4 M
# parameters in place of 11.5 M, so checkpoints of 3 MB in place of 92 and steps six times as fast.
LIGHT = (
    *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
)


# The keys of GFL: each value has a test of its own, and together they must work everywhere.
GFL = {
    "ASSIGNMENT": "atss",
    "QUALITY": "joint",
    "CLS_LOSS_TYPE": "quality_focal",
    "BOX_ACTIVATION": "distribution",
    "BOX_LOSS_WEIGHTING": "score",
}
GFLV2 = GFL | {"DISTRIBUTION_QUALITY": True}
# Those of the two rules that see what the head predicts.
SIMOTA = {"ASSIGNMENT": "simota"}
ALIGNED = {
    "ASSIGNMENT": "task_aligned",
    "QUALITY": "joint",
    "CLS_LOSS_TYPE": "quality_focal",
    "BOX_LOSS_WEIGHTING": "alignment",
}
# TOOD, whose rule goes with a head of its own.
TOOD = ALIGNED | {
    "HEAD": "task_aligned",
    "NUM_SHARE_CONVS": 2,
    "NUM_CLS_CONVS": 0,
    "NUM_BOX_CONVS": 0,
    "BOX_ACTIVATION": "exp",
}


def tiny_cfg(**fcos_keys):
    """R-18 with 64 channels and towers of one layer, 3 classes; keyword arguments are FCOS keys."""
    cfg = fcos_d2.get_cfg()
    cfg.merge_from_file(
        fcos_d2.model_zoo.get_config_file("quick_schedules/fcos_R_18_FPN_shapes.yaml")
    )
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FCOS.NUM_CLS_CONVS = 1
    cfg.MODEL.FCOS.NUM_BOX_CONVS = 1
    for key, value in fcos_keys.items():
        cfg.MODEL.FCOS[key] = value
    return cfg


@torch.no_grad()
def make_detector(cfg=None, **fcos_keys):
    """A model that detects about one in a hundred classes and locations of random images."""
    torch.manual_seed(0)
    model = build_model(tiny_cfg(**fcos_keys) if cfg is None else cfg).eval()
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.2)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.1)
    torch.nn.init.constant_(model.head.bbox_pred.bias, 2)
    if hasattr(model.head, "offsets"):  # sides from other places, also from beyond the border
        torch.nn.init.normal_(model.head.offsets[2].bias, std=0.5)
        torch.nn.init.normal_(model.head.offsets[2].weight, std=0.5)
    images = model.preprocess_image([make_input(size=(160, 160))])
    logits = torch.cat([x.flatten() for x in model.head_outputs(images).class_logits])
    model.head.cls_logits.bias += -3 - logits.quantile(0.99)  # sigmoid(-3) is about 0.05
    return model


def make_instances(boxes, classes, image_size=(64, 96)):
    instances = Instances(image_size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


several_processes = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="two processes need two GPUs (NCCL), or none (GLOO)"
)


def make_input(boxes=((10.0, 8.0, 50.0, 40.0),), classes=(1,), size=(64, 96), seed=0):
    """One element of a training batch, with a random image of (height, width)."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    return {"image": image, "instances": make_instances(boxes, classes, size)}


def make_arrays(sizes):
    """Random images (H, W, 3) of (height, width)."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def assert_same_detections(boxes, scores, classes, expected):
    """Detections as arrays, beside Detectron2's Instances, in any order. Returns how many."""
    assert len(boxes) == len(scores) == len(classes) == len(expected)
    assert (np.diff(scores) <= 0).all()
    left = np.ones(len(boxes), dtype=bool)
    for i in range(len(expected)):
        alike = left & (np.abs(boxes - expected.pred_boxes.tensor[i].numpy()).max(axis=1) < 0.01)
        alike &= np.abs(scores - expected.scores[i].item()) < 1e-4
        alike &= classes == expected.pred_classes[i].item()
        assert alike.any(), f"{expected[i]} is missing"
        left[alike.argmax()] = False
    return len(boxes)


def level_locations(height, width, stride):
    """(height * width, 2) locations of all cells of a level, row by row."""
    cells = [((x + 0.5) * stride, (y + 0.5) * stride) for y in range(height) for x in range(width)]
    return torch.tensor(cells).reshape(-1, 2)


def level_shapes(height, width, strides=STRIDES):
    return [(math.ceil(height / s), math.ceil(width / s)) for s in strides]


def assign_by_loops(shapes, strides, ranges, radius, boxes_per_image, offset=0.5):
    """The definition of the assignment, cell by cell and box by box, in float32.

    Returns:
        {(image, level, cell): index of the box in the batch}
    """
    f = np.float32
    owners = {}
    for level, ((height, width), stride, (low, high)) in enumerate(
        zip(shapes, strides, ranges, strict=True)
    ):
        for y in range(height):
            for x in range(width):
                px, py = f((x + offset) * stride), f((y + offset) * stride)
                number = 0
                for image, boxes in enumerate(boxes_per_image):
                    best_area = None
                    for x0, y0, x1, y1 in boxes.numpy():
                        ltrb = (px - x0, py - y0, x1 - px, y1 - py)
                        inside = min(ltrb) > 0
                        in_range = low <= max(ltrb) <= high
                        near = radius == 0 or (
                            abs(px - (x0 + x1) / f(2)) < radius * stride
                            and abs(py - (y0 + y1) / f(2)) < radius * stride
                        )
                        area = (x1 - x0) * (y1 - y0)
                        if inside and in_range and near and (best_area is None or area < best_area):
                            best_area = area
                            owners[image, level, y * width + x] = number
                        number += 1
    return owners


def make_outputs(shapes, strides, boxes_per_image, num_classes=3, offset=0.5, noise=0.2, seed=0):
    """What a head may predict: at each cell logits, and a box near to one of its image.

    With a noise above 0.5 or so, some distances are negative.
    """
    random, logits, ltrb = torch.Generator().manual_seed(seed), [], []
    for (height, width), stride in zip(shapes, strides, strict=True):
        n = len(boxes_per_image)
        logits.append(torch.randn(n, num_classes, height, width, generator=random) * 2 - 2)
        ltrb.append(torch.rand(n, 4, height, width, generator=random) * 4 * stride)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        px, py = (x + offset) * stride, (y + offset) * stride
        for image, boxes in enumerate(boxes_per_image):
            if len(boxes):
                number = torch.randint(len(boxes), (height, width), generator=random)
                x0, y0, x1, y1 = boxes[number].unbind(2)
                true = torch.stack([px - x0, py - y0, x1 - px, y1 - py])
                factor = 1 + noise * torch.randn(4, height, width, generator=random)
                ltrb[-1][image] = true * factor
    return HeadOutputs(logits, ltrb, None)


def candidates_by_loops(shapes, strides, boxes_per_image, outputs, offset=0.5, radius=math.inf):
    """For each box of the batch, the cells strictly inside and within the radius of its centre.

    A cell is (image, level, cell), its class logits, the IoU of the box predicted there, and the
    four distances, all in float64 but for the distances: level by level, row by row.
    """
    found = []
    for image, boxes in enumerate(boxes_per_image):
        for x0, y0, x1, y1 in boxes.tolist():
            found.append([])
            for level, ((height, width), stride) in enumerate(zip(shapes, strides, strict=True)):
                for y in range(height):
                    for x in range(width):
                        px, py = (x + offset) * stride, (y + offset) * stride
                        off_center = max(abs(px - (x0 + x1) / 2), abs(py - (y0 + y1) / 2))
                        sides = np.float32([px - x0, py - y0, x1 - px, y1 - py])
                        if min(sides) <= 0 or off_center >= radius * stride:
                            continue
                        left, top, right, bottom = outputs.ltrb[level][image, :, y, x].tolist()
                        a, b = (px - left, py - top, px + right, py + bottom), (x0, y0, x1, y1)
                        wide = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
                        high = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
                        area = max(a[2] - a[0], 0) * max(a[3] - a[1], 0)
                        iou = wide * high / (area + (x1 - x0) * (y1 - y0) - wide * high)
                        logits = outputs.class_logits[level][image, :, y, x].tolist()
                        found[-1].append(((image, level, y * width + x), logits, iou, sides))
    return found


@st.composite
def box(draw, coordinate):
    """A box as [x0, y0, x1, y1], from a strategy for coordinates."""
    x0, x1 = sorted((draw(coordinate), draw(coordinate)))
    y0, y1 = sorted((draw(coordinate), draw(coordinate)))
    return [x0, y0, x1, y1]


_coordinate = st.one_of(
    st.floats(-100, 300, width=32), st.integers(0, 32).map(lambda x: 8.0 * x), st.just(-9000.0)
)


@st.composite
def predictions(draw, num_classes):
    """(shapes, strides, boxes, classes, outputs, offset) of up to two images, with many ties."""
    images = draw(st.lists(st.lists(box(_coordinate), max_size=3), min_size=1, max_size=2))
    shapes = level_shapes(*draw(st.sampled_from([(100, 140), (64, 128), (8, 200)])))
    offset, noise = draw(st.sampled_from([0.5, 0.0])), draw(st.sampled_from([0.0, 0.1, 1.0]))
    seed = draw(st.integers(0, 99))
    boxes = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in images]
    if noise == 0:  # predictions are exact: so are their IoUs, in float32 as in the loops
        boxes = [b.round() for b in boxes]
    boxes = [torch.cat([b, b.flip(0)]) for b in boxes]  # a second copy of each makes ties
    classes = [i % num_classes for b in boxes for i in range(len(b))]
    outputs = make_outputs(shapes, STRIDES, boxes, num_classes, offset, noise, seed)
    if seed % 2:  # few different values: equal costs, and equal alignments
        outputs = outputs._replace(class_logits=[x.sign() for x in outputs.class_logits])
    return shapes, STRIDES, boxes, classes, outputs, offset


def as_dict(positives, shapes):
    """{(image, level, cell): index of the box in the batch}; cells are counted row by row."""
    columns = (positives.image, positives.level, positives.x, positives.y, positives.gt)
    entries = zip(*(c.tolist() for c in columns), strict=True)
    owners = {(i, level, y * shapes[level][1] + x): gt for i, level, x, y, gt in entries}
    assert len(owners) == len(positives)
    return owners


def run_with_d2_env(*args, folder=None, **variables):
    """Run Python with fcos_d2.d2_env named to Detectron2, and with nothing else of ours."""
    env = os.environ | {"DETECTRON2_ENV_MODULE": "fcos_d2.d2_env"} | variables
    command = [sys.executable, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


class Payload:
    """An object that runs code when it is unpickled: it creates a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def assert_plots(folder, names):
    """The folder holds these PNG files alone, and each shows something on white."""
    assert {file.name for file in folder.iterdir()} == names
    for name in names:
        pixels = cv2.imread(str(folder / name))
        assert pixels.min() < 50 and pixels.max() == 255
