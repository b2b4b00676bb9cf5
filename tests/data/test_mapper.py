"""Annotations keep their fractions, and images their depth, on the way into a model."""

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from helpers import tiny_cfg

from fcos_d2 import Predictor
from fcos_d2.data import DatasetMapper
from fcos_d2.data.image_files import check_depth, read_image


@pytest.fixture
def image_file(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((30, 40, 3), np.uint8))
    return str(tmp_path / "a.png")


def make_mapper(**kwargs):
    # From 30 x 40 to 50 x 67 pixels: 1.6667 and 1.675 times.
    resize = T.Resize((50, 67))
    return DatasetMapper(is_train=True, augmentations=[resize], image_format="BGR", **kwargs)


@pytest.mark.parametrize("kind", [int, float, np.int64])
def test_boxes_keep_their_fraction(image_file, kind):
    box = [kind(x) for x in (5, 7, 10, 11)]
    record = {
        "file_name": image_file, "height": 30, "width": 40,
        "annotations": [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}],
    }  # fmt: skip
    (mapped,) = make_mapper()(record)["instances"].gt_boxes.tensor.tolist()
    scale = 67 / 40, 50 / 30
    assert mapped == pytest.approx([5 * scale[0], 7 * scale[1], 10 * scale[0], 11 * scale[1]])
    assert record["annotations"][0]["bbox"] == box  # left as it was


def test_polygons_keep_their_fraction(image_file):
    annotation = {
        "bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0,
        "segmentation": [[1, 1, 9, 1, 9, 9]],
    }  # fmt: skip
    record = {"file_name": image_file, "height": 30, "width": 40, "annotations": [annotation]}
    masks = make_mapper(use_instance_mask=True)(record)["instances"].gt_masks
    scale = 67 / 40, 50 / 30
    expected = [1 * scale[0], 1 * scale[1], 9 * scale[0], 1 * scale[1], 9 * scale[0], 9 * scale[1]]
    assert masks.polygons[0][0].tolist() == pytest.approx(expected)


def test_proposals_keep_their_fraction(image_file):
    record = {
        "file_name": image_file, "height": 30, "width": 40,
        "proposal_boxes": np.array([[1, 1, 9, 9]]), "proposal_bbox_mode": BoxMode.XYXY_ABS,
        "proposal_objectness_logits": np.array([0.5]),
    }  # fmt: skip
    proposals = make_mapper(precomputed_proposal_topk=5)(record)["proposals"]
    (box,) = proposals.proposal_boxes.tensor.tolist()
    assert box == pytest.approx([67 / 40, 50 / 30, 9 * 67 / 40, 15])


def test_images_of_16_bits_are_refused(tmp_path):
    file = str(tmp_path / "deep.png")
    cv2.imwrite(file, np.full((30, 40), 3000, np.uint16))
    record = {"file_name": file, "height": 30, "width": 40}
    for use in (check_depth, make_mapper(), Predictor(tiny_cfg())):
        with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits a pixel.*Convert"):
            use(record if isinstance(use, DatasetMapper) else file)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_8_bits_are_read(tmp_path, channels):
    file = str(tmp_path / "a.png")
    cv2.imwrite(file, np.full((30, 40, channels), 77, np.uint8))
    image = read_image(file, "BGR")
    assert image.shape == (30, 40, 3) and (image == 77).all()
