"""Parquet whose few bytes unfold into far more than the file: a run of one value is a bomb as a zip of zeros is.

It reads what a file says of its columns, and no column.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefetch.errors import FormatError
from prefetch.trace.footer import row_groups_of

MOST_TIMES = 200  # as of an npz
SMALL_BYTES = 64 << 20
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


def check_packed(metadata: Any, path: Path) -> None:
    """Lists and arrays of every row group; a plain column is read in blocks, or has as many rows as these."""
    columns = [metadata.schema.column(at) for at in range(metadata.num_columns)]
    widths = {
        at: WIDTHS.get(column.physical_type, max(1, column.length))
        for at, column in enumerate(columns)
        if column.max_repetition_level or column.physical_type == "FIXED_LEN_BYTE_ARRAY"
    }
    for group in row_groups_of(path):
        if len(group.chunks) != len(columns):
            raise FormatError(f"{path}: {len(columns)} columns, {len(group.chunks)} in a row group")
        for at, width in widths.items():
            chunk = group.chunks[at]
            n_bytes = max(chunk.n_values, group.n_rows) * width
            if n_bytes > max(SMALL_BYTES, MOST_TIMES * chunk.compressed_bytes):
                raise FormatError(
                    f"{path}: column {columns[at].path} would unfold from {chunk.compressed_bytes:,} to "
                    f"{n_bytes:,} bytes in one row group, more than {MOST_TIMES} times: refused as a bomb; if it is "
                    "none, write it without a dictionary and without compression, or in smaller row groups"
                )
