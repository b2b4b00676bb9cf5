"""Reads checkpoint files without running code from them."""

import codecs
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode

_multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
# Everything that a pickle of plain arrays refers to, under the names of NumPy 1 and 2.
_ARRAY_PARTS: dict[str, Callable] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": _multiarray._reconstruct,
    "numpy._core.multiarray._reconstruct": _multiarray._reconstruct,
    "numpy.core.multiarray.scalar": _multiarray.scalar,
    "numpy._core.multiarray.scalar": _multiarray.scalar,
    "collections.OrderedDict": OrderedDict,
    # Python 2 and protocol 2 use it for the bytes of an array.
    "_codecs.encode": codecs.encode,
    # Files of proposals name the layout of their boxes by this enumeration.
    "detectron2.structures.boxes.BoxMode": BoxMode,
}
_DTYPES = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64")]


def read_checkpoint(path: str, trust_pickle: bool = False) -> dict[str, Any]:
    """The content of a ``.pth`` file of PyTorch or a ``.pkl`` file of Detectron2, on CPU.

    Args:
        trust_pickle: also read objects other than tensors, arrays, numbers, text, lists and
            dictionaries. Such a file can run any code: set it only for files whose makers you
            trust.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds other objects and ``trust_pickle`` is not set, if it is
            damaged, or if it holds no dictionary.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}")
    try:
        read = _read_pkl if path.endswith(".pkl") else _read_pth
        content = read(path, trust_pickle)
    except pickle.UnpicklingError as e:
        if trust_pickle:
            raise ValueError(f"{path} cannot be read: {e}") from e
        raise ValueError(
            f"{path} is damaged, or holds pickled objects other than tensors, which can run any "
            "code when they are read. Nothing was run. If you trust its makers, read it with "
            "--trust-pickle of tools/convert_checkpoint.py (trust_pickle=True). The cause: "
            f"{_cause(str(e))}"
        ) from e
    except ImportError as e:
        raise ValueError(f"{path} holds objects of a package that is not installed: {e}") from e
    except (EOFError, RuntimeError, LookupError, AttributeError, ValueError) as e:
        raise ValueError(f"{path} is damaged or not a checkpoint ({type(e).__name__}: {e})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _cause(message: str) -> str:
    """The object that PyTorch's long message names, or else the message's first line."""
    match = re.search(r"GLOBAL (\S+)", message)
    return f"an object {match[1]}" if match else message.splitlines()[0]


def _read_pth(path: str, trust_pickle: bool) -> Any:
    allowed = [(part, name) for name, part in _ARRAY_PARTS.items()]
    with torch.serialization.safe_globals([*allowed, *_DTYPES]):
        return torch.load(path, map_location="cpu", weights_only=not trust_pickle)


def _read_pkl(path: str, trust_pickle: bool) -> Any:
    unpickler = pickle.Unpickler if trust_pickle else _ArrayUnpickler
    with open(path, "rb") as f:
        return unpickler(f, encoding="latin1").load()


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable:
        try:
            return _ARRAY_PARTS[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}") from None
