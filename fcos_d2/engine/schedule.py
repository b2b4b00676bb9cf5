"""A schedule that fits the data, the batch and the length of the training.

What is derived is said with what it was derived from. Keys that the command line sets stay as they
are.
"""

import logging
import math
import os
from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from tabulate import tabulate

from ..data import TrainingLoader

# A value of SOLVER.EPOCHS: as many as suit the number of images, from _EPOCHS up. A short training
# takes at least _LEAST_ITERATIONS, a long one at most the config's own MAX_ITER. And a value of
# SOLVER.EMA.DECAY: an average of the weights where it is known to gain, see benchmarks/NOTES.md.
AUTOMATIC = -1
_AVERAGED_FROM = 2000  # iterations
_EPOCHS, _LEAST_ITERATIONS = 50, 2000
_LEAST_PERIOD = 250  # iterations between two evaluations, and two checkpoints
_MOST_ITERATIONS = 10**8

Row = tuple[str, object, str]  # a key of the config, its value, and what that was derived from


def follow_batch(cfg: CfgNode, own_solver: CfgNode, given: Collection[str]) -> str:
    """Scale SOLVER.BASE_LR, which is that of the config's own batch, with another batch.

    Returns:
        what has changed, as a sentence; "" for nothing.
    """
    own, batch = own_solver.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if batch == own or "SOLVER.BASE_LR" in given:
        return ""
    cfg.SOLVER.BASE_LR = own_solver.BASE_LR * batch / own
    rates = f"{own_solver.BASE_LR:g} -> {cfg.SOLVER.BASE_LR:g}"
    return f"SOLVER.IMS_PER_BATCH {own} -> {batch} scales SOLVER.BASE_LR {rates}"


