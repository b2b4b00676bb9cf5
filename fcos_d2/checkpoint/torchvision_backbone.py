"""torchvision's ImageNet ResNets as ``MODEL.WEIGHTS``, by their name in torchvision.

``torchvision://ResNet18_Weights.IMAGENET1K_V1`` downloads the weights through torchvision, gives
the parameters Detectron2's names, and keeps the result in Detectron2's cache folder.
``torchvision:///path/to/resnet18.pth`` does the same with a state dict on disk, of torchvision or
of timm, whose ResNets have the same names.
"""

import hashlib
import os
import pickle
import re
from pathlib import Path

import torchvision
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import get_cache_dir
from torch import Tensor

from .reading import read_checkpoint
from .writing import replacing

_PREFIX = "torchvision://"


def convert_torchvision_resnet(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a torchvision ResNet under Detectron2's names, without the classifier.

    Raises:
        ValueError: for a name that is not one of a torchvision ResNet.
    """
    converted = {}
    for name, value in state_dict.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        ours = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        ours = ours if ours.startswith("res") else f"stem.{ours}"
        ours = ours.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        ours = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", ours)
        if not re.match(r"(stem|res[2-5]\.\d+)\.(conv[1-3]|shortcut)\.", ours):
            raise ValueError(f"{name!r} is not a parameter of a torchvision ResNet")
        converted[ours] = value
    return converted


class _TorchvisionHandler(PathHandler):
    """Resolves ``torchvision://`` names and paths to a file in Detectron2's format."""

    def _get_supported_prefixes(self) -> list[str]:
        # Detectron2's checkpointer reduces the three slashes before a path to one.
        return [_PREFIX, "torchvision:/"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        name = path.removeprefix(_PREFIX).removeprefix("torchvision:")
        on_disk = os.path.isabs(name)
        cache_name = name
        if on_disk:  # the content names it, since files of one name differ
            digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
            cache_name = f"file-{os.path.basename(name)}-{digest[:16]}"
        file = os.path.join(get_cache_dir(), "fcos_d2", "torchvision", cache_name + ".pkl")
        if force or not os.path.isfile(file):
            if on_disk:
                source = read_checkpoint(name)
            else:
                source = torchvision.models.get_weight(name).get_state_dict(
                    check_hash=True, weights_only=True
                )
            model = {k: v.numpy() for k, v in convert_torchvision_resnet(source).items()}
            data = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
            os.makedirs(os.path.dirname(file), exist_ok=True)
            with replacing(file, own=True) as f:
                pickle.dump(data, f)
        return file


PathManager.register_handler(_TorchvisionHandler(), allow_override=True)
