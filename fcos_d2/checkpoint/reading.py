"""Reads checkpoint files without running code from them."""

import pickle
import re
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode


# NumPy's own functions trust a file, and a forged one can harm the process. What is here does not
# let it:
# - The state of a dtype describes memory: structures that hide pointers, items past the end of an
#   array, negative sizes. NumPy crashes on them, or reads other memory of the process.
# - A second state of an array frees memory that other arrays or tensors still show.
# - numpy.ndarray, if it is called, takes bytes for pointers, and an offset into other memory.
# - A state of a class or of a function replaces its methods or defaults in the whole process.
class _Dtype:
    """A type of numbers. Only the byte order of its state counts."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        self.value = np.dtype(str(name))
        if self.value.kind not in "biufc":
            raise pickle.UnpicklingError(f"an array of {self.value}")

    def __setstate__(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """An array of numbers, made of bytes."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if is_fortran else "C")


class _Callable(partial):
    """A function or class that a file may call, but not give a state."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a function or a class")


def _from_buffer(data: bytes | str, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    data = _encode(data, "latin1") if isinstance(data, str) else bytes(data)  # Python 2 has str
    return np.frombuffer(data, dtype.value).reshape(shape, order=order).copy()


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"the encoding {encoding}")
    return text.encode("latin1")


# All that a pickle of plain arrays refers to, under the names of NumPy 1 and 2.
_PARTS = {
    "numpy.ndarray": None,  # named as an argument only
    "numpy.dtype": _Callable(_Dtype),
    "collections.OrderedDict": OrderedDict,
    # Python 2 and protocol 2 use it for the bytes of an array.
    "_codecs.encode": _Callable(_encode),
    # Files of proposals name the layout of their boxes by this enumeration.
    "detectron2.structures.boxes.BoxMode": _Callable(BoxMode),
}
for _bytes in ("bytes", "builtins.bytes", "__builtin__.bytes"):
    _PARTS[_bytes] = _Callable(lambda: b"")  # of an empty array
for _core in ("numpy.core", "numpy._core"):
    _PARTS[f"{_core}.multiarray._reconstruct"] = _Callable(lambda *args: _Array())
    _PARTS[f"{_core}.multiarray.scalar"] = _Callable(
        lambda dtype, data: _from_buffer(data, dtype, (1,), "C")[0]
    )
    _PARTS[f"{_core}.numeric._frombuffer"] = _Callable(_from_buffer)


def read_checkpoint(path: str, trust_pickle: bool = False) -> dict[str, Any]:
    """The content of a ``.pth`` file of PyTorch or a ``.pkl`` file of Detectron2, on CPU.

    A forged file runs no code, but may take all time and memory there is: Python visits a tuple
    once for each way to it when the tuple is the key of a dictionary.

    Args:
        trust_pickle: also read objects other than tensors, arrays, numbers, text, lists and
            dictionaries. Such a file can run any code. Set it only for files whose makers you
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
        content = content if trust_pickle else _resolved(content, {})
    except pickle.UnpicklingError as e:
        if trust_pickle:
            raise ValueError(f"{path} cannot be read: {e}") from e
        raise ValueError(
            f"{path} is damaged, or holds pickled objects other than tensors, which can run any "
            "code when they are read. Nothing was run. If you trust its makers, read it with "
            "--trust-pickle of `fcos convert` (trust_pickle=True). The cause: "
            f"{_cause(str(e))}"
        ) from e
    except ImportError as e:
        raise ValueError(f"{path} holds objects of a package that is not installed: {e}") from e
    except (EOFError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is damaged or not a checkpoint ({type(e).__name__}: {e})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _cause(message: str) -> str:
    """The object that PyTorch's long message names, or else the first line of the message."""
    match = re.search(r"GLOBAL (\S+)", message)
    return f"an object {match[1]}" if match else message.splitlines()[0]


def _read_pth(path: str, trust_pickle: bool) -> Any:
    # PyTorch gives a state only to objects of types that are listed.
    types = [(x, f"{__name__}.{x.__name__}") for x in (_Array, _Dtype)]
    with torch.serialization.safe_globals([*((x, name) for name, x in _PARTS.items()), *types]):
        return torch.load(path, map_location="cpu", weights_only=not trust_pickle)


def _read_pkl(path: str, trust_pickle: bool) -> Any:
    with open(path, "rb") as f:
        unpickler = pickle.Unpickler if trust_pickle else _PlainUnpickler
        return unpickler(f, encoding="latin1").load()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PARTS[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}") from None


def _resolved(x: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """The content with NumPy's objects in place of :class:`_Array` and :class:`_Dtype`.

    Args:
        done: each list, tuple and dictionary so far with its result, by id. A file can repeat
            nested objects, and visiting them again each time takes exponential time.
    """
    if isinstance(x, (_Array, _Dtype)):
        return x.value
    if not isinstance(x, dict) and type(x) not in (list, tuple):
        return x
    if id(x) not in done:
        result = x
        if isinstance(x, dict):
            for key, value in x.items():
                x[key] = _resolved(value, done)
        elif type(x) is list:
            x[:] = [_resolved(value, done) for value in x]
        else:
            result = tuple(_resolved(value, done) for value in x)
        done[id(x)] = x, result  # x stays alive, so that no other object gets its id
    return done[id(x)][1]
