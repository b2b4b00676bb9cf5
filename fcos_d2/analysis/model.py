"""Compare FCOS with RetinaNet: parameters, multiply-adds and outputs.

The paper says "9x fewer network output variables" than a detector with 9 anchors per location
(1904.01355, section 3.1). Only the backbone and the head are counted: no preprocessing, decoding or
NMS.
"""

import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.export.flatten import flatten_to_tuple
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import conv_flop_count, get_shape
from tabulate import tabulate
from torch import Tensor, nn

from ..modeling.backbone import padded_size
from ..modeling.deform_conv import use_portable_deform_convs
from .assignment import check_is_fcos

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    from detectron2 import model_zoo

_RESNET_FPNS = ("build_fcos_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")


@dataclass(frozen=True)
class ModelStatistics:
    """What a dense detector costs for one image."""

    parameters: int  # including frozen ones, without running statistics
    # As fvcore counts them. FCOS's backbones fold their batch norms into the convolutions, which
    # makes 0.2 % less for R-50.
    multiply_adds: int
    outputs: int  # number of values that the head returns
    not_counted: dict[str, int]  # how often each operator that multiply_adds leaves out occurs
    input_size: tuple[int, int]  # (height, width) in pixels, padded


def analyze_model(cfg: CfgNode, height: int, width: int) -> ModelStatistics:
    """Count on CPU what one image of (height, width) pixels costs, padded as the detector does.

    Args:
        cfg: of a dense detector, FCOS or Detectron2's RetinaNet. Weights are not loaded.

    Raises:
        ValueError: for another meta architecture, or a size that is not positive.
    """
    if min(height, width) < 1:
        raise ValueError(f"The size must be positive, got {height} x {width}")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    if not isinstance(model, DenseDetector):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r} is not a dense detector"
        )
    use_portable_deform_convs(model)  # Detectron2's own do not run on CPU
    size = padded_size(model.backbone, height, width)
    network = _Network(model)
    image = torch.zeros(1, 3, *size)
    flops = FlopCountAnalysis(network, image)
    flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    flops.set_op_handle("torchvision::deform_conv2d", _deform_conv_flops)
    with torch.no_grad():  # with gradients, a frozen BatchNorm consists of other operators
        multiply_adds = int(flops.total())
    return ModelStatistics(
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=multiply_adds,
        outputs=network.outputs,
        not_counted=dict(flops.unsupported_ops()),
        input_size=size,
    )


def retinanet_cfg(cfg: CfgNode) -> CfgNode:
    """Detectron2's RetinaNet with the ResNet-FPN and the number of classes of an FCOS config.

    The rest is Detectron2's ``retinanet_R_50_FPN_1x.yaml``: P3 to P7 with P6 and P7 from res5,
    9 anchors per location, towers of four convolutions without normalisation.

    Raises:
        ValueError: if the backbone is not from one of the ResNet-FPN builders.
    """
    if cfg.MODEL.BACKBONE.NAME not in _RESNET_FPNS:
        raise ValueError(
            "The comparison with RetinaNet needs a ResNet-FPN: MODEL.BACKBONE.NAME must be one of "
            f"{list(_RESNET_FPNS)}, got {cfg.MODEL.BACKBONE.NAME!r}"
        )
    retinanet = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    for section, key in (("RESNETS", "OUT_FEATURES"), ("FPN", "IN_FEATURES")):
        features = retinanet.MODEL[section][key]  # RetinaNet's levels, which FCOS's may not be
        retinanet.MODEL[section] = cfg.MODEL[section].clone()
        retinanet.MODEL[section][key] = features
    retinanet.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.FCOS.NUM_CLASSES
    retinanet.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_MEAN
    retinanet.MODEL.PIXEL_STD = cfg.MODEL.PIXEL_STD
    return retinanet


def compare_with_retinanet(
    cfg: CfgNode, height: int, width: int
) -> tuple[ModelStatistics, ModelStatistics]:
    """Analyze the FCOS of a config, and the RetinaNet of :func:`retinanet_cfg`.

    Raises:
        ValueError: if the config is not of FCOS, and as :func:`retinanet_cfg`.
    """
    check_is_fcos(cfg)
    configs = cfg, retinanet_cfg(cfg)
    return tuple(analyze_model(x, height, width) for x in configs)


def comparison_table(fcos: ModelStatistics, retinanet: ModelStatistics) -> str:
    """The numbers side by side for a terminal, with what was not counted below."""
    counts = (
        ("parameters (millions)", fcos.parameters, retinanet.parameters, 1e6),
        ("multiply-adds (billions)", fcos.multiply_adds, retinanet.multiply_adds, 1e9),
        ("outputs per image (millions)", fcos.outputs, retinanet.outputs, 1e6),
    )
    rows = [
        (name, f"{f / unit:.2f}", f"{r / unit:.2f}", f"{f / r:.3f}", f"{r / f:.2f}")
        for name, f, r, unit in counts
    ]
    header = ("", "FCOS", "RetinaNet", "FCOS / RetinaNet", "RetinaNet / FCOS")
    height, width = fcos.input_size
    lines = [
        f"One image of {height} x {width} pixels (height x width), backbone and head",
        tabulate(rows, header, colalign=("left", *["right"] * 4), disable_numparse=True),
    ]
    for name, statistics in (("FCOS", fcos), ("RetinaNet", retinanet)):
        operators = ", ".join(f"{op} {n}x" for op, n in sorted(statistics.not_counted.items()))
        lines.append(f"Not counted in {name}: {operators or 'nothing'}")
    return "\n".join(lines)


class _Network(nn.Module):
    """Backbone and head of a dense detector, from an image (1, 3, H, W) to all output maps."""

    outputs: int  # of the last call: the number of values in the maps

    def __init__(self, model: DenseDetector):
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.head_in_features = model.head_in_features

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(image)
        maps, _ = flatten_to_tuple(self.head([features[f] for f in self.head_in_features]))
        maps = tuple(x for x in maps if isinstance(x, Tensor))  # a branch may not exist
        self.outputs = sum(int(x.numel()) for x in maps)
        return maps


def _deform_conv_flops(inputs: list, outputs: list) -> Counter:
    """Multiply-adds of the convolution, without the interpolation where it samples."""
    image, weights, *_ = inputs
    shapes = map(get_shape, (image, weights, outputs[0]))
    return Counter(deform_conv=conv_flop_count(*shapes))
