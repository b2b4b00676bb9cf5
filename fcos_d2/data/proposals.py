"""Files of precomputed proposals, which Detectron2 unpickles."""

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..checkpoint.reading import read_checkpoint


def check_proposal_files(cfg: CfgNode) -> None:
    """Read the files of proposals as plain data, before Detectron2 reads them in its own way.

    Raises:
        ValueError: for a file that holds more than plain data, which could run code.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for file in (*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST):
        read_checkpoint(PathManager.get_local_path(file))
