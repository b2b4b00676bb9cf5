"""What makes a resumed run equal to one that was never stopped."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.utils import comm

from ..checkpoint import AtomicCheckpointer, replacing
from ..config import get_cfg

# Keys and sections that do not influence the weights that a training ends with.
_WITHOUT_INFLUENCE = (
    "OUTPUT_DIR",
    "VIS_PERIOD",
    "VERSION",
    "MODEL.WEIGHTS",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.TEST",
    "DATASETS.PROPOSAL_FILES_TEST",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINTS_KEPT",
    "SOLVER.LOGGERS",
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "TEST",
)


def refuse_earlier_run(folder: str, overwrite: bool, weights: str) -> None:
    """Refuse a new run in a folder that has the checkpoints of an earlier one.

    Args:
        overwrite: allow it, as :func:`delete_earlier_run` will delete them.
        weights: the file that the new run starts from.

    Raises:
        ValueError: if there are some, unless ``overwrite``; and then if ``weights`` is one of them.
    """
    checkpointer = AtomicCheckpointer(torch.nn.Identity(), folder)
    if not checkpointer.has_checkpoint():
        return
    if not overwrite:
        raise ValueError(
            f"OUTPUT_DIR {folder!r} has checkpoints of an earlier run. Add --resume to go on with "
            "it, choose another OUTPUT_DIR, or add --overwrite to delete them and start anew"
        )
    if os.path.realpath(weights) in map(os.path.realpath, _files_of_run(checkpointer)):
        raise ValueError(
            f"--overwrite would delete MODEL.WEIGHTS {weights!r}, which the run starts from. "
            "Choose another OUTPUT_DIR"
        )


def delete_earlier_run(folder: str) -> None:
    """Delete the checkpoints of an earlier run, and what it is at SOLVER.LOGGERS.

    Call it when the new run is ready to start."""
    if comm.is_main_process():
        for file in _files_of_run(AtomicCheckpointer(torch.nn.Identity(), folder)):
            Path(file).unlink(missing_ok=True)


def _files_of_run(checkpointer: AtomicCheckpointer) -> list[str]:
    others = ("last_checkpoint", "model_best.pth", "wandb_run.json", "mlflow_run.json")
    files = [os.path.join(checkpointer.save_dir, name) for name in others]
    return files + checkpointer.checkpoints_of_run()


def checkpoint_to_resume(
    checkpointer: AtomicCheckpointer, cfg: CfgNode
) -> tuple[str, dict[str, Any]] | None:
    """File and content of the checkpoint that all processes resume from, None if there is none.

    The first process chooses it.

    Raises:
        ValueError: if the processes see different checkpoints, or have different configs.
    """
    file, content, seen = None, None, "no such file"
    if comm.is_main_process() and checkpointer.has_checkpoint():
        file = checkpointer.get_checkpoint_file()
    file = comm.all_gather(file)[0]
    if file is not None and os.path.isfile(file):
        content = checkpointer.read(file)
        seen = f"iteration {content.get('iteration')}"
    config = _flat(yaml.safe_load(cfg.dump()))
    everywhere = comm.all_gather((seen, config))
    if len({seen for seen, _ in everywhere}) > 1:
        raise ValueError(
            f"The processes see different checkpoints under the name {file!r}: "
            + ", ".join(f"process {rank}: {seen}" for rank, (seen, _) in enumerate(everywhere))
            + ". It must be on a file system that all machines share"
        )
    if any(other != config for _, other in everywhere):
        raise ValueError("The processes have different configs: give all the same command line")
    return None if content is None else (file, content)


def check_resumable(
    checkpoint: Mapping, cfg: CfgNode, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Compare a checkpoint with the run that will go on from it, before anything is loaded.

    A warning lists differences of the config that influence the training; the new values count.

    Raises:
        ValueError: for a file of weights alone, for parameters of other names or shapes, or in
            other groups of the optimizer, for another optimizer, and for another number of images
            per batch, with which the order of the images cannot go on.
    """
    new = old = _flat(yaml.safe_load(cfg.dump()))
    if "config" in checkpoint:  # not in those of older versions
        # Keys that are newer than the checkpoint: it ran as their defaults do.
        defaults = _flat(yaml.safe_load(get_cfg().dump()))
        old = defaults | _flat(yaml.safe_load(checkpoint["config"]))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    changes = {key: (old.get(key), new.get(key)) for key in keys}
    listed = "".join(f"\n  {key}: {a!r} -> {b!r}" for key, (a, b) in changes.items())
    if listed:
        logging.getLogger(__name__).warning(
            f"The config differs from that of the checkpoint; the new values count:{listed}"
        )
    problems = _other_shapes(checkpoint["model"], model)
    if problems:
        raise ValueError(
            "The checkpoint is of another model. Choose the config that it was trained with, or "
            f"start a new run from it with MODEL.WEIGHTS and another OUTPUT_DIR. {problems}"
            + (f". Changes of the config:{listed}" if listed else "")
        )
    if "trainer" not in checkpoint:
        raise ValueError(
            "The checkpoint holds weights alone, and not the state of a training. Start a new run "
            "from it with MODEL.WEIGHTS and another OUTPUT_DIR"
        )
    if "SOLVER.OPTIMIZER" in changes:
        before, now = changes["SOLVER.OPTIMIZER"]
        raise ValueError(
            f"SOLVER.OPTIMIZER was {before} and is {now}, which cannot go on with the state of the "
            "other. Set it back, or start a new run from the checkpoint with MODEL.WEIGHTS and "
            "another OUTPUT_DIR"
        )
    saved = checkpoint["trainer"]["_trainer"]["optimizer"]["param_groups"]
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in optimizer.param_groups]:
        raise ValueError(
            "The checkpoint's optimizer has other groups of parameters: SOLVER's weight decays or "
            f"factors of rates have changed. Set them back, or start a new run. Changes:{listed}"
        )
    if "SOLVER.IMS_PER_BATCH" in changes:
        before, now = changes["SOLVER.IMS_PER_BATCH"]
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH was {before} and is {now}: the order of the images could not go "
            f"on. Set it to {before} (over all processes, whose number may change), or start a new "
            "run from the checkpoint with MODEL.WEIGHTS and another OUTPUT_DIR"
        )


