import hashlib
import json

import cv2
import pytest

from fcos_d2.data import make_shapes_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes_dataset(folder)
    return folder


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [(p.relative_to(folder), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def test_is_the_same_each_time(folder, tmp_path):
    make_shapes_dataset(tmp_path)
    assert digest(tmp_path) == digest(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_is_a_valid_coco_file(folder, split):
    data = json.loads((folder / f"{split}.json").read_text())
    sizes = {i["id"]: (i["width"], i["height"]) for i in data["images"]}
    assert len(set(sizes.values())) > 2
    for image in data["images"]:
        pixels = cv2.imread(str(folder / split / image["file_name"]))
        assert pixels.shape[:2] == (image["height"], image["width"])
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        width, height = sizes[annotation["image_id"]]
        assert x >= 0 and y >= 0 and w > 4 and h > 4 and x + w <= width and y + h <= height
    with_objects = {a["image_id"] for a in data["annotations"]}
    assert 0 < len(sizes) - len(with_objects) < len(sizes) / 5  # some images are empty
    assert {a["category_id"] for a in data["annotations"]} == {1, 2, 3}


def test_splits_share_no_image(folder):
    train, val = ({h for p, h in digest(folder / s)} for s in ("train", "val"))
    assert not train & val
