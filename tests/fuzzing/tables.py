"""Changes of Parquet files that stay Parquet: a column of another type, with nulls, longer, gone; its footer."""

from __future__ import annotations

import io
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fuzzing import odd
from fuzzing.plain import LARGEST, bytewise

LARGEST_ROWS = 2000
CODECS = ("none", "snappy", "zstd", "gzip", "brotli")
KINDS = (
    pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(),
    pa.bool_(),
    pa.string(), pa.binary(), pa.binary(3), pa.date32(), pa.timestamp("ns"), pa.decimal128(30, 3), pa.null(),
    pa.list_(pa.int32()), pa.list_(pa.int32(), 3), pa.struct([("a", pa.int32())]), pa.large_string(),
)  # fmt: skip


def parquet(data: bytes, rng: Random) -> bytes:
    how = rng.random()
    if how < 0.25:
        return bytewise(data, rng)
    if how < 0.45:
        return _footer(data, rng)
    try:
        with pq.ParquetFile(io.BytesIO(data)) as file:
            if file.metadata.num_rows > LARGEST_ROWS or file.metadata.num_columns == 0:
                return bytewise(data, rng)
            table = file.read()
        table.validate(full=True)
        return rewritten(_changed(table, rng), rng)
    except (pa.ArrowException, ValueError, TypeError, OSError, MemoryError, OverflowError):
        return bytewise(data, rng)


def _footer(data: bytes, rng: Random) -> bytes:
    """The description at the end: schema, sizes, offsets."""
    if len(data) < 12:
        return bytewise(data, rng)
    length = int.from_bytes(data[-8:-4], "little")
    start = max(4, len(data) - 8 - length)
    footer = bytewise(data[start:-8], rng)
    size = len(footer) if rng.random() < 0.9 else rng.choice(odd.SIZES) % (1 << 32)
    return (data[:start] + footer + size.to_bytes(4, "little") + b"PAR1")[:LARGEST]


def _changed(table: Any, rng: Random) -> Any:
    name = rng.choice(table.column_names)
    at, how = table.column_names.index(name), rng.randrange(9)
    if how == 0:
        return table.drop_columns([name])
    if how == 1:
        return table.rename_columns(
            [
                rng.choice(odd.TEXTS)[:99].encode("utf-8", "replace").decode() if n == name else n
                for n in table.column_names
            ]
        )
    if how == 2:
        return table.slice(rng.randrange(table.num_rows + 1), rng.choice((0, 1, table.num_rows)))
    if how == 3:
        return pa.concat_tables([table, table.slice(0, rng.randrange(table.num_rows + 1))])
    if how == 4:
        return table.append_column(name if rng.random() < 0.5 else "layer", table.column(name))
    if how == 5:
        order = np.array(rng.sample(range(table.num_rows), table.num_rows), np.int64)
        return table.take(pa.array(order))
    column = table.column(name)
    if how == 6:
        return table.set_column(at, name, column.cast(rng.choice(KINDS), safe=False))
    values = column.to_pylist()
    if how == 7:
        values[rng.randrange(len(values))] = None
        return table.set_column(at, name, pa.array(values, column.type))
    return table.set_column(at, name, _values(values, column.type, rng))


def _values(values: list[Any], kind: Any, rng: Random) -> Any:
    """One value of the column is another; the type stays where it can hold it."""
    at = rng.randrange(len(values))
    old = values[at]
    if isinstance(old, list) and old:
        inner = rng.randrange(len(old))
        values[at] = rng.choice(
            (old[:-1], old + old, [*old[:inner], rng.choice(odd.NUMBERS), *old[inner + 1 :]], [])
        )
    elif isinstance(old, bytes):
        values[at] = bytewise(old, rng)[: len(old)].ljust(len(old), b"\x00")
    elif isinstance(old, str):
        values[at] = rng.choice(odd.TEXTS).encode("utf-8", "replace").decode()
    else:
        values[at] = rng.choice(odd.NUMBERS)
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return pa.array(values)


def rewritten(table: Any, rng: Random) -> bytes:
    """In another codec, with other row groups, with Arrow's own schema or without it."""
    if rng.random() < 0.1:
        metadata = {b"pandas": rng.randbytes(9), b"ARROW:schema": rng.randbytes(40)}
        table = table.replace_schema_metadata(metadata)
    sink = io.BytesIO()
    pq.write_table(
        table, sink, compression=rng.choice(CODECS), row_group_size=rng.choice((1, 7, 10_000)),
        use_dictionary=rng.random() < 0.5, store_schema=rng.random() < 0.7,
        data_page_version=rng.choice(("1.0", "2.0")),
    )  # fmt: skip
    return sink.getvalue()[:LARGEST]
