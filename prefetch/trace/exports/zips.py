"""An npz written member by member, rows as they come, with the same bytes for the same content. It knows no trace."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

LONG_AGO = (
    1980,
    1,
    1,
    0,
    0,
    0,
)  # the earliest that a zip can say: bytes must not depend on the clock


def add_rows(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    rows: Iterable[NDArray[Any]],
) -> None:
    """An array of a known shape whose rows come in parts."""
    head = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(zipfile.ZipInfo(f"{name}.npy", LONG_AGO), "w", force_zip64=True) as file:
        npy.write_array_header_1_0(file, head)
        for part in rows:
            file.write(np.ascontiguousarray(part, dtype).tobytes())


def add_whole(archive: zipfile.ZipFile, arrays: Mapping[str, NDArray[Any]]) -> None:
    for name, array in arrays.items():
        with archive.open(zipfile.ZipInfo(f"{name}.npy", LONG_AGO), "w") as file:
            npy.write_array(file, array, allow_pickle=False)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """What fits into memory."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        add_whole(archive, arrays)
