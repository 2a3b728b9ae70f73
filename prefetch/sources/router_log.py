"""JSON lines `{layer, token_idx, topk_ids, topk_weights}` as patches of vLLM's MoE layer write them.

One line is one row of one layer. `token_idx` counts the rows of a forward pass, which holds many requests at once: it
is no position in a sequence. Warm-up and graph capture run dummy batches whose rows are all the same;
they may come at any time and are left out. It knows no server and no model. T rows, L layers, K choices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError, reading
from prefetch.sources.columns import dense

BLOCK_BYTES = 64 << 20
REQUIRED = ("layer", "token_idx", "topk_ids")
FIRST = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\{|\Z)")  # a null there ends Arrow's process
MOST_DEPTH = 64  # brackets in a row, or in its texts
OPENS, CLOSES = np.zeros(256, np.int8), np.zeros(256, np.int8)
OPENS[list(b"[{")] = CLOSES[list(b"]}")] = 1
DUMMY_ROWS = 8  # so many equal rows, weights included, are no text


@dataclass(frozen=True)
class Log:
    """One file, without its dummy batches."""

    path: Path
    layer_numbers: tuple[int, ...]
    ids_TLK: NDArray[np.int32]
    weights_TLK: NDArray[np.float32] | None
    pass_T: NDArray[np.int64]
    n_dummy: int


def is_log(path: Path) -> bool:
    """Are the first lines rows of such a log, or a description and then rows?"""
    if path.suffix != ".jsonl":
        return False
    with reading(path, "JSON lines in UTF-8"), path.open("rb") as file:
        for line in (file.readline(1 << 16) for _ in range(2)):
            try:
                value = json.loads(line)
            except ValueError:  # a longer response, or no JSON: the other reader judges it
                return False
            if isinstance(value, dict) and "topk_ids" in value:
                return True
    return False


def read_log(path: Path) -> Log:
    """The rows of every layer side by side: the i-th of each layer is the same token."""
    blocks = list(_blocks(path))
    with reading(path, "rows {layer, token_idx, topk_ids}"):
        columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        layers, order = _aligned(columns["layer"], columns["token_idx"])
        row_T = columns["token_idx"][order[:, 0]]
        starts_T = np.diff(row_T, prepend=row_T[0] + 1) <= 0
        ids_TLK, weights = columns["topk_ids"][order], columns.get("topk_weights")
        weights_TLK = None if weights is None else weights[order]
        keep_T, pass_T = ~_dummies(ids_TLK, weights_TLK, starts_T), np.cumsum(starts_T) - 1
        return Log(
            path,
            layers,
            ids_TLK[keep_T],
            None if weights_TLK is None else weights_TLK[keep_T],
            pass_T[keep_T],
            int((~keep_T).sum()),
        )


def _aligned(
    layer_N: NDArray[Any], token_N: NDArray[Any]
) -> tuple[tuple[int, ...], NDArray[np.int64]]:
    """(layer numbers, [T, L] where in the log the rows of every token stand)."""
    layers, counts = np.unique(layer_N, return_counts=True)
    if len(set(counts.tolist())) != 1:
        pairs = dict(zip(layers.tolist(), counts.tolist(), strict=True))
        raise FormatError(
            f"expected as many rows in every layer, got {pairs} (layer: rows); the log lost rows, and which rows "
            "belong together cannot be known"
        )
    order = np.argsort(layer_N, kind="stable").reshape(len(layers), -1).T
    row_TL = token_N[order]
    if (different := (row_TL != row_TL[:, :1]).any(axis=1)).any():
        row = int(different.argmax())
        raise FormatError(
            f"row {row} is token_idx {row_TL[row].tolist()} in layers {layers.tolist()}: not the same token"
        )
    return tuple(layers.tolist()), order


def _dummies(
    ids_TLK: NDArray[Any], weights_TLK: NDArray[Any] | None, starts_T: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Rows of passes that consist of one row again and again, and of short passes of that same row."""
    starts = np.flatnonzero(starts_T)
    sizes = np.diff(np.append(starts, len(ids_TLK)))
    repeats_T, first_PF = np.ones(len(ids_TLK), bool), np.zeros((len(starts), 0))
    for array in (ids_TLK, weights_TLK):
        if array is not None:
            repeats_T[1:] &= (array[1:] == array[:-1]).all(axis=(1, 2))
            first_PF = np.append(first_PF, array[starts].reshape(len(starts), -1), axis=1)
    constant_P = np.logical_and.reduceat(repeats_T | starts_T, starts)
    _, kind_P = np.unique(first_PF, axis=0, return_inverse=True)
    is_dummy = np.isin(kind_P, kind_P[constant_P & (sizes >= DUMMY_ROWS)])
    return np.repeat(constant_P & is_dummy, sizes)


def _blocks(path: Path) -> Iterator[dict[str, NDArray[Any]]]:
    line = 1
    with path.open("rb") as file:
        while text := file.read(BLOCK_BYTES):
            text += file.readline()
            with reading(f"{path}, lines from {line}", "rows {layer, token_idx, topk_ids}"):
                block = _parsed(text)
            if block:
                yield block
            line += text.count(b"\n")


def _parsed(text: bytes) -> dict[str, NDArray[Any]]:
    """Whole lines as columns."""
    import pyarrow as pa
    from pyarrow import json as pj

    if not FIRST.match(text):
        raise FormatError("expected one JSON object per line")
    _check_depth(text)
    ids, weights = pa.list_(pa.int32()), pa.list_(pa.float32())
    kinds = {"layer": pa.int32(), "token_idx": pa.int64(), "topk_ids": ids, "topk_weights": weights}
    table = pj.read_json(
        pa.BufferReader(text),
        read_options=pj.ReadOptions(block_size=len(text) + 1, use_threads=False),
        parse_options=pj.ParseOptions(
            explicit_schema=pa.schema(kinds), unexpected_field_behavior="ignore"
        ),
    )
    table = table.filter(table.column("topk_ids").is_valid())  # a description is no row
    names = [name for name in kinds if len(table) and not table.column(name).null_count]
    if len(table) and set(REQUIRED) - set(names):
        raise FormatError(f"expected {', '.join(REQUIRED)} in every row, found {names}")
    return {name: dense(table.column(name).combine_chunks(), name) for name in names}


def _check_depth(text: bytes) -> None:
    """Arrow's parser calls itself for every bracket: a line of a hundred thousand would end the process."""
    data = np.frombuffer(text, np.uint8)
    begins = np.append(0, np.flatnonzero(data[:-1] == ord("\n")) + 1)
    opened_R = np.add.reduceat(OPENS[data], begins, dtype=np.int32)
    for row in np.flatnonzero(opened_R > MOST_DEPTH).tolist():
        line = data[begins[row] : begins[row + 1] if row + 1 < len(begins) else None]
        deepest = np.cumsum(OPENS[line] - CLOSES[line], dtype=np.int32).max()
        if deepest > MOST_DEPTH:
            raise FormatError(f"expected rows of plain values, found brackets {deepest} deep")
