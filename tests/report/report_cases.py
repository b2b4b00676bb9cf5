"""Ground truth and detections in COCO's formats."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO


def make_truth(boxes, images=4, size=(100, 120), names=("disc", "square", "triangle")):
    """COCO annotations; ``boxes``: (image, category, x, y, w, h, is crowd)."""
    truth = COCO()
    truth.dataset = {
        "images": [
            {"id": i, "height": size[0], "width": size[1], "file_name": f"{i}.png"}
            for i in range(images)
        ],
        "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": i + 1, "image_id": image, "category_id": category, "bbox": box,
             "area": box[2] * box[3], "iscrowd": int(crowd)}
            for i, (image, category, *box, crowd) in enumerate(boxes)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def make_results(boxes):
    """Detections; ``boxes``: (image, category, x, y, w, h, score)."""
    return [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, *box, score in boxes
    ]


def random_case(seed, images=4):
    """Boxes, some of them crowds, and detections near them, of wrong classes or of nothing."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for image in range(images):
        for _ in range(rng.integers(0, 6)):
            box = [*rng.integers(0, 60, 2), *rng.integers(2, 50, 2)]
            category = int(rng.integers(1, 4)) * 10
            truth.append((image, category, *map(float, box), rng.random() < 0.1))
            for _ in range(rng.integers(0, 4)):
                near = np.array(box) + rng.normal(0, rng.choice([1, 8]), 4)
                near[2:] = near[2:].clip(1)
                wrong = rng.random() < 0.3
                of_class = int(rng.integers(1, 4)) * 10 if wrong else category
                # Few different scores, so that some are equal.
                found.append((image, of_class, *near.tolist(), float(rng.integers(1, 20)) / 20))
        for _ in range(rng.integers(0, 3)):
            box = [*rng.uniform(0, 60, 2), *rng.uniform(2, 50, 2)]
            found.append((image, int(rng.integers(1, 4)) * 10, *box, float(rng.random())))
    return make_truth(truth, images), make_results(found)
