"""Checkpoints that are complete or absent, and that fit the model that loads them."""

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from typing import Any
from urllib.error import URLError

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from .reading import read_checkpoint
from .writing import check_local, replacing

_BATCH_COUNTER = ".num_batches_tracked"


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, safe against kills, damaged files, and files that run code.

    If the checkpoint that ``last_checkpoint`` names is missing or damaged (by a full disk or
    another tool), resuming takes the newest whole one. Loading logs how much of the model comes
    from the file. If it is nothing, or nothing but the stem of the backbone, loading raises a
    ValueError.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **kwargs: Any):
        """As Detectron2's. For the error see :func:`check_local`."""
        check_local(save_dir)
        super().__init__(model, save_dir, **kwargs)
        self.description: dict[str, Any] = {}  # plain data that every checkpoint carries
        # From the state of the model to the parts of a checkpoint that hold its weights.
        self.weights: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda state: {"model": state}
        self._content: dict[str, dict[str, Any]] = {}  # of the file that was read last
        self.missing: list[str] = []  # names that the last file lacks, or has in another shape
        # Of the last file; None if it does not say them.
        self.class_names: list[str] | None = None
        self.category_ids: list[int] | None = None
        # Of the training data. A file of other classes does not load the model's ``class_layers``.
        self.classes_of_data: list[str] | None = None

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Save as Detectron2 does. A run does not resume from a file without ``tag``."""
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: x.state_dict() for key, x in self.checkpointables.items()}
        weights = self.weights(self.model.state_dict())
        data = {**weights, **states, **self.description, **kwargs}
        file = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {file}")
        with replacing(file) as f:
            torch.save(data, f)
        if tag:
            self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with replacing(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load as Detectron2 does. It is an OSError if weights cannot be fetched."""
        try:
            return super().load(path, *args, **kwargs)
        except URLError as error:
            raise OSError(
                f"{path} cannot be fetched ({error.reason}). On a machine without a network, take "
                "weights that lie on it: MODEL.WEIGHTS FILE, for an ImageNet backbone also "
                "torchvision:///path/to/resnet50.pth (docs/results.md), or '' to start at random"
            ) from error

    def has_checkpoint(self) -> bool:
        return super().has_checkpoint() or bool(self.checkpoints_of_run())

    def get_checkpoint_file(self) -> str:
        """Path of the checkpoint to resume from: the last one, or the newest whole one.

        Raises:
            FileNotFoundError: if the folder has no whole checkpoint.
            ValueError: if ``last_checkpoint`` names a file of another folder.
        """
        tag = os.path.join(self.save_dir, "last_checkpoint")
        try:
            last = super().get_checkpoint_file() or tag
        except UnicodeDecodeError:
            last = tag
        if os.path.dirname(last) != os.path.dirname(tag):
            raise ValueError(
                f"{tag} names {last!r}, which is not a file of its own folder. Write the name of "
                "the checkpoint into it, or remove it"
            )
        if is_intact(last):
            return last
        newest = next(filter(is_intact, self.checkpoints_of_run()), None)
        if newest is None:
            raise FileNotFoundError(
                f"{last!r} is missing or damaged, and {self.save_dir} has no whole checkpoint to "
                "resume from. Start without --resume, or with another OUTPUT_DIR"
            )
        self.logger.warning(f"{last!r} is missing or damaged: resuming from {newest}")
        return newest

    def checkpoints_of_run(self) -> list[str]:
        """The files from which a run in this folder may resume, whole or not, the newest first.

        By time, and then by name: a damaged one of a later iteration may be there.
        """
        if not os.path.isdir(self.save_dir):
            return []
        periodic = re.compile(r"model_(\d+|final)\.pth")
        files = self.get_all_checkpoint_files()
        files = [f for f in files if periodic.fullmatch(os.path.basename(f))]
        return sorted(files, key=lambda f: (os.path.getmtime(f), f), reverse=True)

    def check_complete(self) -> None:
        """Raise a ValueError if the last file lacks anything that detection needs."""
        missing = [name for name in self.missing if not name.startswith("loss.")]
        missing = [name for name in missing if not name.endswith(_BATCH_COUNTER)]
        if missing:
            raise ValueError(
                f"The weights do not fit the config: {len(missing)} tensors are not in the file, "
                f"or have another shape there, and would be random: {_shortened(missing)}"
            )

    def _load_model(self, checkpoint: Any) -> Any:
        names, data = checkpoint.get("class_names"), self.classes_of_data
        self.class_names, self.category_ids = names, checkpoint.get("category_ids")
        if names is not None and data is not None and names != data:
            of_classes = tuple(f"{layer}." for layer in getattr(self.model, "class_layers", ()))
            for name in [n for n in checkpoint["model"] if n.startswith(of_classes)]:
                del checkpoint["model"][name]
        incompatible = super()._load_model(checkpoint)
        # A tensor of another shape may be in both.
        other_shapes = [name for name, *_ in incompatible.incorrect_shapes]
        self.missing = list(dict.fromkeys(incompatible.missing_keys + other_shapes))
        sizes = {
            name: x.numel()
            for name, x in self.model.state_dict().items()
            if not name.endswith(_BATCH_COUNTER)  # PyTorch does not say that one is missing
        }
        loaded = {name: size for name, size in sizes.items() if name not in self.missing}
        author = checkpoint.get("__author__", "the file")
        self.logger.info(
            f"Loaded {sum(loaded.values()):,} of the model's {sum(sizes.values()):,} values from "
            f"{author}, in {len(loaded)} of {len(sizes)} tensors. "
            + (f"Initial values keep {_shortened(self.missing)}" if self.missing else "")
        )
        if all(".stem." in f".{name}" for name in loaded):
            what = "nothing but the stem of the backbone" if loaded else "nothing"
            raise ValueError(
                f"The weights do not fit the model: {what} could be loaded. The file has "
                f"{_shortened(incompatible.unexpected_keys) or 'no other names'}, the model "
                f"{_shortened(self.missing)}. Choose weights for this config, or MODEL.WEIGHTS '' "
                "to start at random"
            )
        return incompatible

    def _load_file(self, filename: str) -> dict:
        """As Detectron2's, which runs the code that a ``.pkl`` file may contain."""
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)  # calls _torch_load
        content = read_checkpoint(filename)
        if "model" in content and "__author__" in content:
            return content
        blobs = content.get("blobs", content)  # in Detectron's detectors, not in its backbones
        model = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
        return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}

    def read(self, file: str) -> dict[str, Any]:
        """The content of a ``.pth`` file, which the next call of ``load`` does not read again."""
        self._content = {file: read_checkpoint(file)}
        return self._content[file]

    def _torch_load(self, f: str) -> dict:
        content, self._content = self._content, {}
        return content[f] if f in content else read_checkpoint(f)


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def is_intact(path: str) -> bool:
    """Whether a checkpoint is complete, with the content that was written."""
    try:
        # torch.save writes a zip archive, whose directory comes last and holds a CRC of each entry.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads all headers
    except pickle.UnpicklingError:
        return True  # as it was written; loading says that it holds more than plain data
    except Exception:  # damage raises many kinds
        return False
    return True
