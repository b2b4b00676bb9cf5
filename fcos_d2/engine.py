"""Training and evaluation: Detectron2's DefaultTrainer, adapted to FCOS."""

import logging
import math
import os
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import (
    DefaultTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    hooks,
)
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from .amp import AutocastTrainer, amp_dtype
from .checkpoint import AtomicCheckpointer
from .config import load_cfg
from .data import (
    DatasetMapper,
    check_num_classes,
    check_same_classes,
    register_custom_datasets,
)
from .modeling import FCOSWithTTA

_AUGMENTED = {"FCOS": FCOSWithTTA, "GeneralizedRCNN": GeneralizedRCNNWithTTA}


def setup(args) -> CfgNode:
    """Build the config of a run, register its data sets, and set up logging.

    Args:
        args: from :func:`detectron2.engine.default_argument_parser`.

    Raises:
        ValueError: for no config file, or for test-time augmentation of a model that it is not
            offered for.
    """
    if not args.config_file:
        raise ValueError("Name a config: --config-file configs/COCO-Detection/...yaml")
    cfg = load_cfg(args.config_file, args.opts)
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.META_ARCHITECTURE not in _AUGMENTED:
        raise ValueError(
            f"TEST.AUG is offered for MODEL.META_ARCHITECTURE {list(_AUGMENTED)}, not "
            f"{cfg.MODEL.META_ARCHITECTURE!r}: set TEST.AUG.ENABLED False"
        )
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="fcos_d2")
    register_custom_datasets(cfg)
    return cfg


class Trainer(DefaultTrainer):
    """DefaultTrainer with atomic checkpoints, the best one kept, and DDP on CPU too."""

    def __init__(self, cfg: CfgNode):
        # Follows DefaultTrainer.__init__ of Detectron2's commit 02b5c4e, with another checkpointer,
        # AMP on every device, and DDP on CPU. The last cannot be had through a hook: DefaultTrainer
        # names a device to DDP, which raises an error for a model on CPU.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = distribute(model, cfg.MODEL.DEVICE)
        if cfg.SOLVER.AMP.ENABLED:
            self._trainer = AutocastTrainer(
                model, data_loader, optimizer, cfg.MODEL.DEVICE, amp_dtype(cfg)
            )
        else:
            self._trainer = SimpleTrainer(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list:
        all_hooks = super().build_hooks()
        if comm.is_main_process() and len(self.cfg.DATASETS.TEST):
            # With several data sets their names stand before the metric; the first one decides.
            prefix = f"{self.cfg.DATASETS.TEST[0]}/" if len(self.cfg.DATASETS.TEST) > 1 else ""
            proposals_alone = self.cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
            metric = "box_proposals/AR@1000" if proposals_alone else "bbox/AP"
            best = BestCheckpointer(
                self.cfg.TEST.EVAL_PERIOD, self.checkpointer, f"{prefix}{metric}"
            )
            evaluation = [isinstance(h, hooks.EvalHook) for h in all_hooks].index(True)
            all_hooks.insert(evaluation + 1, best)
        if self.cfg.TEST.AUG.ENABLED:
            # At the end of training only, before the writers.
            evaluate_augmented = hooks.EvalHook(0, lambda: self.test_with_TTA(self.cfg, self.model))
            writers = [i for i, h in enumerate(all_hooks) if isinstance(h, hooks.PeriodicWriter)]
            all_hooks.insert(writers[0] if writers else len(all_hooks), evaluate_augmented)
        return all_hooks

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: torch.nn.Module) -> dict:
        """Evaluate with test-time augmentation; the results have "_TTA" behind their names."""
        logging.getLogger(__name__).info("Evaluating with test-time augmentation ...")
        wrapper = _AUGMENTED[cfg.MODEL.META_ARCHITECTURE]
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        # The augmentation scales the original pixels, not those at the size of the plain test.
        original = cfg.clone()
        original.defrost()
        original.INPUT.MIN_SIZE_TEST = 0
        results = cls.test(original, wrapper(cfg, model), evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        loader = build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))
        check_same_classes(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
        for name in cfg.DATASETS.TRAIN:
            check_num_classes(cfg, name)
        return loader

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        mapper = DatasetMapper(cfg, is_train=False)
        loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        check_num_classes(cfg, dataset_name)
        return loader

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """The evaluator that the data set's ``evaluator_type`` asks for.

        Raises:
            NotImplementedError: for another type than "coco" and "pascal_voc".
        """
        evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
        if evaluator_type == "coco":
            folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
            # Tasks are those that the predictions have: masks and keypoints of R-CNN too. A
            # converted data set is not cached: the annotations may change between two runs.
            return COCOEvaluator(
                dataset_name,
                output_dir=folder,
                kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
                allow_cached_coco=False,
            )
        if evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        raise NotImplementedError(
            f"The data set {dataset_name!r} has evaluator_type {evaluator_type!r}; 'coco' and "
            "'pascal_voc' are supported. Set it in the data set's metadata, or override "
            "Trainer.build_evaluator"
        )


def distribute(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """The model, on ``device``, under DDP where there are several processes."""
    on_cpu = torch.device(device).type == "cpu"
    # Without device_ids Detectron2 would pass the rank, which DDP refuses for CPU modules.
    ddp_args = {"device_ids": None} if on_cpu else {}
    return create_ddp_model(model, broadcast_buffers=False, **ddp_args)


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, with a record that is kept in ``model_best.pth`` itself.

    So a resumed run does not overwrite a better model, and ``last_checkpoint`` goes on naming the
    last one.
    """

    def before_train(self) -> None:
        file = os.path.join(self._checkpointer.save_dir, self._file_prefix + ".pth")
        if self.trainer.start_iter == 0 or not os.path.isfile(file):
            return
        try:
            saved = torch.load(file, map_location="cpu", mmap=True)
            self.best_metric, self.best_iter = saved["best_metric"], saved["best_iter"]
        except Exception as error:  # a damaged file raises many kinds of errors
            kept = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}_unknown.pth")
            os.replace(file, kept)
            self._logger.warning(
                f"{file} has no record of its metric, or is damaged ({error!r}). It is kept as "
                f"{kept}, and the best model is looked for anew"
            )

    def _best_checking(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (math.nan, 0))
        if math.isnan(value) or (self.best_metric is not None and value <= self.best_metric):
            self._logger.info(f"{self._val_metric} is {value:.3f}: {self._best()}")
            return
        # After the last iteration Detectron2 counts one too many.
        self.best_metric, self.best_iter = value, min(iteration, self.trainer.max_iter - 1)
        self._checkpointer.save(
            self._file_prefix,
            tag=False,
            iteration=self.best_iter,
            best_metric=self.best_metric,
            best_iter=self.best_iter,
        )
        self._logger.info(f"Saved {self._file_prefix}.pth: {self._best()}")

    def _best(self) -> str:
        if self.best_metric is None:
            return "no best model yet"
        return f"best is {self.best_metric:.3f} of iteration {self.best_iter}"


def evaluate(cfg: CfgNode, resume: bool = False) -> dict:
    """Evaluate ``cfg.MODEL.WEIGHTS``, or with ``resume`` the last checkpoint of OUTPUT_DIR.

    With ``TEST.AUG.ENABLED`` also with test-time augmentation.

    Raises:
        ValueError: without weights or a checkpoint, and for those that do not fill the model.
    """
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
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    return results
