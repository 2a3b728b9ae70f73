"""What the end of a Parquet file says of the size of its columns, row group by row group. It reads no column.

Arrow's own door to this from Python ends the process where a file's statistics contradict each other (an exception that
nothing catches; pyarrow 26.0.1). So the few bytes are read here: Thrift's compact protocol, fields numbered as in
parquet.thrift.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefetch.errors import FormatError

MAGIC = b"PAR1"
MOST_DEPTH = 16
ROW_GROUPS, COLUMNS, ROWS, ABOUT, VALUES, COMPRESSED = 4, 1, 3, 3, 5, 7  # numbers of fields
# kinds of fields
BOOLEANS, NUMBERS, LISTS = (1, 2), (4, 5, 6), (9, 10)
TEXT, MAP, STRUCT = 8, 11, 12
WIDTHS = {1: 1, 2: 1, 3: 1, 7: 8}  # of the other kinds


@dataclass(frozen=True)
class Chunk:
    """One column of one row group."""

    n_values: int
    compressed_bytes: int


@dataclass(frozen=True)
class RowGroup:
    n_rows: int
    chunks: list[Chunk]  # by column


def row_groups_of(path: Path) -> list[RowGroup]:
    """As the file says, which may lie."""
    told = _Thrift(_footer(path)).struct()
    try:
        return [_row_group(group) for group in told[ROW_GROUPS]]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: its end does not say how large its columns are") from error


def _row_group(group: dict[int, Any]) -> RowGroup:
    about = [column[ABOUT] for column in group[COLUMNS]]
    return RowGroup(int(group[ROWS]), [Chunk(int(a[VALUES]), int(a[COMPRESSED])) for a in about])


def _footer(path: Path) -> memoryview:
    with path.open("rb") as file:
        n_bytes = file.seek(0, 2)
        file.seek(max(0, n_bytes - 8))
        length, magic = struct.unpack("<I4s", file.read(8).rjust(8, b"\0"))
        if magic != MAGIC or length + 8 > n_bytes:
            raise FormatError(f"{path}: does not end as Parquet does")
        file.seek(n_bytes - 8 - length)
        return memoryview(file.read(length))


class _Thrift:
    """A cursor over the bytes."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Number of the field -> its value."""
        found: dict[int, Any] = {}
        number = 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.integer()
            kind = head & 15
            found[number] = kind == 1 if kind in BOOLEANS else self.value(kind, depth)
        return found

    def value(self, kind: int, depth: int) -> Any:
        if kind in NUMBERS:
            return self.integer()
        if depth > MOST_DEPTH:
            raise FormatError(f"values lie more than {MOST_DEPTH} deep in each other")
        if kind in LISTS:
            return self.items(depth)
        if kind == STRUCT:
            return self.struct(depth + 1)
        if kind == MAP:
            return self.pairs(depth)
        width = WIDTHS.get(kind)
        if kind != TEXT and width is None:
            raise FormatError(f"there is no kind {kind} of field")
        start = self.skip(self.varint() if width is None else width)
        return self.data[start : self.at]

    def items(self, depth: int) -> list[Any]:
        head = self.byte()
        n = self.varint() if head >> 4 == 15 else head >> 4
        self.need(n)
        return [self.value(head & 15, depth + 1) for _ in range(n)]

    def pairs(self, depth: int) -> list[tuple[Any, Any]]:
        n = self.varint()
        kinds = self.byte() if n else 0
        self.need(n)
        return [self._pair(kinds, depth + 1) for _ in range(n)]

    def _pair(self, kinds: int, depth: int) -> tuple[Any, Any]:
        return self.value(kinds >> 4, depth), self.value(kinds & 15, depth)

    def byte(self) -> int:
        self.need(1)
        self.at += 1
        return self.data[self.at - 1]

    def skip(self, n_bytes: int) -> int:
        """Where it was."""
        self.need(n_bytes)
        self.at += n_bytes
        return self.at - n_bytes

    def need(self, n_bytes: int) -> None:
        if n_bytes > len(self.data) - self.at:
            raise FormatError("ends before what it promises")

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise FormatError("a number of more than 64 bits")

    def integer(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)
