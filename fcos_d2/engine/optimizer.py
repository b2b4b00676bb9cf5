"""SOLVER.OPTIMIZER and SOLVER.LAYER_DECAY, on Detectron2's groups of parameters."""

import re

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

_OPTIMIZERS = ("SGD", "AdamW")
# For 16 images or fewer, and in proportion for more: a fifth of the recipes' rate for SGD. RTMDet
# (2212.07784) takes 0.004 for 256 images.
_LARGEST_ADAMW_RATE = 2e-3
# The stages in the names of Detectron2's ResNets and of timm's models.
_STAGE = re.compile(r"(?:model\.)?(?:res|layer|stages?_?|blocks\.|level|s)(\d+)\.")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of ``SOLVER``, with Detectron2's keys for rates, decays and clipping.

    Raises:
        ValueError: for an unknown optimizer, a rate for SGD with AdamW, a LAYER_DECAY that is not
            in (0, 1], with a BIAS_LR_FACTOR, or for a backbone whose stages are not known.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in _OPTIMIZERS:
        raise ValueError(
            f"SOLVER.OPTIMIZER must be one of {list(_OPTIMIZERS)}, got {solver.OPTIMIZER!r}"
        )
    rate, limit = solver.BASE_LR, _LARGEST_ADAMW_RATE * max(1.0, solver.IMS_PER_BATCH / 16)
    if solver.OPTIMIZER == "AdamW" and rate > limit:
        raise ValueError(
            f"SOLVER.BASE_LR {rate} is a rate for SGD. AdamW takes steps of about the "
            "rate, however small the gradient is, and would diverge: set SOLVER.BASE_LR to about "
            "0.0001 for 16 images a step, and SOLVER.WEIGHT_DECAY to 0.05"
        )
    if solver.OPTIMIZER == "SGD" and solver.LAYER_DECAY == 1:
        return build_sgd(cfg, model)
    factors = _rate_factors(solver, model)
    params = get_default_optimizer_params(
        model,
        base_lr=rate,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lambda name: factors.get(name, 1.0),
        # timm's layer scales are gains of channels, as the weights of norms are.
        overrides={"gamma": {"weight_decay": solver.WEIGHT_DECAY_NORM}},
    )
    if solver.OPTIMIZER == "AdamW":
        optimizer = torch.optim.AdamW(params, rate, weight_decay=solver.WEIGHT_DECAY)
    else:  # with the arguments of Detectron2's
        optimizer = torch.optim.SGD(
            params,
            rate,
            momentum=solver.MOMENTUM,
            nesterov=solver.NESTEROV,
            weight_decay=solver.WEIGHT_DECAY,
            foreach=True,
        )
    return maybe_add_gradient_clipping(cfg, optimizer)


def _rate_factors(solver: CfgNode, model: nn.Module) -> dict[str, float]:
    """Factors of the rates of the backbone: LAYER_DECAY once for each stage from there to its end.

    Args:
        solver: for errors in it see :func:`build_optimizer`.
    """
    if not 0 < solver.LAYER_DECAY <= 1:
        raise ValueError(f"SOLVER.LAYER_DECAY must be in (0, 1], got {solver.LAYER_DECAY}")
    if solver.LAYER_DECAY == 1:
        return {}
    if solver.BIAS_LR_FACTOR != 1:
        raise ValueError(
            "SOLVER.BIAS_LR_FACTOR gives all biases one rate, and SOLVER.LAYER_DECAY each stage "
            "its own: set one of them to 1.0"
        )
    stages = _stages([name for name, _ in model.named_parameters()])
    in_order = sorted(set(stages.values()))
    if len(in_order) < 2:
        raise ValueError(
            f"SOLVER.LAYER_DECAY finds no stages in the backbone "
            f"{type(getattr(model, 'backbone', model)).__name__}. It knows those of Detectron2's "
            "ResNets and of timm's models that name them (stages, layers or blocks): set it to 1.0"
        )
    exponents = {stage: len(in_order) - i for i, stage in enumerate(in_order)}
    return {name: solver.LAYER_DECAY ** exponents[stage] for name, stage in stages.items()}


def _stages(names: list[str]) -> dict[str, int]:
    """The number of the stage of each parameter of the backbone before its FPN; -1 for the stem.

    What stands between and after the stages belongs to the stage before it.
    """
    with_fpn = any(name.startswith("backbone.bottom_up.") for name in names)
    prefix = "backbone.bottom_up." if with_fpn else "backbone."
    stages, stage = {}, -1
    for name in names:
        if name.startswith(prefix):
            match = _STAGE.match(name.removeprefix(prefix))
            stage = int(match[1]) if match else stage
            stages[name] = stage
    return stages
