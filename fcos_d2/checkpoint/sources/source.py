"""What the layouts of other implementations have in common.

A source is data: patterns of its parameters' names with ours, and the config keys that reproduce
its arithmetic; and one function for what neither can say.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from ..torchvision_backbone import convert_torchvision_resnet

# (pattern of a whole source name, our name with the pattern's groups as \1, \2, ...)
Rules = Sequence[tuple[str, str]]

# Counts batches for a BatchNorm whose momentum is None, which no detector here uses.
BATCH_COUNTER = r".*\.num_batches_tracked"


@dataclass(frozen=True)
class Source:
    """The layout of an implementation's checkpoints.

    Attributes:
        signature: a pattern that names of this source have, and no other's.
        rules: from all names of a checkpoint to the rules for them; the first that fits counts.
        cfg: config keys and values that reproduce the source's arithmetic.
        not_in_file: config keys that change the detections, but neither follow from the source nor
            show in its checkpoints: whoever converts must choose a config that has them right.
        ignored: patterns of names that have no counterpart, each with its reason beside it.
        resnet: a pattern of what stands before the names of a torchvision ResNet, if it has one.
        adapt: changes the renamed tensors in place to compute the same in our model.
    """

    signature: str
    rules: Callable[[Collection[str]], Rules]
    cfg: Mapping[str, Any]
    not_in_file: Sequence[str] = ()
    ignored: Sequence[str] = ()
    resnet: str | None = None
    adapt: Callable[[dict[str, Tensor], CfgNode], None] = field(default=lambda tensors, cfg: None)

    def is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def our_names(self, names: Collection[str]) -> dict[str, str | None]:
        """Our name of each name that is not ignored, None where there is none."""
        rules = self.rules(names)
        return {n: self._our_name(n, rules) for n in names if not self.is_ignored(n)}

    def _our_name(self, name: str, rules: Rules) -> str | None:
        for pattern, ours in rules:
            if match := re.fullmatch(pattern, name):
                return match.expand(ours)
        if self.resnet and (match := re.match(self.resnet, name)):
            return _our_resnet_name(name[match.end() :])
        return None


def _our_resnet_name(name: str) -> str | None:
    # Offsets of deformable convolutions: "conv2.offset" in the original FCOS, "conv2.conv_offset"
    # or, in its first versions, "conv2_offset" in mmdetection.
    name, offset = re.subn(r"\.conv2[._](conv_)?offset\.", ".conv2.offset.", name)
    name = name.replace(".conv2.conv.", ".conv2.")
    try:
        converted = convert_torchvision_resnet({name: None})
    except ValueError:
        return None
    ours = "backbone.bottom_up." + next(iter(converted), "")
    return ours.replace(".conv2.offset.", ".conv2_offset.") if offset else ours


# Detectron2's ResNet and FPN, which ours are, with their prefix.
DETECTRON2_BACKBONE: Rules = [
    (r"(backbone\.(?:bottom_up|fpn_lateral\d|fpn_output\d|top_block)\..+)", r"\1"),
    # Buffers of the checkpoints of older versions; they become PIXEL_MEAN and PIXEL_STD.
    (r"(pixel_mean|pixel_std)", r"\1"),
]
