"""A trace as plain arrays: npz, or one flat Parquet file, with a row per token. `source=arrays` reads both back.

It knows no tool that reads them. -1 means no expert and no token; the description of the trace goes along as JSON.
T tokens, L layers, K choices.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prefetch.progress import Progress
from prefetch.trace.beside import names_beside
from prefetch.trace.card import ModelCard
from prefetch.trace.describe import Description
from prefetch.trace.exports.zips import add_rows, add_whole
from prefetch.trace.parquet import WIDE, TraceReader
from prefetch.trace.routing import PHASES, RoutingTrace, no_expert

LONG_AGO = (
    1980,
    1,
    1,
    0,
    0,
    0,
)  # the earliest that a zip can say: bytes must not depend on the clock
READ_BACK = ("experts", "weights")  # by source=arrays, beside the small columns
SMALL = {"request": "request_T", "position": "position_T", "phase": "phase_T"}
SMALL |= {"token": "token_T", "executed": "executed_T"}


@dataclass(frozen=True)
class Member:
    """One array: its name in the file, and where its rows come from."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # of a row
    rows: Callable[[], Iterator[NDArray[Any]]]


def write_npz(reader: TraceReader, path: Path, columns: list[str]) -> None:
    """Member by member, each in one pass; nothing is held whole."""
    members = [*_small_members(reader), *_wide_members(reader, columns)]
    n_rows = reader.n_tokens
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
        Progress("writing", len(members) * n_rows, "rows") as progress,
    ):
        for member in members:
            counted = _counted(member.rows(), progress)
            add_rows(archive, member.name, member.dtype, (n_rows, *member.shape), counted)
        add_whole(archive, _whole(reader))


def _counted(rows: Iterator[NDArray[Any]], progress: Progress) -> Iterator[NDArray[Any]]:
    for part in rows:
        yield part
        progress.advance(len(part))


def _whole(reader: TraceReader) -> dict[str, NDArray[Any]]:
    """Arrays without an axis for rows."""
    return {
        "layer_ids": np.array(reader.card.layer_numbers, np.int64),
        "about": np.array(about(reader)),
    }


def about(reader: TraceReader) -> str:
    told = {"card": reader.card.to_json(), "provenance": reader.provenance.to_json()}
    return json.dumps(told, sort_keys=True)


def _small_members(reader: TraceReader) -> Iterator[Member]:
    for name, field in SMALL.items():
        kind = {"phase": np.uint8, "executed": np.bool_}.get(name, np.int32)

        def rows(field: str = field) -> Iterator[NDArray[Any]]:
            return (small[field] for small in reader.small())

        yield Member(name, np.dtype(kind), (), rows)
    if reader.domains:
        names = np.array([*reader.domains, ""])  # -1 is the last: no domain
        yield Member(
            "domain", names.dtype, (), lambda: (names[s["domain_T"]] for s in reader.small())
        )


def _wide_members(reader: TraceReader, columns: list[str]) -> Iterator[Member]:
    for column in ("experts", *columns):
        dtype, shape = reader.columns[column]
        is_ids, field = column in ("experts", "score_ids"), WIDE[column][1]

        def rows(column: str = column, field: str = field) -> Iterator[NDArray[Any]]:
            # ids without scores are no block: both are read where one is asked for
            wanted = {"score_ids": ["scores", "score_ids"], "experts": []}.get(column, [column])
            if column == "scores" and "score_ids" in reader.columns:
                wanted = ["scores", "score_ids"]
            for block in reader.batches(*wanted):
                array = getattr(block, field)
                yield signed(array, reader.card) if column in ("experts", "score_ids") else array

        yield Member(
            "expert_ids" if column == "experts" else column,
            id_kind(reader.card) if is_ids else dtype,
            shape,
            rows,
        )


def id_kind(card: ModelCard) -> np.dtype[Any]:
    return np.dtype(np.int16 if card.n_experts < 2**15 else np.int32)


def signed(ids: NDArray[Any], card: ModelCard) -> NDArray[Any]:
    """Ids with -1 for no expert."""
    wider = ids.astype(id_kind(card))
    wider[ids == no_expert(card.n_experts)] = -1
    return wider


def write_parquet(reader: TraceReader, path: Path, columns: list[str]) -> None:
    """One pass; float16 becomes float32, which more tools read."""
    writer: pq.ParquetWriter | None = None
    with Progress("writing", reader.n_tokens, "tokens") as progress:
        for block in reader.batches(*columns):
            table = _table(reader, block, columns)
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            progress.advance(block.n_tokens)
    assert writer is not None, "a trace has rows"
    writer.close()


def _table(reader: TraceReader, block: RoutingTrace, columns: list[str]) -> pa.Table:
    arrays: dict[str, pa.Array] = {
        name: pa.array(getattr(block, field)) for name, field in SMALL.items() if name != "phase"
    }
    phase = pa.array(block.phase_T.astype(np.int8))
    arrays["phase"] = pa.DictionaryArray.from_arrays(phase, list(PHASES))
    if reader.domains:
        codes = np.where(block.domain_T < 0, len(reader.domains), block.domain_T)
        arrays["domain"] = pa.DictionaryArray.from_arrays(codes, [*reader.domains, ""])
    numbers = np.array(reader.card.layer_numbers)
    numbers = numbers.astype(np.int16 if numbers.max() < 2**15 else np.int64)
    arrays["layer_ids"] = nested(np.broadcast_to(numbers, (block.n_tokens, len(numbers))))
    arrays["expert_ids"] = nested(signed(block.ids_TLK, reader.card))
    for column in columns:
        array = getattr(block, WIDE[column][1])
        is_ids = column == "score_ids"
        arrays[column] = nested(signed(array, reader.card) if is_ids else array.astype(np.float32))
    return pa.table(arrays, metadata={"prefetch": about(reader)})


def nested(array: NDArray[Any]) -> pa.Array:
    """[T, ...] as lists of lists of one length."""
    column = pa.array(np.ascontiguousarray(array).ravel())
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, int(size))
    return column


def cannot(reader: TraceReader, told: Description, columns: list[str]) -> list[str]:
    """What does not come back through source=arrays, a line each."""
    n_experts = reader.card.n_experts
    lines = [
        f"read back with source=arrays source.path=... source.n_experts={n_experts}; the model card and the "
        "provenance are in the file under `about`, which source=arrays does not read: pass source.model_card=..."
    ]
    if told.n_not_executed:
        lines.append(
            f"{told.n_not_executed} rows were not executed: the array `executed` says so, source=arrays reads them as "
            "executed"
        )
    if not reader.domains:
        lines.append("no domains: read back, the file's name becomes the domain")
    elif n := int(told.rows_DP[-1].sum()):
        lines.append(f"{n} rows have no domain: written as an empty name")
    if unread := [name for name in columns if name not in READ_BACK]:
        lines.append(f"written, but not read back by source=arrays: {', '.join(unread)}")
    if len(set(reader.card.layer_stacks)) > 1:
        lines.append("two stacks: which layers are the encoder's is only in `about`")
    lines += [f"left out: {name}, which stands beside the rows" for name in names_beside(reader)]
    return lines
