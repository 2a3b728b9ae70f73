"""The one restricted reader of pickles: plain values, numpy arrays, torch tensors; the rest is refused by name.

A pickle is a program that may call whatever it can name. Here it can name only what rebuilds arrays, and it is refused
at the first other name, before anything of that name is imported. It knows no format.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from prefetch.errors import FormatError, reading
from prefetch.zipped import check_stored


def unpickle(path: Path, *, record_class: str | None = None) -> Any:
    """The value. Instances of `record_class` (a full name, never imported) become plain namespaces of their fields."""
    with reading(path, "a pickle of plain values, arrays and tensors"), path.open("rb") as file:
        if not path.stat().st_size:
            raise FormatError(f"{path}: the file is empty")
        whole = io.BytesIO(file.read())  # which hands out no more than there is, whatever is asked
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # old files use what numpy and torch have since deprecated
            value = _Restricted(whole, record_class).load()
        if whole.read(1):
            raise FormatError(f"{path}: something follows the pickle; expected one")
        return value


class _Restricted(pickle._Unpickler):
    """Python's own unpickler: the compiled one makes room for whatever place in its memory a file names."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def __init__(self, file: BinaryIO, record_class: str | None) -> None:
        super().__init__(file)
        self.allowed = _allowed()
        if record_class is not None:
            self.allowed[record_class] = types.SimpleNamespace

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self.allowed:
            raise FormatError(
                f"the pickle names {full}, which is neither a numpy array nor a torch tensor: refused, nothing of it "
                "was run; if it is a record of plain fields, pass source.record_class=" + full
            )
        return self.allowed[full]

    def _bytearray(self) -> None:
        """As the original, which makes room before it reads."""
        n_bytes = int.from_bytes(self.read(8), "little")
        data = self.read(n_bytes) if n_bytes < sys.maxsize else b""
        if len(data) < n_bytes:
            raise FormatError(f"the pickle promises {n_bytes:,} bytes, and ends before")
        self.append(bytearray(data))

    dispatch[pickle.BYTEARRAY8[0]] = _bytearray


class _Dtype:
    """Stands for numpy.dtype while loading: plain numbers and text only, whatever state the file sets afterwards.

    A dtype with an object field over raw bytes would make pointers of them.
    """

    def __init__(self, text: str, *_flags: Any) -> None:
        self.dtype = np.dtype(text)
        if self.dtype.kind not in "biufcSU" or self.dtype.fields or self.dtype.subdtype:
            raise FormatError(f"an array of {text} is not plain numbers: refused")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if tuple(state[2:5]) != (None, None, None):
            raise FormatError("a structured dtype is not plain numbers: refused")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """What an array is rebuilt into: its state may only name a dtype that was admitted."""

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, dtype.dtype, is_fortran, data))


def _allowed() -> dict[str, Callable[..., Any]]:
    """Full name in the file -> what stands for it here. Rebuilders are taken from a value's own recipe."""
    from_buffer: Any = np.zeros(1).__reduce_ex__(5)[0]
    rebuild: Any = np.float64(0).__reduce__()[0]

    def reconstruct(*_what: Any) -> Any:
        return np.ndarray.__new__(_Array, (0,), "u1")

    def buffered(data: Any, dtype: _Dtype, shape: Any, order: Any, *more: Any) -> Any:
        return from_buffer(data, dtype.dtype, shape, order, *more)

    def scalar(dtype: _Dtype, *data: Any) -> Any:
        return rebuild(dtype.dtype, *data)

    names: dict[str, Any] = {
        "collections.OrderedDict": collections.OrderedDict,
        "_codecs.encode": _latin1,
        "numpy.ndarray": None,  # named as an argument only; calling it is an error
        "numpy.dtype": _Dtype,
        "torch.storage._load_from_bytes": _storage,
        "torch._utils._rebuild_tensor_v2": _tensor,
    }
    for core in ("numpy.core", "numpy._core"):  # before and since numpy 2
        names[f"{core}.multiarray._reconstruct"] = reconstruct
        names[f"{core}.numeric._frombuffer"] = buffered
        names[f"{core}.multiarray.scalar"] = scalar
    return names


def _latin1(text: str, encoding: str) -> bytes:
    """How pickles before protocol 3 hold bytes."""
    if encoding != "latin1":
        raise FormatError(f"expected bytes as latin1 text, found {encoding}")
    return text.encode(encoding)


def _storage(data: bytes) -> Any:
    """torch's own function unpickles without restriction; this one loads weights only."""
    import torch

    check_stored(io.BytesIO(data))
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *more: Any) -> Any:
    """Refuses a tensor that has more numbers than its storage, which torch would make room for."""
    import torch

    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise FormatError(f"a tensor of {len(size)} axes: expected whole numbers as its sizes")
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if max(math.prod(size), offset + last + 1) > len(storage):
        raise FormatError(f"a tensor of {tuple(size)} does not fit its {len(storage)} numbers")
    rebuild: Any = torch.zeros(1).__reduce_ex__(2)[0]
    return rebuild(storage, offset, size, stride, *more)
