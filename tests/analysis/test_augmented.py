"""The picture of the first training images: in their colours, with their boxes."""

import logging

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import convert_PIL_to_numpy
from helpers import LIGHT, make_instances, tiny_cfg
from PIL import Image

from fcos_d2.analysis.augmented import augmented_sheet
from fcos_d2.data import register_custom_datasets
from fcos_d2.engine import Trainer
from fcos_d2.inference.drawing import class_colors

CELL, STEP_X, STEP_Y, MARGIN = 320, 326, 346, 6


def cell(sheet, number):
    x, y = MARGIN + number % 5 * STEP_X, MARGIN + number // 5 * STEP_Y
    return np.asarray(sheet)[y : y + CELL, x : x + CELL]


def element(color=(200, 120, 40), size=(64, 96), format="BGR", boxes=(), classes=()):
    image = Image.new("RGB", size[::-1], color)
    pixels = torch.as_tensor(convert_PIL_to_numpy(image, format).copy())
    instances = make_instances(boxes, classes, size)
    return {"image": pixels.permute(2, 0, 1), "instances": instances, "file_name": "x/a.png"}


@pytest.mark.parametrize("format", ["BGR", "RGB", "L", "YUV-BT.601"])
def test_colours_are_those_of_the_file(format):
    sheet = augmented_sheet([element(format=format)], format)
    # The grey of (200, 120, 40) is 0.299 * 200 + 0.587 * 120 + 0.114 * 40 = 134.8.
    expected = (135, 135, 135) if format == "L" else (200, 120, 40)
    assert np.abs(cell(sheet, 0)[100, 100].astype(int) - expected).max() <= 2


def test_boxes_and_cells():
    """An image of 64 x 96 pixels fits into 320 x 320 at 10 / 3 of its size."""
    boxes = [(30.0, 30.0, 60.0, 54.0), (66.0, 36.0, 96.0, 64.0)]
    elements = [element(boxes=boxes, classes=[0, 1]), *[element()] * 6]
    sheet = augmented_sheet(elements, "BGR", ["cat", "dog"])
    assert sheet.size == (5 * STEP_X + MARGIN, 2 * STEP_Y + MARGIN)
    drawn = cell(sheet, 0)
    for (x0, y0, x1, y1), color in zip(boxes, class_colors(3), strict=False):
        outline = (drawn == color).all(axis=2)
        ys, xs = np.nonzero(outline[int(y0 * 10 / 3) :])  # below the label
        found = [xs.min(), xs.max(), ys.max() + int(y0 * 10 / 3)]
        expected = [x0 * 10 / 3, x1 * 10 / 3, y1 * 10 / 3]
        assert np.abs(np.array(found) - expected).max() <= 1.5
        # The label, which is filled, stands right above the box.
        assert outline[int(y0 * 10 / 3) - 10 : int(y0 * 10 / 3) - 2].sum() > 60
    without = cell(sheet, 1)
    assert (without[:213] == (200, 120, 40)).all()
    assert (without[214:] == 225).all()
    assert (cell(sheet, 6) == without).all() and (cell(sheet, 7) == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (700, 500)])
def test_sizes_names_and_boxes_at_the_edge(size):
    name = "\ud800 $x^2$ 猫\n" + "long " * 60
    one = element(size=size, boxes=[(0.0, 0.0, *size[::-1])] * 2, classes=[0, 7])
    one["file_name"] = "x/" + name
    alone = {"image": one["image"]}  # of a mapper that makes no boxes
    sheet = augmented_sheet([one, alone] * 5, "BGR", [name])
    assert sheet.size == (5 * STEP_X + MARGIN, 2 * STEP_Y + MARGIN)
    margins = np.asarray(sheet)[:, STEP_X : STEP_X + MARGIN]  # no text or box reaches beyond
    assert (margins == 255).all()


@pytest.fixture
def cfg(shapes_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    cfg = tiny_cfg()
    cfg.merge_from_list(LIGHT)
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(tmp_path), ()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 2, ()
    register_custom_datasets(cfg)
    return cfg


def test_a_training_draws_what_it_sees_first(cfg, tmp_path):
    seen = []

    class Watched(Trainer):
        def run_step(self):
            model, forward = self._trainer.model, self._trainer.model.forward
            model.forward = lambda batch: seen.extend(batch) or forward(batch)
            try:
                super().run_step()
            finally:
                del model.forward

    Watched(cfg).train()
    file = tmp_path / "augmented.jpg"
    expected = augmented_sheet(seen, "BGR", ["disc", "square", "triangle"])
    expected = np.asarray(expected).astype(int)
    found = cv2.imread(str(file))[:, :, ::-1].astype(int)
    # The first four of ten; JPEG changes pixels a little.
    shown = expected[MARGIN : MARGIN + CELL, : 4 * STEP_X]
    assert np.abs(found[MARGIN : MARGIN + CELL, : 4 * STEP_X] - shown).mean() < 5
    assert file.stat().st_size < 500_000
    # A run that goes on does not draw again.
    file.write_bytes(b"drawn before")
    cfg.SOLVER.MAX_ITER = 3
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert file.read_bytes() == b"drawn before"


def test_without_the_picture_a_training_goes_on(cfg, tmp_path, caplog):
    (tmp_path / "augmented.jpg").mkdir()  # so that it cannot be written
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(cfg)
        trainer.train()
    assert trainer.last_step == 1
    assert len([r for r in caplog.records if "There is no picture" in r.message]) == 1
