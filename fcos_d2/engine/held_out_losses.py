"""TEST.LOSS: the losses of a detector on the images that it is evaluated on."""

import copy
import logging
from collections import Counter
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.data.detection_utils import build_augmentation
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.modeling import Backbone
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import BN_MODULE_TYPES
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data import DatasetMapper
from ..data.workers import SteadyLoader
from ..modeling.losses import DIVISOR, FCOSLoss
from .amp import amp_dtype
from .evaluators import stoppable
from .stopping import stop_signals

_FIXED = (Backbone, FCOSLoss, *BN_MODULE_TYPES, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


def with_losses(results: dict, cfg: CfgNode, model: nn.Module) -> dict:
    """Results of an evaluation, and the losses of the model on the same images as "test".

    They are computed as in training, with its precision, but with the size of test images, without
    augmentation, with the running statistics of batch norms, and without dropout. The model stays
    as it is. All processes must call it.

    Args:
        results: of ``Trainer.test``, changed in place.

    Returns:
        the results; for several test sets "test" is in those of each.

    Raises:
        Stopped: after a stop signal, in a training.
    """
    compute, logger = _losses_of(model, cfg), logging.getLogger(__name__)
    for name in cfg.DATASETS.TEST:
        mapper = DatasetMapper(
            cfg, True, augmentations=build_augmentation(cfg, False), recompute_boxes=False
        )
        loader = SteadyLoader.of(build_detection_test_loader(cfg, name, mapper=mapper))
        if "instances" not in loader.dataset[0]:
            logger.warning(f"There is no TEST.LOSS on {name!r}, which has no annotations")
            continue
        # Models log what they see in a training; here nobody reads it. An iteration of 1 is one in
        # which FCOS logs less than in the first.
        with EventStorage(1), stop_signals.raising(is_alone=comm.get_world_size() == 1):
            losses = inference_on_dataset(compute, loader, stoppable(_AveragedLosses()))
        for of_set in losses.values():  # in the main process
            listed = ", ".join(f"{key} {value:.4g}" for key, value in of_set.items())
            logger.info(f"Losses on {name!r}: {listed}")
        place = results.setdefault(name, {}) if len(cfg.DATASETS.TEST) > 1 else results
        place.update(losses)
    return results


def _losses_of(model: nn.Module, cfg: CfgNode) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """A function from a batch to the losses of a copy of the model."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    # Of a copy, since models keep moving averages in buffers and attributes of their own.
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, _FIXED):
            module.eval()
    device = torch.device(cfg.MODEL.DEVICE)
    dtype = amp_dtype(cfg) if cfg.SOLVER.AMP.ENABLED else None

    def compute(batch: list[dict]) -> dict[str, torch.Tensor]:
        # R-CNN draws the proposals that it learns from.
        with torch.random.fork_rng([] if device.type == "cpu" else [torch.cuda.current_device()]):
            torch.manual_seed(0)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                return model(batch)

    return compute


class _AveragedLosses(DatasetEvaluator):
    """Each loss over all images of all processes: a sum, by its divisor or the number of images."""

    def reset(self) -> None:
        self._sums, self._divisors = Counter(), Counter()

    def process(self, inputs: list[dict], outputs: dict[str, torch.Tensor]) -> None:
        for name in outputs:
            if name.endswith(DIVISOR):
                continue
            value = float(outputs[name])
            divisor = outputs.get(f"{name}{DIVISOR}")
            if divisor is None:  # a mean
                self._sums[name] += value * len(inputs)
                self._divisors[name] += len(inputs)
            else:
                self._sums[name] += value
                self._divisors[name] += float(divisor)

    def evaluate(self) -> dict | None:
        everywhere = comm.gather((self._sums, self._divisors))
        if not comm.is_main_process():
            return None
        sums, divisors = Counter(), Counter()
        for of_process in everywhere:
            # Not their sum, which leaves out what is not positive.
            sums.update(of_process[0])
            divisors.update(of_process[1])
        # Without a positive in any image the losses of positives are 0.
        losses = {name: value / (divisors[name] or 1) for name, value in sums.items()}
        return {"test": {**losses, "total_loss": sum(losses.values())}}
