"""Detectron2's DefaultTrainer, adapted to FCOS, and to runs that are stopped and resumed."""

import logging
import os
import weakref
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    create_ddp_model,
    hooks,
)
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules

from ..checkpoint import AtomicCheckpointer, is_intact, replacing
from ..data import (
    DatasetMapper,
    TrainingLoader,
    category_ids,
    check_num_classes,
    check_same_classes,
    check_test_sets,
    class_names,
    with_class_names,
)
from ..data.training_loader import (
    check_proposal_files,
    leave_signals_to_the_trainer,
    seed_all,
)
from ..modeling import FCOSWithTTA
from ..modeling.backbone import check_random_start
from .amp import AutocastTrainer, amp_dtype
from .evaluators import build_evaluator, inference_folder
from .hooks import AverageBatchNormStatistics, BestCheckpointer, EvaluateOnResume, WaitingLog
from .resuming import (
    MetricsWriter,
    TensorboardWriter,
    check_resumable,
    checkpoint_to_resume,
    metrics_rows,
)
from .stopping import StopOnSignal, Stopped, stop_signals_recorded, stoppable_evaluation

# The meta architectures that test-time augmentation (TEST.AUG) is offered for.
AUGMENTED = {"FCOS": FCOSWithTTA, "GeneralizedRCNN": GeneralizedRCNNWithTTA}


