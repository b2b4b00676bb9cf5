"""Files that are complete or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO


def check_local(folder: str) -> None:
    """Raise a ValueError for a folder that is not of this machine, such as "s3://..."."""
    if "://" in folder:
        raise ValueError(
            f"OUTPUT_DIR {folder!r} is no local folder. A file there cannot be replaced as a "
            "whole. Choose a folder of this machine, and copy it when the run is done"
        )


@contextmanager
def replacing(path: str, mode: str = "wb", own: bool = False) -> Iterator[IO]:
    """Write a file under a temporary name, and rename it once it is complete on disk.

    The temporary file is a new one. What has its name before, such as a link to another file, is
    removed and not written to.

    Args:
        path: the final path.
        mode: "wb" or "w".
        own: put the process id into the temporary name, so that several processes can write the
            same file at once. Without it, the next write removes what a killed process leaves.

    Yields:
        the open temporary file.
    """
    partial = f"{path}.{os.getpid()}.partial" if own else f"{path}.partial"
    if os.path.lexists(partial):
        os.unlink(partial)
    try:
        with open(partial, mode.replace("w", "x")) as file:  # x: never an existing file or a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if os.path.lexists(partial):
            os.unlink(partial)
