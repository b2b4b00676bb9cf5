"""Which evaluator a data set has, and where it writes detections."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator

from .stopping import StoppableCOCOEvaluator


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """The evaluator that the data set's ``evaluator_type`` asks for.

    Raises:
        NotImplementedError: for another type than "coco" and "pascal_voc".
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if evaluator_type == "coco":
        return coco_evaluator(cfg, dataset_name, output_folder)
    if evaluator_type == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    raise NotImplementedError(
        f"The data set {dataset_name!r} has evaluator_type {evaluator_type!r}; 'coco' and "
        "'pascal_voc' are supported. Set it in the data set's metadata, or override "
        "Trainer.build_evaluator"
    )


def coco_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> COCOEvaluator:
    """COCO's evaluation of any registered data set: of boxes, and of masks and keypoints of R-CNN.

    Args:
        output_folder: for the detections, in place of OUTPUT_DIR/inference.
    """
    return StoppableCOCOEvaluator(
        dataset_name,
        output_dir=output_folder or inference_folder(cfg, dataset_name),
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        # No cache of converted data sets: their annotations may change between two runs.
        allow_cached_coco=False,
    )


def inference_folder(cfg: CfgNode, dataset_name: str, parent: str = "inference") -> str:
    """Where detections on a data set go: with several data sets, each has its own folder."""
    folder = os.path.join(cfg.OUTPUT_DIR, parent)
    return os.path.join(folder, dataset_name) if len(cfg.DATASETS.TEST) > 1 else folder
