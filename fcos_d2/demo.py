"""The main job on a built-in data set: make it, train on it, evaluate, draw the predictions.

python -m fcos_d2.demo --output demo_output
"""

import argparse
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.engine import default_setup
from detectron2.structures import Instances
from matplotlib.figure import Figure
from tabulate import tabulate

from . import model_zoo
from .analysis.charts import new_figure
from .data import make_shapes_dataset, register_custom_datasets
from .data.image_files import read_image
from .engine import Trainer
from .inference import Predictor, draw_instances
from .report import write_report

CONFIG = "quick_schedules/fcos_R_18_FPN_shapes.yaml"
_SHOWN_SCORE = 0.4


def demo_config(output: Path) -> CfgNode:
    """The demo's config, with its data set and results under ``output``."""
    cfg = model_zoo.get_config(CONFIG)
    for entry in cfg.DATASETS.CUSTOM.values():
        entry.JSON = str(output.resolve() / entry.JSON)
        entry.IMAGES = str(output.resolve() / entry.IMAGES)
    cfg.OUTPUT_DIR = str(output)
    return cfg


def predictions_figure(cfg: CfgNode, dataset_name: str) -> Figure:
    """Ten images, one of them empty: ground truth on the left, predictions on the right."""
    records = DatasetCatalog.get(dataset_name)
    shown = [record for record in records if record["annotations"]][:9]
    shown.append(next(record for record in records if not record["annotations"]))
    metadata = MetadataCatalog.get(dataset_name)
    metadata.thing_colors = [(255, 255, 255), (255, 220, 0), (0, 255, 255)]  # by class
    figure = new_figure(10, 11)
    pairs = figure.subplots(5, 4, subplot_kw={"xticks": [], "yticks": []}).reshape(10, 2)
    images = [read_image(record["file_name"], "BGR") for record in shown]
    detected = Predictor(cfg).pairs(images)
    for axes, record, (image, output) in zip(pairs, shown, detected, strict=True):
        truth = annotations_to_instances(record["annotations"], image.shape[:2])
        boxes = {"pred_boxes": truth.gt_boxes, "pred_classes": truth.gt_classes}
        truth = Instances(truth.image_size, **boxes)
        axes[0].imshow(draw_instances(image, truth, metadata, scale=2.0)[:, :, ::-1])
        axes[0].set_title(f"ground truth: {len(record['annotations'])}")
        found = output["instances"]
        axes[1].imshow(draw_instances(image, found, metadata, _SHOWN_SCORE, 2.0)[:, :, ::-1])
        axes[1].set_title(f"predicted: {(found.scores >= _SHOWN_SCORE).sum()}")
    return figure


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
    predictions_figure(cfg, cfg.DATASETS.TEST[0]).savefig(picture)
    print("\nHeld-out images of the shapes data set:")
    print(tabulate([results.values()], headers=results.keys(), floatfmt=".1f"))
    print(f"\nPredictions beside the ground truth: {picture}")
    for page in write_report(cfg):
        print(f"Where it fails, class by class: {page}")


if __name__ == "__main__":
    main()
