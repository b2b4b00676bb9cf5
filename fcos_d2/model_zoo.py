"""The shipped configs and their models by name, like :mod:`detectron2.model_zoo`."""

from pathlib import Path

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from .checkpoint import AtomicCheckpointer
from .config import load_cfg


def get_config_file(config_path: str) -> str:
    """Path of a shipped config.

    Args:
        config_path: name under ``configs/``, e.g. "COCO-Detection/fcos_R_50_FPN_1x.yaml", or that
            of a LazyConfig, e.g. "COCO-Detection/fcos_R_50_FPN_1x.py".

    Raises:
        FileNotFoundError: if there is no such config, with a list of the shipped ones.
    """
    # An installed package contains the configs; in a clone they are beside it.
    root = next(p / "configs" for p in Path(__file__).parents[:2] if (p / "configs").is_dir())
    file = root / config_path
    if not file.is_file():
        names = sorted(
            str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in (".yaml", ".py")
        )
        raise FileNotFoundError(f"No config {config_path!r}. The configs are: {', '.join(names)}")
    return str(file)


def get_config(config_path: str) -> CfgNode | DictConfig:
    """The config of this name: of a YAML with all keys, or a LazyConfig.

    ``MODEL.WEIGHTS``, or ``train.init_checkpoint`` where there is one, is an ImageNet backbone.
    """
    file = get_config_file(config_path)
    return LazyConfig.load(file) if file.endswith(".py") else load_cfg(file)


def get(config_path: str, weights: str | None = None, device: str | None = None) -> nn.Module:
    """Build the model of a shipped config.

    Args:
        config_path: name under ``configs/``, of a YAML or of a LazyConfig with a ``model``.
        weights: a checkpoint of the whole model. None loads the config's ImageNet backbone, ""
            nothing.
        device: None for the GPU, or the CPU if PyTorch sees none.
    """
    cfg = get_config(config_path)
    if isinstance(cfg, CfgNode):
        if weights is not None:
            cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = weights, False
        if device is not None:
            cfg.MODEL.DEVICE = str(torch.device(device))
        model = build_model(cfg)
        weights = cfg.MODEL.WEIGHTS
    else:
        model = instantiate(cfg.model)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if weights is None:
            weights = cfg.train.init_checkpoint if "train" in cfg else ""
    AtomicCheckpointer(model).load(weights)
    return model