@contextmanager
def settings_kept(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> Iterator[None]:
    """Load a checkpoint in the block: rates, weight decay and momentum stay those of the config.

    A scheduler that is not Detectron2's LRMultiplier goes on with those of the checkpoint.
    """
    settings = [{k: x for k, x in g.items() if k != "params"} for g in optimizer.param_groups]
    yield
    if isinstance(scheduler, LRMultiplier):
        scheduler.base_lrs = [new["initial_lr"] for new in settings]
        rates = scheduler.get_lr()
        for group, new, rate in zip(optimizer.param_groups, settings, rates, strict=True):
            group.update(new, lr=rate)


def metrics_rows(file: str) -> list[dict]:
    """The rows of ``metrics.json``, without lines that a kill has cut short."""
    if not os.path.isfile(file):
        return []
    rows = []
    with open(file, errors="replace") as lines:
        for line in lines:
            with suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "iteration" in row]


def evaluated(file: str, iteration: int, metric: str) -> float | None:
    """What ``metrics.json`` says of the evaluation after an iteration; None if it says nothing."""
    # Detectron2 logs the evaluation at the end of a run, here a shorter one, one too high.
    numbers = (iteration, iteration + 1)
    rows = (row for row in metrics_rows(file) if row["iteration"] in numbers and metric in row)
    return next((row[metric] for row in rows), None)


def drop_metrics_from(file: str, iteration: int, end: int) -> None:
    """Drop the rows of ``metrics.json`` that a run from ``iteration`` up to ``end`` writes again.

    The last evaluation of a shorter run stays: Detectron2 logs it one iteration too high.
    """
    if not os.path.isfile(file):
        return
    kept = [
        row
        for row in metrics_rows(file)
        if row["iteration"] < iteration
        or (row["iteration"] == iteration < end and "total_loss" not in row)
    ]
    with replacing(file, "w") as f:
        f.writelines(json.dumps(row, sort_keys=True) + "\n" for row in kept)


def _flat(section: Mapping, prefix: str = "") -> dict[str, object]:
    """{"SECTION.KEY": value} of a config, without the keys that have no influence."""
    flat: dict[str, object] = {}
    for key, value in section.items():
        name = prefix + key
        if name in _WITHOUT_INFLUENCE:
            continue
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _other_shapes(saved: Mapping[str, torch.Tensor], model: torch.nn.Module) -> str:
    """Parameters that a checkpoint lacks, has too many, or has in another shape; "" for none."""
    theirs = {name.removeprefix("module."): tuple(x.shape) for name, x in saved.items()}
    ours = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    shared = sorted(ours.keys() & theirs.keys())
    lists = {
        "Missing": sorted(dict(model.named_parameters()).keys() - theirs.keys()),
        "Unknown": sorted(theirs.keys() - ours.keys()),
        "Of another shape": [
            f"{name} {theirs[name]}, here {ours[name]}"
            for name in shared
            if theirs[name] != ours[name]
        ],
    }
    return "; ".join(
        f"{title}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for title, names in lists.items()
        if names
    )
