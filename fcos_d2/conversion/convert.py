"""Converts checkpoints of other FCOS implementations as a whole, or raises an error."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from .source import ORIGINAL_SETTINGS
from .sources import REFUSED, REFUSED_CONFIGS, SOURCES


def convert(
    state_dict: Mapping[str, Any], source: str, cfg: CfgNode, opts: Sequence = ()
) -> tuple[dict[str, Tensor], CfgNode]:
    """Turn the checkpoint of another implementation into one of ours. No argument is changed.

    Args:
        state_dict: maps the names in the checkpoint to tensors or arrays. May be wrapped in
            ``{"model": ...}`` or ``{"state_dict": ...}``, and its names may have the prefix
            ``module.`` of DistributedDataParallel.
        source: "adelaidet", "fcos" (tianzhi0549/FCOS), "detectron2", "torchvision", "mmdet",
            "mmdet-gfl" or "mmdet-tood".
        cfg: gives what the checkpoint does not show: the backbone, the numbers of classes and
            convolutions, and the keys that :data:`SOURCES` lists as ``not_in_file``.
        opts: ``[key, value, ...]`` that override ``cfg`` and the source's settings, for a
            checkpoint made with other settings than its source's defaults.

    Returns:
        a value for every parameter and buffer of the model, on CPU, sharing no memory with the
        input; and ``cfg`` with the keys that reproduce the source's arithmetic at inference.

    Raises:
        ValueError: for an unknown source, for a checkpoint of another source or of a detector that
            predicts something else, and for one that does not fit the config, with all names that
            have no place in the model, are missing, or differ in shape.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {list(SOURCES)}, got {source!r}")
    layout = SOURCES[source]
    _check_own_config(state_dict)
    theirs = _tensors(state_dict)
    _check_source(theirs, source)

    their_names, unexpected = {}, []
    for their_name, our_name in layout.our_names(theirs).items():
        if our_name is None or our_name in their_names:
            unexpected.append(their_name)
        else:
            their_names[our_name] = their_name
    ours = {ours: theirs[name] for ours, name in their_names.items()}
    cfg = _config(cfg, source, ours, opts)
    layout.adapt(ours, cfg)

    expected = _expected_tensors(cfg)
    _fill_in(ours, expected)
    unexpected += [their_names[n] for n in ours.keys() - expected.keys() if n in their_names]
    misshaped = [
        f"{their_names.get(name, name)}: {tuple(ours[name].shape)}, the model has {tuple(x.shape)}"
        for name, x in expected.items()
        if name in ours and ours[name].shape != x.shape
    ]
    problems = {
        "Names of the checkpoint that have no place in the model": unexpected,
        "Names of the model that the checkpoint lacks": expected.keys() - ours.keys(),
        "Names whose shapes differ": misshaped,
    }
    lists = [f"{title}:\n  " + "\n  ".join(sorted(x)) for title, x in problems.items() if x]
    if lists:
        raise ValueError(
            f"The checkpoint of {source!r} does not fit the config. Check its backbone, levels, "
            "and numbers of classes and convolutions.\n" + "\n".join(lists)
        )
    return {n: ours[n].detach().to("cpu", x.dtype, copy=True) for n, x in expected.items()}, cfg


def settings_of(source: str) -> dict[str, Any]:
    """The config keys that reproduce a source's arithmetic, whatever the checkpoint."""
    return {**ORIGINAL_SETTINGS, **SOURCES[source].cfg}


def as_checkpoint(state_dict: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Any]:
    """The content of a checkpoint that carries its config, from the results of :func:`convert`."""
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = ""
    return {"model": dict(state_dict), "config": dump(cfg)}


def dump(cfg: CfgNode) -> str:
    """The config as YAML, without the device, which depends on the machine that reads it."""
    cfg = cfg.clone()
    del cfg.MODEL["DEVICE"]
    return cfg.dump()


