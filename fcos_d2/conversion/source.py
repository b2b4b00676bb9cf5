"""How the checkpoints of another implementation are described; sources.py describes each."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from ..checkpoint import convert_torchvision_resnet

# Pairs of a pattern and our name. The pattern matches the first parts of a source's name, up to a
# dot or the end. Our name has its groups as \1, \2, ... What follows is the same in both names.
Rules = Sequence[tuple[str, str]]

# BatchNorm uses this counter only if its momentum is None, which no source has. Detectron2 before
# version 0.6 saves a box per level, centred on the location; LOCATION_OFFSET takes its place.
# mmdetection's GFL saves the numbers of the bins.
_IGNORED = (
    r".*\.num_batches_tracked|anchor_generator\.cell_anchors\.\d+|bbox_head\.integral\.project"
)


@dataclass(frozen=True)
class Source:
    """The layout of an implementation's checkpoints.

    Attributes:
        signature: some names of this source start with this pattern, and no name of another.
        rules: the first one that matches a name counts.
        cfg: config keys and values that reproduce the source's arithmetic, where it differs from
            :data:`ORIGINAL_SETTINGS`.
        not_in_file: config keys that change the detections, but follow neither from the source nor
            from its checkpoints. The user chooses a config with the right values.
        resnet: a pattern of the prefix of its ResNet, if that has torchvision's names.
        unused: a pattern of names that its own model does not read.
        tower_rules: returns rules that depend on all names of a checkpoint.
        hrnet: rules that come first for its models on an HRNet, see :func:`hrnet_rules`.
        adapt: changes the renamed tensors in place, so that our model computes the same.
    """

    signature: str
    rules: Rules
    cfg: Mapping[str, Any]
    not_in_file: Sequence[str] = ()
    resnet: str | None = None
    unused: str | None = None
    tower_rules: Callable[[Collection[str]], Rules] = lambda names: []
    hrnet: Rules = ()
    adapt: Callable[[dict[str, Tensor], CfgNode], None] = lambda tensors, cfg: None

    def our_names(self, names: Collection[str]) -> dict[str, str | None]:
        """Our name for each name that our model may need, or None where we have none."""
        ignored = f"{_IGNORED}|{self.unused}" if self.unused else _IGNORED
        rules = [*self.rules, *self.tower_rules(names)]
        if self.hrnet and any(re.match(self.hrnet[0][0], name) for name in names):
            rules = [*self.hrnet, *rules]
        return {n: self._our_name(n, rules) for n in names if not re.fullmatch(ignored, n)}

    def _our_name(self, name: str, rules: Rules) -> str | None:
        for pattern, ours in rules:
            if match := re.match(rf"{pattern}(?=\.|$)", name):
                return match.expand(ours) + name[match.end() :]
        if self.resnet and (match := re.match(self.resnet, name)):
            return _our_resnet_name(name[match.end() :])
        return None


def _our_resnet_name(name: str) -> str | None:
    # The offsets of deformable convolutions are "conv2.offset" in the original FCOS, and
    # "conv2.conv_offset" or, in its first versions, "conv2_offset" in mmdetection.
    name, is_offset = re.subn(r"\.conv2[._](conv_)?offset\.", ".conv2.offset.", name)
    name = name.replace(".conv2.conv.", ".conv2.")
    try:
        (resnet_name,) = convert_torchvision_resnet({name: None})
    except ValueError:  # no name of a ResNet, or one of its classifier, which is left out
        return None
    if is_offset:
        resnet_name = resnet_name.replace(".conv2.offset.", ".conv2_offset.")
    return "backbone.bottom_up." + resnet_name


# Our backbone is Detectron2's ResNet and FPN, so the names are the same.
DETECTRON2_BACKBONE: Rules = [
    (r"backbone\.(bottom_up|fpn_lateral\d|fpn_output\d|top_block)", r"backbone.\1"),
    # Checkpoints of older versions have these buffers, which become PIXEL_MEAN and PIXEL_STD.
    (r"(pixel_mean|pixel_std)", r"\1"),
]


def fpn_rules(lateral: str, output: str, first: int = 0) -> Rules:
    """Of the FPN on C3, C4 and C5; {} in the patterns is a number that starts at ``first``."""
    return [
        (pattern.format(first + i), f"backbone.fpn_{kind}{i + 3}")
        for kind, pattern in (("lateral", lateral), ("output", output))
        for i in range(3)
    ]


def hrnet_rules(reduction: str, output: str, body: str) -> Rules:
    """Of an HRNet, which is that of timm, and its HRFPN.

    They tell such models by the reduction, which no other neck has. An FPN has the same names as
    the outputs in mmdetection.
    """
    return [
        (reduction, "backbone.reduction"),
        (output, r"backbone.outputs.\1"),
        (body, "backbone.bottom_up.model"),
    ]


# The settings of the original code, and the defaults of all sources.
ORIGINAL_SETTINGS = {
    "MODEL.FCOS.TOP_RELU": True,
    "MODEL.FCOS.LOCATION_OFFSET": 0.5,
    "MODEL.FCOS.SCORE_FUSION": "sqrt",
    "MODEL.FCOS.CLIP_BOXES": "before_nms",
    "MODEL.FCOS.SCORE_THRESH_ON": "class",
    "MODEL.FCOS.SCORE_THRESH_TEST": 0.05,
    "MODEL.FCOS.TOPK_CANDIDATES_TEST": 1000,
    "TEST.DETECTIONS_PER_IMAGE": 100,
    # The checkpoint has the backbone: none is downloaded.
    "MODEL.TIMM.PRETRAINED": False,
}

# What a ResNet with torchvision's ImageNet weights expects.
TORCHVISION_RESNET = {
    "INPUT.FORMAT": "RGB",
    # 255 times its 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225 for images in [0, 1].
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}
