"""Which evaluator a data set has, where it writes detections, and which result decides."""

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from ..modeling import FCOSWithTTA
from .stopping import StoppableCOCOEvaluator, StoppableEvaluator, stop_signals

# The meta architectures that test-time augmentation (TEST.AUG) supports.
AUGMENTED = {"FCOS": FCOSWithTTA, "GeneralizedRCNN": GeneralizedRCNNWithTTA}


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """The evaluator that the data set's ``evaluator_type`` asks for.

    During a training of several processes it is one that a signal can stop.

    Raises:
        NotImplementedError: for another type than "coco" and "pascal_voc".
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if evaluator_type == "coco":
        evaluator = coco_evaluator(cfg, dataset_name, output_folder)
    elif evaluator_type == "pascal_voc":
        evaluator = PascalVOCDetectionEvaluator(dataset_name)
    else:
        raise NotImplementedError(
            f"The data set {dataset_name!r} has evaluator_type {evaluator_type!r}; 'coco' and "
            "'pascal_voc' are supported. Set it in the data set's metadata, or override "
            "Trainer.build_evaluator"
        )
    return stoppable(evaluator)


def stoppable(evaluator: DatasetEvaluator) -> DatasetEvaluator:
    """During a training of several processes, one that stops in all of them after a signal."""
    has_others = stop_signals.is_recording and comm.get_world_size() > 1
    return StoppableEvaluator(evaluator) if has_others else evaluator


def coco_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> COCOEvaluator:
    """COCO's evaluation of any registered data set: of boxes, and of masks and keypoints of R-CNN.

    Args:
        output_folder: for the detections, in place of OUTPUT_DIR/inference.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("image_root") is not None and metadata.get("json_file") is None:
        DatasetCatalog.get(dataset_name)  # a COCO entry of DATASETS.CUSTOM: loading finds its file
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


def deciding_metric(cfg: CfgNode) -> str:
    """The name of the result that decides which checkpoint is the best, such as "bbox/AP"."""
    # With several data sets, results have the data set's name in front. The first one decides.
    prefix = f"{cfg.DATASETS.TEST[0]}/" if len(cfg.DATASETS.TEST) > 1 else ""
    proposals_alone = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
    return prefix + ("box_proposals/AR@1000" if proposals_alone else "bbox/AP")


def augmented_name(metric: str) -> str:
    """The name of a result of :func:`evaluate_with_augmentation`, such as "bbox_TTA/AP"."""
    first, _, rest = metric.partition("/")
    return f"{first}_TTA/{rest}"


def evaluate_with_augmentation(
    trainer: type[DefaultTrainer], cfg: CfgNode, model: nn.Module
) -> dict:
    """Evaluate with test-time augmentation; names of results end with "_TTA"."""
    logging.getLogger(__name__).info("Evaluating with test-time augmentation ...")
    wrapper = AUGMENTED[cfg.MODEL.META_ARCHITECTURE]
    evaluators = [
        trainer.build_evaluator(cfg, name, inference_folder(cfg, name, "inference_TTA"))
        for name in cfg.DATASETS.TEST
    ]
    # The augmentation scales the original pixels, not those at the size of the plain test.
    original = cfg.clone()
    original.defrost()
    original.INPUT.MIN_SIZE_TEST = 0
    results = trainer.test(original, wrapper(cfg, model), evaluators)
    return {f"{name}_TTA": value for name, value in results.items()}
