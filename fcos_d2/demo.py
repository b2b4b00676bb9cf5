"""The main job on a built-in data set: make it, train on it, evaluate, draw the predictions.

python -m fcos_d2.demo --output demo_output
"""

import argparse
import random
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor, default_setup
from detectron2.structures import Instances
from tabulate import tabulate

from . import model_zoo
from .data import make_shapes_dataset, register_custom_datasets
from .engine import Trainer
from .inference.drawing import annotations_as_instances, draw_instances
from .report import write_report

CONFIG = "quick_schedules/fcos_R_18_FPN_shapes.yaml"
_SHOWN_SCORE = 0.4
_GAP = 12  # pixels between the images of the grid


def demo_config(output: Path):
    """The demo's config, with its data set and results under ``output``."""
    cfg = model_zoo.get_config(CONFIG)
    for entry in cfg.DATASETS.CUSTOM.values():
        entry.JSON = str(output.resolve() / entry.JSON)
        entry.IMAGES = str(output.resolve() / entry.IMAGES)
    cfg.OUTPUT_DIR = str(output)
    return cfg


def draw_predictions(cfg, dataset_name: str, num_images: int = 10) -> np.ndarray:
    """A grid of images, each twice: ground truth on the left, predictions on the right.

    Returns:
        (H, W, 3) uint8, BGR.
    """
    predict = DefaultPredictor(cfg)
    # Colours by class rather than at random.
    MetadataCatalog.get(dataset_name).thing_colors = [(255, 255, 255), (255, 220, 0), (0, 255, 255)]
    dicts = DatasetCatalog.get(dataset_name)
    empty = [d for d in dicts if not d["annotations"]][:1]
    shown = empty + [d for d in dicts if d["annotations"]][: num_images - len(empty)]
    random.Random(0).shuffle(shown)
    pairs = []
    for record in shown:
        image = cv2.imread(record["file_name"])
        detections = predict(image)["instances"].to("cpu")
        truth = annotations_as_instances(record["annotations"], image.shape[:2])
        detections = detections[detections.scores > _SHOWN_SCORE]
        titled = [
            _titled(image, truth, dataset_name, f"ground truth: {len(truth)}"),
            _titled(image, detections, dataset_name, f"predicted: {len(detections)}"),
        ]
        pairs.append(np.hstack(titled))
    width = max(p.shape[1] for p in pairs) + _GAP
    rows = []
    for row in (pairs[i : i + 2] for i in range(0, len(pairs), 2)):
        height = max(p.shape[0] for p in row) + _GAP
        rows.append(np.hstack([_padded(p, height, width) for p in row]))
    return np.vstack([_padded(row, row.shape[0], 2 * width) for row in rows])


def _titled(image: np.ndarray, instances: Instances, dataset_name: str, title: str) -> np.ndarray:
    drawn = draw_instances(image, instances, MetadataCatalog.get(dataset_name), scale=2.0)
    bar = np.full((26, drawn.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, title, (4, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([bar, drawn])


def _padded(image: np.ndarray, height: int, width: int) -> np.ndarray:
    missing = (height - image.shape[0], width - image.shape[1])
    return cv2.copyMakeBorder(
        image, 0, missing[0], 0, missing[1], cv2.BORDER_CONSTANT, value=(255, 255, 255)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    output = parser.parse_args().output

    cfg = demo_config(output)
    make_shapes_dataset(output / "shapes")
    register_custom_datasets(cfg)
    default_setup(cfg, argparse.Namespace(eval_only=False))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()["bbox"]

    cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
    picture = output / "predictions.png"
    cv2.imwrite(str(picture), draw_predictions(cfg, cfg.DATASETS.TEST[0]))
    print("\nHeld-out images of the shapes data set:")
    print(tabulate([results.values()], headers=results.keys(), floatfmt=".1f"))
    print(f"\nPredictions beside the ground truth: {picture}")
    for page in write_report(cfg):
        print(f"Where it fails, class by class: {page}")


if __name__ == "__main__":
    main()
