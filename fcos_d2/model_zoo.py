"""The shipped configs and their models by name, like :mod:`detectron2.model_zoo`."""

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from .checkpoint import AtomicCheckpointer
from .config import load_cfg
from .config_files import get_config_file
from .zoo import check_fits, find

__all__ = ["get", "get_config", "get_config_file"]


def get_config(config_path: str, trained: bool = False) -> CfgNode | DictConfig:
    """The config of this name: of a YAML with all keys, or a LazyConfig.

    ``MODEL.WEIGHTS``, or ``train.init_checkpoint`` where there is one, is an ImageNet backbone.

    Args:
        config_path: name under ``configs/``; with ``trained`` also the name or the address of a
            published checkpoint.
        trained: with ``MODEL.WEIGHTS`` of a published checkpoint, and all keys as it needs them.

    Raises:
        FileNotFoundError: for an unknown config.
        ValueError: if there is no published checkpoint for it.
    """
    if trained:
        return find(config_path).cfg()
    file = get_config_file(config_path)
    return LazyConfig.load(file) if file.endswith(".py") else load_cfg(file)


def get(
    config_path: str, weights: str | None = None, device: str | None = None, trained: bool = False
) -> nn.Module:
    """Build the model of a shipped config.

    Args:
        config_path: name under ``configs/``, of a YAML or of a LazyConfig with a ``model``.
        weights: a checkpoint of the whole model. None loads the config's ImageNet backbone, ""
            nothing.
        device: None for the GPU, or the CPU if PyTorch sees none.
        trained: load a published checkpoint; see :func:`get_config`.
    """
    cfg = get_config(config_path, trained)
    if isinstance(cfg, CfgNode):
        if weights is not None:
            cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = weights, False
        if device is not None:
            cfg.MODEL.DEVICE = str(torch.device(device))
        check_fits(cfg)
        model = build_model(cfg)
        weights = cfg.MODEL.WEIGHTS
    else:
        model = instantiate(cfg.model)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if weights is None:
            weights = cfg.train.init_checkpoint if "train" in cfg else ""
    AtomicCheckpointer(model).load(weights)
    return model
