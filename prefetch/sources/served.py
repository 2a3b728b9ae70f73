"""Routing that a server returned with its response: JSON lines, arrays inside them, and which rows are whose.

It knows no server's field names. A request of P prompt tokens and G generated ones has P + G - 1 routed rows, because
the last generated token is never fed back. T rows, L layers, K choices.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError, reading
from prefetch.sources.files import whole_ids
from prefetch.sources.textscan import check_inflates
from prefetch.trace.routing import DECODE, NO_TOKEN, PREFILL
from prefetch.zipped import npy_of

AXES = "token, layer, choice"
DTYPES = ("int32", "int16", "uint8", "uint16", "int64")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line that is not blank."""
    found = False
    is_packed = path.suffix == ".gz"
    with reading(path, "JSON lines in UTF-8"):
        if is_packed:
            check_inflates(path)
        opened: Any = gzip.open if is_packed else Path.open
        file = opened(path, "rb")
    with file:
        for number in itertools.count(1):
            with reading(path, "JSON lines in UTF-8"):
                line = file.readline()
            if not line:
                break
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            with reading(where, "one JSON object"):
                value = json.loads(line.decode("utf-8"))
            if not isinstance(value, dict):
                raise FormatError(f"{where}: expected a JSON object, found {type(value).__name__}")
            found = True
            yield where, value
    if not found:
        raise FormatError(f"{path}: expected one JSON object per line, found none")


@dataclass(frozen=True)
class Encoding:
    """How raw base64 is to be read; a .npy, nested lists, and {data, shape, dtype} say it themselves."""

    dtype: str
    n_layers: int | None
    top_k: int | None

    def decode(self, value: Any) -> tuple[NDArray[np.int32], int]:
        """(ids_TLK, how many rows of the prompt were left out before the first)."""
        if isinstance(value, Mapping):
            array = self._raw(value["data"], str(value.get("dtype", self.dtype)))
            return whole_ids(array.reshape(value["shape"]), AXES), int(value.get("start", 0))
        if isinstance(value, str):
            data = base64.b64decode(value, validate=True)
            if data.startswith(b"\x93NUMPY"):
                return whole_ids(npy_of(data), AXES), 0
            if self.n_layers is None or self.top_k is None:
                raise FormatError(
                    "raw base64 does not say its shape: pass source.n_layers=... and source.top_k=..., and "
                    f"source.dtype=... if it is not {self.dtype}"
                )
            raw = self._raw(value, self.dtype).reshape(-1, self.n_layers, self.top_k)
            return whole_ids(raw, AXES), 0
        return whole_ids(np.array(value), AXES), 0

    def _raw(self, data: str, dtype: str) -> NDArray[Any]:
        if dtype not in DTYPES:
            raise FormatError(f"dtype: expected one of {DTYPES}, got {dtype!r}")
        return np.frombuffer(base64.b64decode(data, validate=True), np.dtype(dtype))


@dataclass(frozen=True)
class Served:
    """One request: `arguments` are those of `trace_of`."""

    ids_TLK: NDArray[Any]
    arguments: dict[str, Any]


def place(
    ids_TLK: NDArray[Any],
    *,
    n_prompt: int,
    n_generated: int | None,
    skipped: int = 0,
    n_cached: int = 0,
    tokens: list[int] | None = None,
) -> Served:
    """Which positions the rows have: all but the last token of the request, or the generated ones only.

    `skipped` prompt rows were not returned; the first `n_cached` were answered from the prefix cache.
    """
    if min(n_prompt, n_cached, skipped) < 0:
        raise FormatError(
            f"expected counts of tokens, got {n_prompt} of the prompt, {n_cached} cached, {skipped} not returned"
        )
    first = _first_position(len(ids_TLK), n_prompt, n_generated, skipped)
    position_T = np.arange(first, first + len(ids_TLK))
    arguments: dict[str, Any] = {
        "position_T": position_T,
        "phase_T": np.where(position_T < n_prompt, PREFILL, DECODE),
        "executed_T": position_T >= n_cached,
    }
    if tokens is not None and len(tokens):
        known = np.array(tokens, np.int32)
        at = position_T.clip(max=len(known) - 1)
        arguments["token_T"] = np.where(position_T < len(known), known[at], NO_TOKEN)
    return Served(ids_TLK, arguments)


def _first_position(rows: int, n_prompt: int, n_generated: int | None, skipped: int) -> int:
    if n_generated is None:
        if skipped + rows < n_prompt:
            raise FormatError(f"expected the {n_prompt} prompt rows, got {skipped + rows}")
        return skipped
    whole = n_prompt + n_generated - skipped
    if rows in (whole, whole - 1):
        return skipped
    if rows in (n_generated, n_generated - 1):
        return n_prompt
    raise FormatError(
        f"expected {whole - 1} rows ({n_prompt} prompt + {n_generated} generated tokens - {skipped} left out - the "
        f"last) or {n_generated}, got {rows}"
    )
