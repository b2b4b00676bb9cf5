"""Fetches a published checkpoint once, checks it, and converts it into one of this project."""

import hashlib
import logging
import os
from urllib.parse import urlparse

import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import file_lock, get_cache_dir

from ..checkpoint import read_checkpoint, replacing
from ..config import load_cfg
from ..config_files import get_config_file
from ..conversion import as_checkpoint, convert
from .published import PUBLISHED, Published, find

_CONVERSION = 1  # to be raised when a conversion gives other tensors or keys than before


class _Handler(PathHandler):
    """Resolves the address of a published checkpoint to a file in this project's format."""

    def _get_supported_prefixes(self) -> list[str]:
        sources = {row.source for row in PUBLISHED.values()} - {"torchvision"}
        # Other names of torchvision are those of backbones.
        return [*(f"{source}://" for source in sources), "torchvision://FCOS_"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        return local_file(find(path))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path), mode)


PathManager.register_handler(_Handler(), allow_override=True)


def local_file(row: Published) -> str:
    """The checkpoint in this project's format. Fetches and converts it if that was not done yet.

    Processes and threads that ask at once wait for the first one.

    Raises:
        OSError: if it cannot be fetched.
        ValueError: if what was fetched is damaged, another file, or none of the source.
    """
    # Another table, or another conversion, makes another file.
    digest = hashlib.sha256(f"{_CONVERSION} {row}".encode()).hexdigest()[:8]
    file = os.path.join(get_cache_dir(), "fcos_d2", row.source, f"{row.name}-{digest}.pth")
    if os.path.isfile(file):
        return file
    with file_lock(file):
        if not os.path.isfile(file):
            _make(row, file)
    return file


def raw_file(row: Published) -> str:
    """Where the file of the makers is kept, whether it is there or not. One may put it there."""
    folder, name = os.path.split(urlparse(row.url).path.lstrip("/"))
    return os.path.join(get_cache_dir(), folder, name)


def _make(row: Published, file: str) -> None:
    raw, terms = raw_file(row), f"{row.address} is licensed by its makers: {row.licence}"
    was_there = os.path.isfile(raw)
    if row.non_commercial:
        logging.getLogger(__name__).warning(f"{terms}. It may not be used commercially")
    try:
        PathManager.get_local_path(row.url)
    except OSError as error:
        raise OSError(
            f"{row.address} cannot be fetched from {row.url} ({error}). Nothing was changed. Try "
            f"again, or put the file there by hand: {raw}"
        ) from error
    try:
        _check_hash(row, raw)
        cfg = load_cfg(get_config_file(row.config))
        state_dict, cfg = convert(read_checkpoint(raw), row.source, cfg, row.opts)
    except ValueError as error:
        if not was_there:
            os.unlink(raw)
        raise ValueError(
            f"What {row.url} gave is not {row.address}: {error}. "
            + (f"Remove {raw}, where it lay before" if was_there else "It was removed. Try again")
        ) from error
    coco = MetadataCatalog.get("coco_2017_val")
    data = as_checkpoint(state_dict, cfg) | {
        "class_names": coco.thing_classes,
        "category_ids": list(coco.thing_dataset_id_to_contiguous_id),
        "__author__": row.address,
    }
    with replacing(file, own=True) as f:
        torch.save(data, f)


def _check_hash(row: Published, raw: str) -> None:
    if not row.sha256:
        return
    digest = hashlib.sha256()
    with open(raw, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(row.sha256):
        raise ValueError(f"its SHA-256 is {digest.hexdigest()[:16]}..., not {row.sha256}")
