"""Checkpoints of other FCOS implementations as ours: all of a checkpoint, or an error."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from ..modeling.losses import FCOSLoss
from .sources import SOURCES, Source


def convert(
    state_dict: Mapping[str, Any], source: str, cfg: CfgNode, opts: Sequence = ()
) -> tuple[dict[str, Tensor], CfgNode]:
    """Turn the checkpoint of another implementation into one of ours.

    Args:
        state_dict: names to tensors or arrays, as they are in the checkpoint; also inside
            ``{"model": ...}`` or ``{"state_dict": ...}``, and behind the ``module.`` of
            DistributedDataParallel. Left as it is.
        source: "adelaidet", "fcos" (tianzhi0549/FCOS), "detectron2", "torchvision" or "mmdet".
        cfg: what the checkpoint cannot tell: backbone, number of classes and of convolutions, and
            the keys that :data:`SOURCES` has under ``not_in_file``. Left as it is.
        opts: ``[key, value, ...]`` that the returned config has in any case, for a checkpoint
            made with other settings than its source's defaults.

    Returns:
        a value for every parameter and buffer of the model, on CPU, sharing no memory with the
        input; and ``cfg`` with the keys that reproduce the source's arithmetic at inference.

    Raises:
        ValueError: for an unknown source; a checkpoint that is not the source's; or one that does
            not fit the config, with all names that have no place, are missing, or have another
            shape.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {list(SOURCES)}, got {source!r}")
    layout = SOURCES[source]
    theirs = _tensors(state_dict)
    _check_source(theirs, source)

    our_names = layout.our_names(theirs)
    ours, origin, homeless = {}, {}, []
    for name, our_name in our_names.items():
        if our_name is None or our_name in ours:
            homeless.append(name)
        else:
            ours[our_name], origin[our_name] = theirs[name], name
    cfg = _config(cfg, layout, ours, opts)
    layout.adapt(ours, cfg)

    expected = _expected(cfg)
    _complete(ours, expected, cfg)
    homeless += [origin[name] for name in ours.keys() - expected.keys() if name in origin]
    missing = [name for name in expected if name not in ours]
    misshaped = [
        f"{origin.get(name, name)}: {tuple(ours[name].shape)}, the model has {tuple(x.shape)}"
        for name, x in expected.items()
        if name in ours and ours[name].shape != x.shape
    ]
    _check_complete(source, homeless, missing, misshaped)
    return {n: ours[n].detach().to("cpu", x.dtype, copy=True) for n, x in expected.items()}, cfg


def _tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, out of what training code wraps around them."""
    for key in ("model", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            return _tensors(checkpoint[key])
    tensors = {
        name: torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x
        for name, x in checkpoint.items()
    }
    others = [str(name) for name, x in tensors.items() if not isinstance(x, Tensor)]
    if others:
        raise ValueError(f"Not a state dict. Its entries without a tensor: {', '.join(others)}")
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    # Arithmetic on half precision would round.
    return {n: x.float() if x.is_floating_point() else x for n, x in tensors.items()}


def _check_source(tensors: Mapping[str, Tensor], source: str) -> None:
    fitting = [
        other
        for other, layout in SOURCES.items()
        if any(re.fullmatch(layout.signature, name) for name in tensors)
    ]
    if source in fitting:
        return
    looks = f"It looks like one of {fitting[0]!r}. " if fitting else ""
    names = ", ".join(list(tensors)[:5]) or "none"
    raise ValueError(f"This is not a checkpoint of {source!r}. {looks}Its first names: {names}")


def _config(cfg: CfgNode, layout: Source, ours: dict[str, Tensor], opts: Sequence) -> CfgNode:
    """The config with what the source and its tensors say. Takes the pixel statistics out."""
    cfg = cfg.clone()
    cfg.defrost()
    values = {**layout.cfg, **_structure(ours, cfg)}
    for name in ("pixel_mean", "pixel_std"):
        if name in ours:
            values[f"MODEL.{name.upper()}"] = ours.pop(name).flatten().tolist()
    cfg.merge_from_list([x for item in values.items() for x in item])
    cfg.merge_from_list(list(opts))
    return cfg


def _structure(ours: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Any]:
    """The keys of the model's structure that its parameters show."""
    norm = cfg.MODEL.FCOS.NORM
    tower = r"head\.(cls|bbox|share)_tower\.\d+"
    deformable = any(re.fullmatch(tower + r"\.offset\.weight", name) for name in ours)
    if not any(re.fullmatch(tower + r"\.(\d+\.)?weight", n) and ours[n].dim() == 1 for n in ours):
        norm = ""
    elif not any(re.fullmatch(tower + r"\.(\d+\.)?running_mean", n) for n in ours):
        norm = "GN"
    elif norm not in ("BN", "SyncBN"):
        norm = "BN"
    keys = {
        "MODEL.FCOS.NORM": norm,
        "MODEL.FCOS.USE_SCALE": any(n.startswith("head.scales.") for n in ours),
        "MODEL.FCOS.USE_DEFORMABLE": deformable,
    }
    p6 = ours.get("backbone.top_block.p6.weight")
    if p6 is not None and p6.dim() == 4:
        keys["MODEL.FCOS.TOP_IN_FEATURE"] = "p5" if p6.shape[1] == p6.shape[0] else "res5"
    return keys


def _expected(cfg: CfgNode) -> dict[str, Tensor]:
    """Names and shapes of the parameters and buffers, without memory or time for values."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).state_dict()


def _complete(ours: dict[str, Tensor], expected: Mapping[str, Tensor], cfg: CfgNode) -> None:
    """Add, in place, what follows from the other tensors or starts anew."""
    _spread_over_levels(ours, expected)
    running_averages = FCOSLoss(cfg).state_dict()
    for name, x in expected.items():
        if name.startswith("head.scales.") and name in ours and ours[name].dim() == 0:
            ours[name] = ours[name].reshape(1)  # so it is in mmdetection
        elif name.endswith(".num_batches_tracked"):
            ours[name] = torch.zeros(x.shape, dtype=x.dtype)
        elif name.startswith("loss."):
            ours[name] = running_averages[name.removeprefix("loss.")]


def _spread_over_levels(ours: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Give each level its copy of a norm, or of its weight and bias, that all levels share."""
    shared_by = {}
    for name in expected:
        match = re.fullmatch(r"(head\.\w+_tower\.\d+)\.\d+(\.\w+)", name)
        if match and name not in ours and match[1] + match[2] in ours:
            shared_by[name] = match[1] + match[2]
    ours.update({name: ours[shared] for name, shared in shared_by.items()})
    for shared in set(shared_by.values()):
        del ours[shared]


def _check_complete(
    source: str, homeless: Sequence[str], missing: Sequence[str], misshaped: Sequence[str]
) -> None:
    lists = {
        "Names of the checkpoint that have no place in the model": homeless,
        "Names of the model that the checkpoint lacks": missing,
        "Names whose shapes differ": misshaped,
    }
    found = [f"{title}:\n  " + "\n  ".join(sorted(x)) for title, x in lists.items() if x]
    if found:
        raise ValueError(
            f"The checkpoint of {source!r} does not fit the config, which says the backbone, the "
            "levels, and the numbers of classes and convolutions.\n" + "\n".join(found)
        )
