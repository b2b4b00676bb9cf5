"""Checkpoints that are either complete or not there."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from detectron2.checkpoint import DetectionCheckpointer


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, safe against being killed while it writes.

    Files are written beside their place, flushed to disk, then renamed. When the checkpoint that
    ``last_checkpoint`` names is missing or cut short all the same (a full disk, another tool),
    resuming takes the newest complete one.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.path_manager = _AtomicWrites(self.path_manager)

    def get_checkpoint_file(self) -> str:
        """The last complete checkpoint in the folder.

        Raises:
            FileNotFoundError: if the folder has a ``last_checkpoint`` but no complete checkpoint.
        """
        last = super().get_checkpoint_file()
        if _is_complete(last):
            return last
        complete = [f for f in self.get_all_checkpoint_files() if _is_complete(f)]
        if not complete:
            raise FileNotFoundError(
                f"{last} is missing or not complete, and {self.save_dir} has no complete "
                "checkpoint to resume from. Start without --resume, or with another OUTPUT_DIR"
            )
        newest = max(complete, key=os.path.getmtime)
        self.logger.warning(f"{last} is missing or not complete: resuming from {newest}")
        return newest


def _is_complete(path: str) -> bool:
    # torch.save writes a zip archive, whose directory is at the end of the file.
    return os.path.isfile(path) and zipfile.is_zipfile(path)


class _AtomicWrites:
    """A path manager whose ``open`` for writing puts the file in place only when it is closed."""

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
        partial = path + ".partial"
        with self._path_manager.open(partial, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
