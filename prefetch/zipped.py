"""Zips of arrays that anybody may have made (npz, torch's files): data alone, never larger than promised, no bombs.

It knows no meaning of an array.
"""

from __future__ import annotations

import io
import math
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from prefetch.errors import FormatError, reading

MOST_TIMES = 200  # zlib's own limit is 1,032; routing deflates 2 to 8 times
SMALL_BYTES = 64 << 20  # request and phase columns are nearly constant, and may deflate like a bomb


class Header(NamedTuple):
    """What an npy says of itself, before anything is made of it."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, file: IO[bytes], n_bytes: int) -> Header:
        """Read from the beginning of so many bytes, which must hold just what it promises."""
        version, start = npy.read_magic(file), file.tell()
        if version not in ((1, 0), (2, 0)):
            raise FormatError(f"expected version 1 or 2 of the npy format, found {version}")
        n_header = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
        if n_header > n_bytes - file.tell():
            raise FormatError(f"its header ends behind the file, which has {n_bytes:,} bytes")
        file.seek(start)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
        if dtype.hasobject:
            raise FormatError("holds Python objects: refused, because they can run code")
        if not dtype.itemsize or min(shape, default=0) < 0:
            raise FormatError(f"expected numbers, found {list(shape)} of {dtype}")
        promised, there = math.prod(shape) * dtype.itemsize, n_bytes - file.tell()
        if promised != there:
            raise FormatError(
                f"its header promises {promised:,} bytes of {list(shape)} {dtype}, the file has {there:,}"
            )
        return cls(shape, is_fortran, dtype)


def npy_of(data: bytes) -> NDArray[Any]:
    """The array of an npy that came inside something else."""
    file = io.BytesIO(data)
    header = Header.of(file, len(data))
    array = np.frombuffer(data, header.dtype, offset=file.tell())
    return array.reshape(header.shape, order="F" if header.is_fortran else "C")


def names_in(path: Path) -> tuple[str, ...]:
    """The arrays of an npz, by name; one that would inflate like a bomb is refused."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    for entry in entries:
        if entry.file_size > max(SMALL_BYTES, MOST_TIMES * entry.compress_size):
            raise FormatError(
                f"{path}: {entry.filename} would inflate from {entry.compress_size:,} to "
                f"{entry.file_size:,} bytes, more than {MOST_TIMES} times: refused as a zip bomb; "
                "if it is none, save it with numpy.savez"
            )
    return tuple(entry.filename.removesuffix(".npy") for entry in entries)


def whole(path: Path, name: str) -> NDArray[Any]:
    """One array of an npz whose names were asked before."""
    with reading(f"{path}, array {name}", "an array"), ExitStack() as opened:
        member = Member(opened.enter_context(zipfile.ZipFile(path)), name, opened)
        return member.take(member.shape[0] if member.shape else 1)


def check_stored(file: BinaryIO) -> None:
    """A file of torch stores its parts as they are: where one is deflated, or larger than the file, it is a bomb."""
    if not zipfile.is_zipfile(file):
        return  # as torch wrote before 1.6
    n_bytes = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED or part.file_size > n_bytes:
                raise FormatError(
                    f"its part {part.filename} would inflate to {part.file_size:,} bytes: refused, torch deflates none"
                )
    file.seek(0)


class Member:
    """One array of an npz, from its header on: the rows come in order."""

    def __init__(self, archive: zipfile.ZipFile, name: str, opened: ExitStack) -> None:
        entry = archive.getinfo(f"{name}.npy")
        self.file = opened.enter_context(archive.open(entry))
        self.shape, self.is_fortran, self.dtype = Header.of(self.file, entry.file_size)

    def take(self, rows: int) -> NDArray[Any]:
        shape = (rows, *self.shape[1:]) if self.shape else ()
        if self.is_fortran and rows != (self.shape[0] if self.shape else 1):
            raise FormatError("is stored in Fortran order: save it with numpy.ascontiguousarray")
        data = self.file.read(math.prod(shape) * self.dtype.itemsize)
        order = "F" if self.is_fortran else "C"
        return np.frombuffer(data, self.dtype).reshape(shape, order=order)  # type: ignore[call-overload]