def follow_cores(cfg: CfgNode, given: Collection[str]) -> str:
    """Take at most as many DATALOADER.NUM_WORKERS as each process has cores of this machine.

    Returns:
        what has changed, as a sentence; "" for nothing.
    """
    # Those that this process may use; only Linux knows them.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = comm.get_local_size()
    workers, share = cfg.DATALOADER.NUM_WORKERS, max(1, cores // processes)
    if workers <= share or "DATALOADER.NUM_WORKERS" in given:
        return ""
    cfg.DATALOADER.NUM_WORKERS = share
    return (
        f"DATALOADER.NUM_WORKERS {workers} -> {share} in each process: {cores} cores for "
        f"{processes} process(es)"
    )


def scaled_to_processes(cfg: CfgNode, processes: int) -> CfgNode:
    """Detectron2's scaling by SOLVER.REFERENCE_WORLD_SIZE, which does not know ATSS_ITERS."""
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    if scaled is not cfg:
        own, end = cfg.SOLVER, scaled.SOLVER.MAX_ITER
        scaled.defrost()
        scaled.SOLVER.ATSS_ITERS = own.ATSS_ITERS * end // own.MAX_ITER
        if cfg.is_frozen():
            scaled.freeze()
    return scaled


def with_schedule(cfg: CfgNode, data_loader: Iterable, given: Collection[str]) -> CfgNode:
    """The config with what SOLVER.EPOCHS and EMA.DECAY leave open; a table in the log says it.

    Raises:
        ValueError: without a TrainingLoader, and see :func:`follow_epochs` and :func:`check_steps`.
    """
    if cfg.SOLVER.EPOCHS == 0 and cfg.SOLVER.EMA.DECAY != AUTOMATIC:
        return cfg
    cfg, rows = cfg.clone(), []
    cfg.defrost()
    if cfg.SOLVER.EPOCHS != 0:
        if not isinstance(data_loader, TrainingLoader):
            raise ValueError("SOLVER.EPOCHS needs a TrainingLoader: set SOLVER.MAX_ITER instead")
        rows += follow_epochs(cfg, data_loader.images_per_epoch, given)
        check_steps(cfg.SOLVER)
    if cfg.SOLVER.EMA.DECAY == AUTOMATIC:
        rows.append(_average_by_length(cfg.SOLVER))
    cfg.freeze()
    logging.getLogger(__name__).info(f"The schedule follows the data:\n{table(rows)}")
    return cfg


def follow_epochs(cfg: CfgNode, images: float, given: Collection[str]) -> list[Row]:
    """Set the schedule that SOLVER.EPOCHS asks for. The config's own one gives the proportions.

    Args:
        cfg: changed in place.
        images: in an epoch, of those that are trained on.
        given: the keys that the command line sets.

    Raises:
        ValueError: for a number that cannot be, and together with SOLVER.MAX_ITER.
    """
    solver, epochs = cfg.SOLVER, cfg.SOLVER.EPOCHS
    check_epochs(epochs, given)
    own_end, own_steps, own_warmup = solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS
    own_atss = solver.ATSS_ITERS
    per_epoch = images / solver.IMS_PER_BATCH
    of_images = f"{images:g} images, {solver.IMS_PER_BATCH} a batch"
    if epochs == AUTOMATIC:
        end = min(max(round(_EPOCHS * per_epoch), _LEAST_ITERATIONS), own_end)
        reason = (
            f"{end / per_epoch:.3g} epochs of {of_images}: {_EPOCHS}, but at least "
            f"{_LEAST_ITERATIONS} iterations, and at most {own_end}; --epochs N for another number"
        )
    else:
        end = max(1, round(epochs * per_epoch))
        reason = f"{epochs} epochs of {of_images}"
    if end > _MOST_ITERATIONS:
        raise ValueError(f"SOLVER.EPOCHS {epochs} makes {end} iterations: choose a smaller number")
    steps = tuple(sorted({step * end // own_end for step in own_steps} - {0}))
    shares = ", ".join(f"{step / own_end:.3f}" for step in own_steps)
    # Whole epochs.
    period = max(1, round(per_epoch * math.ceil(_LEAST_PERIOD / per_epoch)))
    of_period = f"{period / per_epoch:.3g} epoch(s)"
    wanted = {
        "SOLVER.MAX_ITER": (end, reason),
        "SOLVER.STEPS": (steps, f"after {shares} of the run, as the config's own"),
        "SOLVER.WARMUP_ITERS": (
            min(own_warmup, end // 10),
            f"the config's {own_warmup}, at most a tenth of the run",
        ),
        "SOLVER.CHECKPOINT_PERIOD": (period, of_period),
        "TEST.EVAL_PERIOD": (period, of_period),
    }
    if own_atss:
        reason = f"{own_atss / own_end:.3f} of the run, as the config's own"
        wanted["SOLVER.ATSS_ITERS"] = own_atss * end // own_end, reason
    rate = "SOLVER.BASE_LR", solver.BASE_LR, f"for {solver.IMS_PER_BATCH} images a batch"
    return [rate, *(_derived(cfg, given, key, *value) for key, value in wanted.items())]


def _average_by_length(solver: CfgNode) -> Row:
    """Set SOLVER.EMA.DECAY by SOLVER.MAX_ITER."""
    end = solver.MAX_ITER
    if end >= _AVERAGED_FROM:
        solver.EMA.DECAY = round(1 - 10 / end, 6)
        reason = "the weights are averaged over about a tenth of the run"
    else:
        solver.EMA.DECAY = 0.0
        reason = f"no average of the weights in less than {_AVERAGED_FROM} iterations"
    return "SOLVER.EMA.DECAY", solver.EMA.DECAY, reason


def check_epochs(epochs: int, given: Collection[str]) -> None:
    """Raise a ValueError for a value of SOLVER.EPOCHS that cannot be."""
    if epochs < 1 and epochs != AUTOMATIC:
        raise ValueError(
            f"SOLVER.EPOCHS must be at least 1, 0 for SOLVER.MAX_ITER, or -1 for as many as suit "
            f"the data, got {epochs}"
        )
    if "SOLVER.MAX_ITER" in given:
        raise ValueError(
            f"SOLVER.EPOCHS is {epochs}, and the command line sets SOLVER.MAX_ITER, too: give one "
            "of them"
        )


def table(rows: Sequence[Row]) -> str:
    """The rows as text for the log."""
    return tabulate(rows, ("key", "value", "from"), disable_numparse=True)


def _derived(cfg: CfgNode, given: Collection[str], key: str, value: object, reason: str) -> Row:
    if key in given:
        return key, attrgetter(key)(cfg), "given"
    cfg.merge_from_list([key, value])
    return key, value, reason


def follow_max_iter(cfg: CfgNode, own_solver: CfgNode, given: Collection[str]) -> str:
    """Scale SOLVER.STEPS, WARMUP_ITERS and ATSS_ITERS with a MAX_ITER of the command line.

    Args:
        cfg: changed in place.
        own_solver: the section SOLVER of the config file alone.
        given: the keys that the command line sets. They stay as they are.

    Returns:
        what has changed, as a sentence; "" for nothing.
    """
    solver = cfg.SOLVER
    scale = solver.MAX_ITER / own_solver.MAX_ITER
    if "SOLVER.MAX_ITER" not in given or scale == 1:
        return ""
    # A short training may merge steps, or have them at 0.
    steps = {step * solver.MAX_ITER // own_solver.MAX_ITER for step in own_solver.STEPS} - {0}
    followers = {
        "STEPS": tuple(sorted(steps)),
        "WARMUP_ITERS": round(own_solver.WARMUP_ITERS * scale),
    }
    if own_solver.ATSS_ITERS:
        followers["ATSS_ITERS"] = own_solver.ATSS_ITERS * solver.MAX_ITER // own_solver.MAX_ITER
    followers = {key: new for key, new in followers.items() if f"SOLVER.{key}" not in given}
    solver.update(followers)
    changes = ", ".join(f"{key} {own_solver[key]} -> {new}" for key, new in followers.items())
    return changes and (
        f"SOLVER.MAX_ITER {own_solver.MAX_ITER} -> {solver.MAX_ITER} scales SOLVER.{changes}"
    )


def check_steps(solver: CfgNode) -> None:
    """Raise a ValueError for SOLVER.STEPS that do not go up, or that lie beyond the end.

    SOLVER.ATSS_ITERS must end before the end, too.
    """
    if not 0 <= solver.ATSS_ITERS < solver.MAX_ITER:
        raise ValueError(
            f"SOLVER.ATSS_ITERS {solver.ATSS_ITERS} must be from 0 to below SOLVER.MAX_ITER "
            f"{solver.MAX_ITER}: after them ASSIGNMENT 'task_aligned' begins. Choose another number"
        )
    if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR":  # the others have no steps
        return
    steps, end = list(solver.STEPS), solver.MAX_ITER
    if steps != sorted(set(steps)) or any(not 0 < step < end for step in steps):
        raise ValueError(
            f"SOLVER.STEPS {tuple(steps)} must go up, and lie before the end of the training, "
            f"SOLVER.MAX_ITER {end}: at each of them the learning rate falls. For example, write "
            f'SOLVER.STEPS "({end * 2 // 3}, {end * 8 // 9})", or "()" for a rate that never falls'
        )
