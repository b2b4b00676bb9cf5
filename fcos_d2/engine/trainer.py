"""Detectron2's DefaultTrainer, adapted to FCOS, and to runs that are stopped and resumed."""

import logging
import os
import sys
import weakref
from collections.abc import Collection
from contextlib import suppress
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import verify_results
from detectron2.utils import comm, events
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules

from ..analysis.augmented import try_to_save_augmented
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
from ..data.loading import check_proposal_files
from ..data.training_loader import seed_all
from ..data.workers import SteadyLoader
from ..modeling.backbone import check_random_start
from ..zoo import check_fits
from .amp import amp_dtype
from .averaging import AverageWeights, build_average, split_checkpoint
from .early_stopping import EarlyStopping, EndedEarly, check_patience
from .evaluators import (
    augmented_name,
    build_evaluator,
    deciding_metric,
    evaluate_with_augmentation,
)
from .held_out_losses import with_losses
from .hooks import (
    AverageBatchNormStatistics,
    BestCheckpointer,
    EpochLog,
    EvalHook,
    GatherMetrics,
    PeriodicCheckpointer,
    WaitingLog,
)
from .loggers import build_loggers, check_loggers
from .optimizer import build_optimizer
from .processes import distribute, tell_failure
from .resuming import check_resumable, checkpoint_to_resume, drop_metrics_from, settings_kept
from .schedule import scaled_to_processes, with_schedule
from .step_trainer import StepTrainer, check_accumulation
from .stopping import StopOnSignal, Stopped, stop_signals