def _tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without the wrappers that training code adds."""
    for key in ("model", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            return _tensors(checkpoint[key])
    tensors = {
        name: torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x
        for name, x in checkpoint.items()
    }
    others = [str(name) for name, x in tensors.items() if not isinstance(x, Tensor)]
    if others:
        raise ValueError(f"Not a state dict. These entries are not tensors: {', '.join(others)}")
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    # Tensors of half precision would be rounded where they are adapted to our model.
    return {n: x.float() if x.is_floating_point() else x for n, x in tensors.items()}


def _check_own_config(checkpoint: Mapping[str, Any]) -> None:
    """mmdetection saves the text of its config, as "config" and since version 3 as "cfg"."""
    meta = checkpoint.get("meta")
    text = f"{meta.get('config')} {meta.get('cfg')}" if isinstance(meta, Mapping) else ""
    for pattern, reason in REFUSED_CONFIGS.items():
        if re.search(pattern, text):
            raise ValueError(reason)


def _check_source(tensors: Mapping[str, Tensor], source: str) -> None:
    for pattern, reason in REFUSED.items():
        if any(re.match(pattern, name) for name in tensors):
            raise ValueError(reason)
    matching = [
        other
        for other, layout in SOURCES.items()
        if any(re.match(layout.signature, name) for name in tensors)
    ]
    if source in matching:
        return
    hint = f"It looks like one of {matching[0]!r}. " if matching else ""
    names = ", ".join(list(tensors)[:5]) or "none"
    raise ValueError(f"This is not a checkpoint of {source!r}. {hint}Its first names: {names}")


def _config(cfg: CfgNode, source: str, ours: dict[str, Tensor], opts: Sequence) -> CfgNode:
    """The config with the settings of the source and of its tensors.

    The pixel statistics are removed from ``ours``: they belong to our config.
    """
    cfg = cfg.clone()
    cfg.defrost()
    settings = settings_of(source) | _structure(ours, cfg)
    for name in ("pixel_mean", "pixel_std"):
        if name in ours:
            settings[f"MODEL.{name.upper()}"] = ours.pop(name).flatten().tolist()
    cfg.merge_from_list([x for setting in settings.items() for x in setting])
    cfg.merge_from_list(list(opts))
    return cfg


def _structure(ours: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Any]:
    """The config keys that follow from the names and shapes of the parameters."""

    def in_towers(pattern: str) -> list[str]:
        layer = r"head\.(cls|bbox|share)_tower\.\d+\."
        return [name for name in ours if re.fullmatch(layer + pattern, name)]

    norm = cfg.MODEL.FCOS.NORM if cfg.MODEL.FCOS.NORM in ("BN", "SyncBN") else "BN"
    if not any(ours[name].dim() == 1 for name in in_towers(r"(\d+\.)?weight")):
        norm = ""
    elif not in_towers(r"(\d+\.)?running_mean"):
        norm = "GN"
    settings = {
        "MODEL.FCOS.NORM": norm,
        "MODEL.FCOS.USE_SCALE": any(n.startswith("head.scales.") for n in ours),
        "MODEL.FCOS.USE_DEFORMABLE": bool(in_towers(r"offset\.weight")),
    }
    p6 = ours.get("backbone.top_block.p6.weight")
    if p6 is not None and p6.dim() == 4:
        settings["MODEL.FCOS.TOP_IN_FEATURE"] = "p5" if p6.shape[1] == p6.shape[0] else "res5"
    return settings


def _expected_tensors(cfg: CfgNode) -> dict[str, Tensor]:
    """The model's parameters and buffers on the meta device, which have shapes but no values."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).state_dict()


def _fill_in(ours: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Add, in place, the tensors that are copies of others or start at zero."""
    # Where all levels share a norm in the source, each of ours has a copy of its tensors.
    shared_by = {n: re.sub(r"^(head\.\w+_tower\.\d+)\.\d+\.", r"\1.", n) for n in expected}
    shared_by = {n: shared for n, shared in shared_by.items() if n not in ours and shared in ours}
    ours.update({name: ours[shared] for name, shared in shared_by.items()})
    for shared in set(shared_by.values()):
        del ours[shared]
    for name, x in expected.items():
        if name.startswith("head.scales.") and name in ours and ours[name].dim() == 0:
            ours[name] = ours[name].reshape(1)  # mmdetection's scales are scalars
        elif name.endswith(".num_batches_tracked") or name.startswith("loss."):
            ours[name] = torch.zeros(x.shape, dtype=x.dtype)  # counters and moving averages
