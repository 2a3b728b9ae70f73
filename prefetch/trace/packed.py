"""Parquet whose few bytes unfold into far more than the file: a run of one value is a bomb as a zip of zeros is.

It reads what a file says of its columns, and of texts which there are and how often.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefetch.errors import FormatError
from prefetch.trace.footer import row_groups_of

MOST_TIMES = 200  # as of an npz
SMALL_BYTES = 64 << 20
CELL_BYTES = 8
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


def check_table(path: Path, most_bytes: int) -> None:
    """A table that is read as a whole: how much its values would be, all of them."""
    with pq.ParquetFile(path) as file:
        check_packed(file.metadata, path)
        n_bytes = file.metadata.num_rows * file.metadata.num_columns * CELL_BYTES
        texts = [field.name for field in file.schema_arrow if is_text(field.type)]
    for name in texts if n_bytes <= most_bytes else ():
        column = pq.read_table(path, columns=[name], read_dictionary=[name]).column(name)
        n_bytes += sum(text_bytes(chunk) for chunk in column.chunks)
    if n_bytes > most_bytes:
        raise FormatError(f"{path}: unfolds to more than {most_bytes:,} bytes: refused as a bomb")


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(
        getattr(pa.types, f"is_{name}")(kind)
        for name in ("string", "large_string", "binary", "large_binary")
    )


def text_bytes(column: pa.DictionaryArray) -> int:
    """Of all rows, of which many may share what is there once."""
    lengths = pc.binary_length(column.dictionary).cast(pa.int64())
    return int(pc.sum(lengths.take(column.indices)).as_py() or 0)