class Trainer(DefaultTrainer):
    """DefaultTrainer that loses nothing, and that runs DDP and AMP on CPU too.

    A run that is resumed ends with the weights of one that was never stopped. The best checkpoint
    is kept besides the last ones.
    """

    def __init__(self, cfg: CfgNode):
        # Follows DefaultTrainer.__init__ of Detectron2's commit 02b5c4e, with another checkpointer,
        # AMP on every device, and DDP on CPU. The last cannot be had through a hook: DefaultTrainer
        # names a device to DDP, which raises an error for a model on CPU.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        check_test_sets(cfg)
        if comm.is_main_process():
            for name in cfg.DATASETS.TEST:
                self._try_evaluator(cfg, name)
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
        # What the order of the images, their augmentation and the model's random numbers depend on.
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.register_hooks(self.build_hooks())

    def _try_evaluator(self, cfg: CfgNode, dataset_name: str) -> None:
        """Say now what the evaluation would say after the training."""
        try:
            self.build_evaluator(cfg, dataset_name)
        except NotImplementedError as error:  # which Detectron2 passes over
            logging.getLogger(__name__).warning(f"There will be no evaluation. {error}")

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint of OUTPUT_DIR if asked to and there is one, else MODEL.WEIGHTS.

        A resumed run takes rates, weight decay and momentum from its config, and everything else
        from the checkpoint.

        Raises:
            ValueError: for a checkpoint that this run cannot go on from, before anything is
                loaded; see :func:`check_resumable` and :func:`checkpoint_to_resume`. For a start
                at random of a backbone that does not learn.
        """
        found = checkpoint_to_resume(self.checkpointer, self.cfg) if resume else None
        if found is None:
            if not self.cfg.MODEL.WEIGHTS:
                check_random_start(self.checkpointer.model)
            self.checkpointer.classes_of_data = class_names(self.cfg)
            self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=False)
            return
        file, checkpoint = found
        check_resumable(
            checkpoint, with_class_names(self.cfg), self.checkpointer.model, self.optimizer
        )
        if self.cfg.SEED < 0 and checkpoint.get("seed") is not None:
            self.seed = checkpoint["seed"]
        del found, checkpoint  # it is read again
        if isinstance(self.scheduler, LRMultiplier):
            self._load_but_for_rates(file)
        else:  # other schedulers keep what they have computed
            self.checkpointer.load(file)
        self.start_iter = self.iter + 1

    def _load_but_for_rates(self, file: str) -> None:
        """Load a checkpoint; rates, momentum and weight decay are those of the config."""
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self._groups()]
        rates = list(self.scheduler.base_lrs)
        self.checkpointer.load(file)
        self.scheduler.base_lrs = rates
        for group, new, rate in zip(self._groups(), settings, self.scheduler.get_lr(), strict=True):
            group.update(new, lr=rate)

    def _groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def train(self) -> dict | None:
        """Train; returns the results of the last evaluation.

        Raises:
            Stopped: after SIGTERM, SIGINT or SIGUSR1, once a checkpoint has been written.
        """
        logger = logging.getLogger(__name__)
        # The same in a run that is resumed.
        described = with_class_names(self.cfg).dump()
        self.checkpointer.description = {"config": described, "seed": self.seed}
        classes = {"class_names": class_names(self.cfg), "category_ids": category_ids(self.cfg)}
        self.checkpointer.description |= {k: x for k, x in classes.items() if x is not None}
        if comm.is_main_process():
            PathManager.mkdirs(self.cfg.OUTPUT_DIR)
            with replacing(os.path.join(self.cfg.OUTPUT_DIR, "config.yaml"), "w") as file:
                file.write(described)
        if isinstance(self.data_loader, TrainingLoader):
            self.data_loader.start(self.seed, first_batch=self.start_iter)
            logger.info(f"The order of the images and their augmentation have seed {self.seed}")
        else:
            logger.warning("The data loader is not a TrainingLoader: its images start anew")
        for writer in self.writers:
            if hasattr(writer, "resume_at"):  # others may have been built
                writer.resume_at(self.start_iter, end=self.max_iter)
        with stop_signals_recorded():
            try:
                super().train()
                return getattr(self, "_last_eval_results", None)
            except Stopped:
                self.save_where_stopped()
                logger.info(f"Stopped by a signal after iteration {self.iter}. --resume goes on")
                raise
            finally:
                # Ends the workers now. If they were left to the garbage collector, it would wait
                # for them one by one.
                loader = self.data_loader
                self._trainer.reset_data_loader(lambda: loader)

    def save_where_stopped(self) -> None:
        """Write a checkpoint between two iterations, unless there is one."""
        name = f"model_{self.iter:07d}"
        file = os.path.join(self.cfg.OUTPUT_DIR, f"{name}.pth")
        if self.iter + 1 < self.max_iter and not is_intact(file):
            self.checkpointer.save(name, iteration=self.iter)

    def run_step(self) -> None:
        # What the model draws at random, such as the samples that R-CNN learns from.
        seed_all(self.seed, self.iter, comm.get_rank())
        super().run_step()

    def build_hooks(self) -> list[HookBase]:
        """All hooks, in the order in which they run after a step."""
        cfg, period = self.cfg, self.cfg.TEST.EVAL_PERIOD
        is_main = comm.is_main_process()
        self.writers = self.build_writers() if is_main else []
        saving = best = augmented = None
        if is_main:
            saving = hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
        if is_main and len(cfg.DATASETS.TEST):
            best = BestCheckpointer(period, self.checkpointer, self._metric())
        if cfg.TEST.AUG.ENABLED:  # at the end of training only
            augmented = hooks.EvalHook(0, partial(self.test_with_TTA, cfg, self.model))
        in_order = [
            WaitingLog(),
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._precise_bn(),
            AverageBatchNormStatistics(),
            saving,
            hooks.EvalHook(period, self._evaluate),
            best,
            augmented,
            hooks.PeriodicWriter(self.writers, period=20),
            EvaluateOnResume(period, self._was_evaluated, self._evaluate, best),
            StopOnSignal(),
        ]
        return [hook for hook in in_order if hook is not None]

    def _precise_bn(self) -> HookBase | None:
        """Detectron2's TEST.PRECISE_BN, with training batches of its own."""
        cfg = self.cfg.clone()
        if not cfg.TEST.PRECISE_BN.ENABLED or not get_bn_modules(self.model):
            return None
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        loader, number = self.build_train_loader(cfg), cfg.TEST.PRECISE_BN.NUM_ITER
        return hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, number)

    def _evaluate(self) -> dict:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def _metric(self) -> str:
        """Name of the value that the best checkpoint is chosen by."""
        # With several data sets their names stand before the metric; the first one decides.
        prefix = f"{self.cfg.DATASETS.TEST[0]}/" if len(self.cfg.DATASETS.TEST) > 1 else ""
        proposals_alone = self.cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
        return prefix + ("box_proposals/AR@1000" if proposals_alone else "bbox/AP")

    def _was_evaluated(self, iteration: int) -> bool:
        if not comm.is_main_process() or not len(self.cfg.DATASETS.TEST):
            return True
        rows = metrics_rows(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"))
        # One more for the last one of a shorter run, as Detectron2 counts it.
        done = (iteration, iteration + 1)
        return any(row["iteration"] in done and self._metric() in row for row in rows)

    def build_writers(self) -> list:
        folder = self.cfg.OUTPUT_DIR
        PathManager.mkdirs(folder)
        metrics = MetricsWriter(os.path.join(folder, "metrics.json"))
        return [CommonMetricPrinter(self.max_iter), metrics, TensorboardWriter(folder)]

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators=None) -> dict:
        """As DefaultTrainer; a stop signal to a training ends it at once."""
        with stoppable_evaluation():
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: torch.nn.Module) -> dict:
        """Evaluate with test-time augmentation; the results have "_TTA" behind their names."""
        logging.getLogger(__name__).info("Evaluating with test-time augmentation ...")
        wrapper = AUGMENTED[cfg.MODEL.META_ARCHITECTURE]
        evaluators = [
            cls.build_evaluator(cfg, name, inference_folder(cfg, name, "inference_TTA"))
            for name in cfg.DATASETS.TEST
        ]
        # The augmentation scales the original pixels, not those at the size of the plain test.
        original = cfg.clone()
        original.defrost()
        original.INPUT.MIN_SIZE_TEST = 0
        results = cls.test(original, wrapper(cfg, model), evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainingLoader:
        loader = TrainingLoader(cfg, DatasetMapper(cfg, is_train=True))
        check_same_classes(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
        for name in cfg.DATASETS.TRAIN:
            check_num_classes(cfg, name)
        return loader

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        mapper = DatasetMapper(cfg, is_train=False)
        if cfg.MODEL.LOAD_PROPOSALS:
            check_proposal_files(cfg.DATASETS.PROPOSAL_FILES_TEST)
        loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        loader.worker_init_fn = leave_signals_to_the_trainer
        check_num_classes(cfg, dataset_name)
        return loader

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """See :func:`fcos_d2.engine.evaluators.build_evaluator`."""
        return build_evaluator(cfg, dataset_name, output_folder)


def distribute(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """The model, on ``device``, under DDP where there are several processes."""
    on_cpu = torch.device(device).type == "cpu"
    # Without device_ids Detectron2 would pass the local rank, which DDP refuses for CPU modules,
    # and which is not the device's number where a process sees its own GPU alone.
    device_ids = None if on_cpu else [torch.cuda.current_device()]
    return create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
