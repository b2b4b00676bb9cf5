"""Files of precomputed proposals, which Detectron2 unpickles."""

from collections.abc import Sequence

from detectron2.utils.file_io import PathManager

from ..checkpoint.reading import read_checkpoint


def check_proposal_files(files: Sequence[str] | None) -> None:
    """Read files of proposals as plain data, before Detectron2 reads them in its own way.

    Raises:
        ValueError: for a file that holds more than plain data, which could run code.
    """
    for file in files or ():
        read_checkpoint(PathManager.get_local_path(file))
