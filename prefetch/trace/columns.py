"""Columns of Arrow as arrays and back: fixed-size binaries that are arrays, and the few small columns of a trace.

It knows no file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.trace.routing import NO_TOKEN, PHASES, RoutingTrace


def binary(array: NDArray[Any]) -> pa.Array:
    """[T, ...] as a column of T fixed-size binaries, without a copy."""
    width = array[0].nbytes if len(array) else array.itemsize * int(np.prod(array.shape[1:]))
    flat = np.ascontiguousarray(array)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(array), [None, pa.py_buffer(flat)]
    )


def unbinary(column: pa.Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The inverse of `binary`: a view of the column's buffer."""
    width = dtype.itemsize * int(np.prod(shape))
    if not pa.types.is_fixed_size_binary(column.type) or column.type.byte_width != width:
        raise FormatError(
            f"expected a column of {width} bytes a row ({dtype} {list(shape)}), found {column.type}"
        )
    if column.null_count:
        raise FormatError(f"expected no nulls, found {column.null_count}")
    view = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
    return view.view(dtype).reshape(len(column), *shape)


def small_columns(trace: RoutingTrace, domains: tuple[str, ...]) -> dict[str, pa.Array]:
    domain = pa.array(trace.domain_T, mask=trace.domain_T < 0)
    return {
        "request": pa.array(trace.request_T),
        "position": pa.array(trace.position_T),
        "phase": pa.DictionaryArray.from_arrays(
            pa.array(trace.phase_T.astype(np.int8)), list(PHASES)
        ),
        "executed": pa.array(trace.executed_T),
        "token": pa.array(trace.token_T, mask=trace.token_T == NO_TOKEN),
        "domain": pa.DictionaryArray.from_arrays(domain, pa.array(list(domains), pa.string())),
    }


def whole(column: pa.Array, name: str) -> NDArray[Any]:
    """A small column without gaps, in the type of the schema."""
    if column.null_count:
        raise FormatError(f"column {name}: expected no nulls, found {column.null_count}")
    kind = pa.bool_() if name == "executed" else pa.int32()
    return column.cast(kind).to_numpy(zero_copy_only=False)


def codes_of(
    column: pa.Array, names: tuple[str, ...], what: str, *, nullable: bool = False
) -> NDArray[np.int32]:
    """Index of every value in `names`, whatever order the writer's own dictionary has; -1 for null."""
    if not pa.types.is_dictionary(column.type):
        column = column.cast(pa.string()).dictionary_encode()
    known = {name: code for code, name in enumerate(names)}
    own = [known.get(value, -2) for value in column.dictionary.to_pylist()]
    codes = np.array([*own, -1 if nullable else -2], np.int32)
    codes_T = codes[column.indices.fill_null(len(own)).to_numpy(zero_copy_only=False)]
    if (codes_T == -2).any():
        raise FormatError(
            f"column {what}: expected one of {names}, found {column.dictionary.to_pylist()}"
        )
    return codes_T
