"""Describes the checkpoints of another implementation.

A source has patterns that map the names of its parameters to ours, the config keys that reproduce
its arithmetic, and a function for what patterns and keys cannot express.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from ..torchvision_backbone import convert_torchvision_resnet

# Pairs of a pattern for a source's whole name, and our name with the groups as \1, \2, ...
Rules = Sequence[tuple[str, str]]

# BatchNorm uses this counter only if its momentum is None, which no source has.
BATCH_COUNTER = r".*\.num_batches_tracked"


@dataclass(frozen=True)
class Source:
    """The layout of an implementation's checkpoints.

    Attributes:
        signature: a pattern that matches some names of this source, and none of the others.
        rules: returns the rules for all names of a checkpoint; the first that matches counts.
        cfg: config keys and values that reproduce the source's arithmetic.
        not_in_file: config keys that change the detections, but follow neither from the source nor
            from its checkpoints: the user must choose a config with the right values.
        ignored: patterns of names that our model does not need.
        resnet: a pattern of the prefix of its ResNet, if that has torchvision's names.
        adapt: changes the renamed tensors in place so that our model computes the same.
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
        """Map each name that is not ignored to our name, or to None if it has none."""
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
    # The offsets of deformable convolutions are "conv2.offset" in the original FCOS, and
    # "conv2.conv_offset" or, in its first versions, "conv2_offset" in mmdetection.
    name, is_offset = re.subn(r"\.conv2[._](conv_)?offset\.", ".conv2.offset.", name)
    name = name.replace(".conv2.conv.", ".conv2.")
    try:
        (resnet_name,) = convert_torchvision_resnet({name: None})
    except ValueError:  # not a name of a ResNet, or of its classifier, which is left out
        return None
    if is_offset:
        resnet_name = resnet_name.replace(".conv2.offset.", ".conv2_offset.")
    return "backbone.bottom_up." + resnet_name


# Our backbone is Detectron2's ResNet and FPN, so that the names are the same.
DETECTRON2_BACKBONE: Rules = [
    (r"(backbone\.(?:bottom_up|fpn_lateral\d|fpn_output\d|top_block)\..+)", r"\1"),
    # Checkpoints of older versions have these buffers, which become PIXEL_MEAN and PIXEL_STD.
    (r"(pixel_mean|pixel_std)", r"\1"),
]
