"""The shipped configs and their models by name, like :mod:`detectron2.model_zoo`."""

from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from .checkpoint import AtomicCheckpointer
from .config import load_cfg

_PACKAGE = Path(__file__).parent


def get_config_file(config_path: str) -> str:
    """Path of a shipped config.

    Args:
        config_path: name under ``configs/``, e.g. "COCO-Detection/fcos_R_50_FPN_1x.yaml".

    Raises:
        FileNotFoundError: if there is no such config, with a list of the shipped ones.
    """
    # An installed package contains the configs; in a clone they are beside it.
    root = next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir())
    file = root / config_path
    if not file.is_file():
        names = sorted(str(p.relative_to(root)) for p in root.rglob("*.yaml"))
        raise FileNotFoundError(f"No config {config_path!r}. The configs are: {', '.join(names)}")
    return str(file)


def get_config(config_path: str) -> CfgNode:
    """The config of this name, with all keys. ``MODEL.WEIGHTS`` is an ImageNet backbone."""
    return load_cfg(get_config_file(config_path))


def get(config_path: str, weights: str | None = None, device: str | None = None) -> nn.Module:
    """Build the model of a shipped config.

    Args:
        config_path: name under ``configs/``.
        weights: a checkpoint of the whole model. None loads the config's ImageNet backbone, and ""
            keeps the random weights.
        device: overrides ``MODEL.DEVICE``.
    """
    cfg = get_config(config_path)
    if weights is not None:
        cfg.MODEL.WEIGHTS = weights
    if device is not None:
        cfg.MODEL.DEVICE = str(torch.device(device))
    model = build_model(cfg)
    AtomicCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