class Trainer(DefaultTrainer):
    """DefaultTrainer that loses nothing, and that runs DDP and AMP on CPU too.

    A resumed run ends with the weights of a run that was never stopped. It also keeps the best
    checkpoint.
    """

    def __init__(self, cfg: CfgNode, given: Collection[str] = ()):
        """
        Args:
            cfg: of the run. Where SOLVER.EPOCHS is set, ``self.cfg`` has the schedule for them.
            given: keys that were set by hand, which SOLVER.EPOCHS leaves as they are.
        """
        # Follows DefaultTrainer.__init__ of Detectron2's commit 02b5c4e, with another checkpointer
        # and AMP on every device. Calling that one fails for DDP on CPU, to which it passes a GPU.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = scaled_to_processes(cfg, comm.get_world_size())
        if comm.is_main_process():
            check_loggers(cfg)
        check_test_sets(cfg)
        for name in cfg.DATASETS.TEST if comm.is_main_process() else ():
            try:  # warn now: at the end of training Detectron2 only logs that there is none
                self.build_evaluator(cfg, name)
            except NotImplementedError as error:
                if cfg.TEST.PATIENCE:
                    raise
                logging.getLogger(__name__).warning(f"There will be no evaluation. {error}")
        data_loader = self.build_train_loader(cfg)
        # The model reads SOLVER.ATSS_ITERS, which follow the number of images.
        cfg = with_schedule(cfg, data_loader, given)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        check_patience(cfg)
        model = distribute(model, cfg.MODEL.DEVICE)
        dtype = amp_dtype(cfg) if cfg.SOLVER.AMP.ENABLED else None
        accumulate = cfg.SOLVER.ACCUMULATE
        check_accumulation(accumulate, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size())
        self._trainer = StepTrainer(
            model, data_loader, optimizer, cfg.MODEL.DEVICE, dtype, accumulate
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.average = build_average(cfg, self.checkpointer.model)  # which is not under DDP
        if self.average is not None:
            self.checkpointer.weights = self.average.checkpoint
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.ended_early = False  # by TEST.PATIENCE; then max_iter is where
        self.cfg = cfg
        # The order of the images, their augmentation and the model's random numbers depend on it.
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._writers: list[events.EventWriter] = []  # PeriodicWriter has it, train() fills it
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint of OUTPUT_DIR if asked to and there is one, else MODEL.WEIGHTS.

        A resumed run takes rates, weight decay and momentum from its config, and everything else
        from the checkpoint.

        Raises:
            ValueError: before anything is loaded, for a checkpoint that this run cannot go on
                from; see :func:`check_resumable` and :func:`checkpoint_to_resume`. For random
                weights in parts of the backbone that do not learn.
        """
        averaged = None
        found = checkpoint_to_resume(self.checkpointer, self.cfg) if resume else None
        if found is None:
            check_fits(self.cfg)
            if not self.cfg.MODEL.WEIGHTS:
                check_random_start(self.checkpointer.model)
            self.checkpointer.classes_of_data = class_names(self.cfg)
            self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=False)
        else:
            file, checkpoint = found
            cfg, model = with_class_names(self.cfg), self.checkpointer.model
            check_resumable(checkpoint, cfg, model, self.optimizer)
            if self.cfg.SEED < 0 and checkpoint.get("seed") is not None:
                self.seed = checkpoint["seed"]
            averaged = split_checkpoint(checkpoint, goes_on=self.average is not None)
            del found, checkpoint
            with settings_kept(self.optimizer, self.scheduler):
                self.checkpointer.load(file)
            self.start_iter = self.iter + 1
        if self.average is not None:
            self.average.start(self.checkpointer.model, averaged)

    def train(self) -> dict | None:
        """Train; returns the results of the last evaluation.

        Raises:
            Stopped: after SIGTERM, SIGINT or SIGUSR1, once a checkpoint has been written.
        """
        logger = logging.getLogger(__name__)
        description = {
            "config": with_class_names(self.cfg).dump(),
            "seed": self.seed,
            "class_names": class_names(self.cfg),
            "category_ids": category_ids(self.cfg),
        }
        self.checkpointer.description = {k: x for k, x in description.items() if x is not None}
        if comm.is_main_process():
            folder = self.cfg.OUTPUT_DIR
            os.makedirs(folder, exist_ok=True)
            with replacing(os.path.join(folder, "config.yaml"), "w") as file:
                file.write(description["config"])
            metrics_file = os.path.join(folder, "metrics.json")
            drop_metrics_from(metrics_file, self.start_iter, end=self.max_iter)
            self._writers[:] = self.build_writers()
        if isinstance(self.data_loader, TrainingLoader):
            self.data_loader.start(self.seed, first_batch=self.start_iter)
            logger.info(f"The order of the images and their augmentation have seed {self.seed}")
            if self.start_iter == 0 and comm.is_main_process():
                file = os.path.join(self.cfg.OUTPUT_DIR, "augmented.jpg")
                try_to_save_augmented(self.data_loader, self.cfg, file)
        else:
            logger.warning("The data loader is not a TrainingLoader: its images start anew")
        self.last_step = self.start_iter - 1
        with stop_signals.recorded():
            try:
                with suppress(EndedEarly):
                    TrainerBase.train(self, self.start_iter, self.max_iter)
                results = getattr(self, "_last_eval_results", None)
                if results is not None and comm.is_main_process():
                    verify_results(self.cfg, results)
                return results
            except Stopped:
                last = self.last_step
                logger.info(f"Stopped by a signal after iteration {last}. --resume goes on")
                comm.synchronize()  # a process that ends may take the others with it
                raise
            finally:
                # Ends the workers now. The garbage collector would wait for them one by one.
                loader = self.data_loader
                self._trainer.reset_data_loader(lambda: loader)

    def after_train(self) -> None:
        error = sys.exc_info()[1]
        # Before the writers are closed: one of a service may wait for it.
        if isinstance(error, Stopped):
            self._save_where_stopped()
        elif error is not None and not isinstance(error, EndedEarly):
            tell_failure()
        try:
            super().after_train()
        except BaseException:  # the last evaluation comes before the hook that closes the writers
            for writer in self._writers:
                with suppress(Exception):
                    writer.close()
            raise

    def gather_metrics(self) -> None:
        """Write the metrics of the steps since the last call; see :class:`StepTrainer`."""
        self._trainer.gather_metrics()

    def _save_where_stopped(self) -> None:
        """Write a checkpoint after the last step, unless there is one."""
        name = f"model_{self.last_step:07d}"
        file = os.path.join(self.cfg.OUTPUT_DIR, f"{name}.pth")
        # Before its first step a run has nothing that it has not loaded.
        if self.start_iter <= self.last_step < self.max_iter - 1 and not is_intact(file):
            self.checkpointer.save(name, iteration=self.last_step)

    def run_step(self) -> None:
        # For what the model draws at random, such as the samples that R-CNN learns from.
        seed_all(self.seed, self.iter, comm.get_rank())
        super().run_step()
        self.last_step = self.iter

    def build_hooks(self) -> list[HookBase]:
        """All hooks, in the order in which they run."""
        cfg, period, is_main = self.cfg, self.cfg.TEST.EVAL_PERIOD, comm.is_main_process()
        images = getattr(self.data_loader, "images_per_epoch", 0)  # a loader of others has no epoch
        has_test_sets, metric = len(cfg.DATASETS.TEST) > 0, deciding_metric(cfg)
        in_order = [
            WaitingLog(),
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            images and EpochLog(images / cfg.SOLVER.IMS_PER_BATCH),
            self._precise_bn(),
            AverageBatchNormStatistics(),
            self.average and AverageWeights(self.average, self.checkpointer.model),
            GatherMetrics(20, cfg.SOLVER.CHECKPOINT_PERIOD, period),
            is_main and PeriodicCheckpointer(self.checkpointer, cfg.SOLVER),
            EvalHook(period, self._evaluate, metric),
            is_main and has_test_sets and BestCheckpointer(period, self.checkpointer, metric),
            # With test-time augmentation at the end only: period 0.
            cfg.TEST.AUG.ENABLED
            and EvalHook(
                0,
                partial(self.test_with_TTA, cfg, self.evaluated_model),
                augmented_name(metric),
            ),
            period > 0
            and has_test_sets
            and EarlyStopping(period, cfg.TEST.PATIENCE, self.checkpointer, metric),
            hooks.PeriodicWriter(self._writers, period=20),
            StopOnSignal(),
        ]
        return [hook for hook in in_order if hook]

    def _precise_bn(self) -> HookBase | None:
        """Detectron2's TEST.PRECISE_BN, with its own training batches."""
        cfg = self.cfg.clone()
        if not cfg.TEST.PRECISE_BN.ENABLED or not get_bn_modules(self.model):
            return None
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        loader, number = self.build_train_loader(cfg), cfg.TEST.PRECISE_BN.NUM_ITER
        return hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, number)

    @property
    def evaluated_model(self) -> torch.nn.Module:
        """What is evaluated and kept: with ``SOLVER.EMA`` the average of the weights."""
        return self.model if self.average is None else self.average.module

    def _evaluate(self) -> dict:
        results = self.test(self.cfg, self.evaluated_model)
        if self.cfg.TEST.LOSS:
            results = with_losses(results, self.cfg, self.evaluated_model)
        self._last_eval_results = results
        return results

    def build_writers(self) -> list[events.EventWriter]:
        """Where the metrics go. Called by :meth:`train`, which knows where the run starts."""
        folder = self.cfg.OUTPUT_DIR
        return [
            events.CommonMetricPrinter(self.max_iter),
            events.JSONWriter(os.path.join(folder, "metrics.json")),
            # Hides what an earlier process wrote after its last checkpoint.
            events.TensorboardXWriter(folder, purge_step=self.start_iter),
            *build_loggers(self.cfg, resume=self.start_iter > 0),
        ]

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators=None) -> dict:
        """Like DefaultTrainer's; during a training a stop signal ends it."""
        with stop_signals.raising(is_alone=comm.get_world_size() == 1):
            return super().test(cfg, model, evaluators)

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
        loader = SteadyLoader.of(build_detection_test_loader(cfg, dataset_name, mapper=mapper))
        check_num_classes(cfg, dataset_name)
        return loader

    build_optimizer = staticmethod(build_optimizer)
    build_evaluator = staticmethod(build_evaluator)
    test_with_TTA = classmethod(evaluate_with_augmentation)
