"""The exported file: safetensors, read without that library, and checked. It knows no predictor."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMA = "prefetch.exported/1"
DTYPES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "U16": "<u2", "U8": "<u1"}
MOST = 1 << 24  # of an axis, and of experts in all layers together
Arrays = dict[str, NDArray[Any]]
Told = dict[str, Any]  # what is said beside the arrays


def read(path: str | Path) -> tuple[Told, Arrays]:
    """What is said of a predictor, and its arrays.

    The format is safetensors: eight bytes with the length of a JSON header, the header, the numbers.
    """
    raw = Path(path).read_bytes()
    try:
        start = 8 + int.from_bytes(raw[:8], "little")
        if not 8 < start <= len(raw):
            raise ValueError(f"its header ends at byte {start:,} of {len(raw):,}")
        header = json.loads(raw[8:start])
        told = {key: json.loads(text) for key, text in header.pop("__metadata__").items()}
        if told["schema"] != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}, found {told['schema']}")
        if hashlib.sha256(raw[start:]).hexdigest() != told["sha256"]:
            raise ValueError("its numbers are not those that were written: cut short or damaged")
        return told, {name: _array(raw, start, name, entry) for name, entry in header.items()}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a predictor that was exported; {reason(error)}"
        ) from error


def _array(raw: bytes, start: int, name: str, entry: Told) -> NDArray[Any]:
    dtype, (first, stop) = np.dtype(DTYPES[entry["dtype"]]), entry["data_offsets"]
    count = math.prod(entry["shape"])
    if stop - first != count * dtype.itemsize or start + stop > len(raw):
        raise ValueError(f"{name}: {entry['shape']} numbers do not fill bytes {first} to {stop}")
    return np.frombuffer(raw, dtype, count, start + first).reshape(entry["shape"])


def check_sizes(sizes: Told) -> None:
    """What memory is made for before any array tells how long it is."""
    odd = {
        name: size for name, size in sizes.items() if type(size) is not int or not 0 <= size <= MOST
    }
    if (
        odd
        or not 1 <= sizes["K"] <= sizes["E"] < 1 << 16
        or not 1 <= sizes["L"] * sizes["E"] <= MOST
    ):
        raise ValueError(f"its sizes are no predictor's: {odd or sizes}")


def reason(error: Exception) -> str:
    return f"{error} is not there" if isinstance(error, KeyError) else str(error)
