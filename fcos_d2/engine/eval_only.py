"""Evaluation without training: --eval-only."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator

from ..checkpoint import AtomicCheckpointer
from ..data import check_names_of_detector
from ..zoo import check_fits
from .held_out_losses import with_losses
from .trainer import Trainer


def evaluate(
    cfg: CfgNode, resume: bool = False, evaluators: Sequence[DatasetEvaluator] | None = None
) -> dict:
    """Evaluate ``cfg.MODEL.WEIGHTS``, or with ``resume`` the last checkpoint of OUTPUT_DIR.

    With ``TEST.AUG.ENABLED`` also with test-time augmentation, and with ``TEST.LOSS`` the losses.

    Args:
        evaluators: one for each test set, in place of those of ``Trainer.build_evaluator``.

    Raises:
        ValueError: without weights or a checkpoint, for weights that do not fill the model, and for
            weights of other classes than a data set, or of the same in another order.
    """
    if not resume:
        check_fits(cfg)
    model = Trainer.build_model(cfg)
    checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR)
    if resume and not checkpointer.has_checkpoint():
        raise ValueError(
            f"There is no checkpoint in OUTPUT_DIR {cfg.OUTPUT_DIR!r} to evaluate with --resume"
        )
    if not resume and not cfg.MODEL.WEIGHTS:
        raise ValueError(
            "Name the weights to evaluate: MODEL.WEIGHTS FILE, or --resume for the last "
            "checkpoint of OUTPUT_DIR"
        )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    checkpointer.check_complete()
    for name in cfg.DATASETS.TEST:
        DatasetCatalog.get(name)  # some data sets only know their classes once loaded
        check_names_of_detector(checkpointer.class_names, name)
    results = Trainer.test(cfg, model, evaluators)
    if cfg.TEST.LOSS:
        results = with_losses(results, cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    return results
