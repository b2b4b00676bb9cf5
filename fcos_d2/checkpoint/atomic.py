"""Checkpoints that are either complete or absent, and that fit the model they are loaded into."""

import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from detectron2.checkpoint import DetectionCheckpointer

_BATCH_COUNTER = ".num_batches_tracked"


@contextmanager
def replacing(path: str, own: bool = False) -> Iterator[str]:
    """Write a file under a temporary name, and rename it once it is complete on disk.

    Args:
        path: the final path.
        own: put the process id into the temporary name, so that several processes can write the
            same file at once. Without it, the next write overwrites what a killed process left.

    Yields:
        the temporary path to write to.
    """
    partial = f"{path}.{os.getpid()}.partial" if own else f"{path}.partial"
    try:
        yield partial
        with open(partial, "rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, safe against being killed while it writes.

    Files are written with :func:`replacing`. If the checkpoint that ``last_checkpoint`` names is
    nevertheless missing or truncated (by a full disk or another tool), resuming takes the newest
    complete one. Loading says how much of the model came from the file, and raises a ValueError
    where it was none of it, or nothing but the stem of the backbone.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.path_manager = _AtomicWrites(self.path_manager)
        self._tag = True
        self.missing: list[str] = []  # names that the last file had not, or in another shape

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Save as Detectron2 does; a run does not resume from a file without ``tag``."""
        self._tag = tag
        try:
            super().save(name, **kwargs)
        finally:
            self._tag = True

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if self._tag:
            super().tag_last_checkpoint(last_filename_basename)

    def has_checkpoint(self) -> bool:
        return super().has_checkpoint() or bool(self._complete_checkpoints())

    def get_checkpoint_file(self) -> str:
        """Path of the checkpoint to resume from: the last one, or the newest complete one.

        Raises:
            FileNotFoundError: if the folder has a ``last_checkpoint`` but no complete checkpoint.
        """
        last = super().get_checkpoint_file()
        if _is_complete(last):
            return last
        complete = self._complete_checkpoints()
        if not complete:
            raise FileNotFoundError(
                f"{last} is missing or incomplete, and {self.save_dir} has no complete "
                "checkpoint to resume from. Start without --resume, or with another OUTPUT_DIR"
            )
        newest = max(complete, key=os.path.getmtime)
        self.logger.warning(f"{last} is missing or incomplete: resuming from {newest}")
        return newest

    def check_complete(self) -> None:
        """Raise a ValueError if the last file left anything at random that detection needs."""
        missing = [
            name
            for name in self.missing
            if not name.startswith("loss.") and not name.endswith(_BATCH_COUNTER)
        ]
        if missing:
            raise ValueError(
                f"The weights do not fit the config: {len(missing)} tensors are not in the file, "
                f"or have another shape there, and would be random: {_shortened(missing)}"
            )

    def _load_model(self, checkpoint: Any) -> Any:
        source = checkpoint.get("__author__", "the file")
        incompatible = super()._load_model(checkpoint)
        wrong_shape = [name for name, *_ in incompatible.incorrect_shapes]
        self.missing = [*incompatible.missing_keys, *wrong_shape]
        tensors = {
            name: x
            for name, x in self.model.state_dict().items()
            if not name.endswith(_BATCH_COUNTER)  # PyTorch does not say that one is missing
        }
        loaded = {name: x.numel() for name, x in tensors.items() if name not in self.missing}
        total = sum(x.numel() for x in tensors.values())
        self.logger.info(
            f"Loaded {sum(loaded.values()):,} of the model's {total:,} values from {source}, in "
            f"{len(loaded)} of {len(tensors)} tensors; the others keep their initial values"
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

    def _complete_checkpoints(self) -> list[str]:
        if not os.path.isdir(self.save_dir):
            return []
        periodic = re.compile(r"model_(\d+|final)\.pth")
        files = self.get_all_checkpoint_files()
        return [f for f in files if periodic.fullmatch(os.path.basename(f)) and _is_complete(f)]


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _is_complete(path: str) -> bool:
    # torch.save writes a zip archive. Its directory comes last, so a truncated file has none.
    return os.path.isfile(path) and zipfile.is_zipfile(path)


class _AtomicWrites:
    """A path manager that writes files with :func:`replacing`."""

    def __init__(self, path_manager: Any):
        self._path_manager = path_manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path_manager, name)

    @contextmanager
    def open(self, path: str, mode: str = "r") -> Iterator[IO]:
        if "w" not in mode:
            with self._path_manager.open(path, mode) as f:
                yield f
            return
        with replacing(path) as partial, self._path_manager.open(partial, mode) as f:
            yield f
