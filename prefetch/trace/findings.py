"""Everything that is wrong with a folder of a trace, or of counts: one finding per fault, with its file and row.

The readers stop at the first fault; whoever was sent a folder wants the list. It mends nothing and knows no stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prefetch.errors import FormatError, PrefetchError
from prefetch.manifest import MANIFEST, read_manifest, sha256_of
from prefetch.trace.checks import RowChecks
from prefetch.trace.columns import unbinary
from prefetch.trace.counts import load_counts
from prefetch.trace.packed import check_packed
from prefetch.trace.parquet import SMALL, WIDE, TraceReader, opened
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.row_findings import Columns, RowFindings

ONE_LINE = 300  # characters of a message of somebody else


@dataclass(frozen=True)
class Finding:
    """`row` counts in the file, from 0; None = the file as a whole. What is no damage deserves a look."""

    file: str
    row: int | None
    what: str
    is_damage: bool = True

    def line(self) -> str:
        place = self.file if self.row is None else f"{self.file}, row {self.row}"
        return f"{'damaged' if self.is_damage else 'look at'}  {place}: {self.what}"


def findings(folder: Path | str) -> Iterator[Finding]:
    """In this order: the seal, the description, the shards, then what only whole requests tell."""
    place = Path(folder)
    yield from _of_seal(place)
    if (place / "counts.json").is_file() and not (place / "trace.json").exists():
        yield from _of_counts(place)
        return
    try:
        reader = TraceReader(place)
    except PrefetchError as error:
        yield Finding("trace.json", None, _one_line(error, place))
        return
    if not reader.n_tokens:
        yield Finding("trace.json", None, "the trace has no rows")
    is_damaged = False
    for found in _of_shards(reader):
        is_damaged |= found.is_damage
        yield found
    if is_damaged:
        yield Finding(
            "trace.json",
            None,
            "not looked at, because rows are damaged: evenness of requests, copied layers, repeated requests",
            is_damage=False,
        )
        return
    yield from _of_requests(reader)


def _of_counts(folder: Path) -> Iterator[Finding]:
    try:
        load_counts(folder)
    except PrefetchError as error:
        yield Finding("counts.json", None, _one_line(error, folder))


def _of_seal(folder: Path) -> Iterator[Finding]:
    """Every file is what the store sealed; files that it did not seal are named."""
    if not (folder / MANIFEST).is_file():
        return
    try:
        files: Mapping[str, Any] = read_manifest(folder)["files"]
    except PrefetchError as error:
        yield Finding(MANIFEST, None, _one_line(error, folder))
        return
    for name, sealed in files.items():
        path = folder / name
        if not path.is_file():
            yield Finding(name, None, "is missing; the manifest lists it")
        elif path.stat().st_size != sealed["bytes"]:
            yield Finding(
                name,
                None,
                f"has {path.stat().st_size:,} bytes, the manifest says {sealed['bytes']:,}",
            )
        elif sha256_of(path) != sealed["sha256"]:
            yield Finding(name, None, "its sha256 differs from the manifest: bytes were changed")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if name not in files and name != MANIFEST:
            yield Finding(name, None, "is not in the manifest", is_damage=False)


def _of_shards(reader: TraceReader) -> Iterator[Finding]:
    """What every file and every row must hold by itself."""
    rows, is_whole = RowFindings(reader.card), True
    stems: dict[str, list[str]] = {"tokens": list(SMALL)}
    for column in reader.columns:
        if fault := _shape_fault(reader, column):
            yield Finding("trace.json", None, f"column {column} {fault}")
            is_whole = False
        else:
            stems.setdefault(WIDE[column][0], []).append(column)
    if "experts" not in reader.columns:
        yield Finding("trace.json", None, "the column experts is missing: there is no routing")
    for number, n_rows in reader.shards:
        for stem, names in stems.items():
            for found in _groups(reader, f"{stem}-{number:05d}.parquet", n_rows, names):
                if isinstance(found, Finding):
                    is_whole = False
                    yield found
                else:
                    yield from _of_rows(rows, *found)
    if is_whole and rows.n_requests != reader.n_requests:
        what = f"promises {reader.n_requests} requests, the shards hold {rows.n_requests}"
        yield Finding("trace.json", None, what)


def _shape_fault(reader: TraceReader, column: str) -> str:
    """Nothing, where it can be read as a column of this model."""
    if column not in WIDE:
        return f"is none of {sorted(WIDE)}"
    shape, card = reader.columns[column][1], reader.card
    is_of_k = column in ("experts", "weights")
    if len(shape) == 2 and shape[0] == card.n_layers and (not is_of_k or shape[1] == card.top_k):
        return ""
    return f"holds {list(shape)} per token, the model has {card.n_layers} layers, top {card.top_k}"


def _of_rows(rows: RowFindings, file: str, first: int, columns: Columns) -> Iterator[Finding]:
    for row, what, is_damage in rows.of(columns):
        yield Finding(file, first + row, what, is_damage)


def _groups(
    reader: TraceReader, name: str, n_rows: int, names: list[str]
) -> Iterator[tuple[str, int, Columns] | Finding]:
    """(file, first row, columns) of every row group; a finding in the place of what cannot be read."""
    path = reader.folder / name
    try:
        file = opened(path)
        check_packed(file.metadata, path)
    except Exception as error:  # damaged bytes meet Arrow with whatever it likes
        yield Finding(name, None, f"cannot be opened: {_one_line(error, path)}")
        return
    with file:
        if file.metadata.num_rows != n_rows:
            what = f"has {file.metadata.num_rows} rows, trace.json promises {n_rows}"
            yield Finding(name, None, what)
        first = 0
        for group in range(file.num_row_groups):
            try:
                yield name, first, _columns(reader, file, group, names)
            except Exception as error:
                yield Finding(name, first, f"row group {group}: {_one_line(error, path)}")
            first += file.metadata.row_group(group).num_rows


def _columns(
    reader: TraceReader, file: pq.ParquetFile, group: int, names: list[str]
) -> dict[str, NDArray[Any]]:
    table = file.read_row_group(group, columns=names, use_threads=False)
    table.validate(full=True)
    if missing := set(names) - set(table.column_names):
        raise FormatError(f"lacks the columns {sorted(missing)}")
    columns = {name: table.column(name).combine_chunks() for name in names}
    wide = {n: unbinary(columns.pop(n), *reader.columns[n]) for n in names if n in WIDE}
    return {**(reader.small_of(columns) if columns else {}), **wide}


def _of_requests(reader: TraceReader) -> Iterator[Finding]:
    """What only whole requests, or the whole trace, can tell: the checks of a fresh recording, request by request."""
    checks = RowChecks(reader.card, suspects=reader.provenance.kind == "real")
    firsts = np.cumsum([0, *(rows for _, rows in reader.shards)])
    recorded = [name for name in ("weights", "scores", "score_ids") if name in reader.columns]
    row = 0
    for block in reader.batches(*recorded):
        for part in _requests(block):
            shard = int(np.searchsorted(firsts, row, side="right")) - 1
            file, here = f"tokens-{reader.shards[shard][0]:05d}.parquet", row - int(firsts[shard])
            try:
                checks.add(part, file, here)
            except FormatError as error:
                yield Finding(file, here, _one_line(error, f"{file}, "))
            row += part.n_tokens
    try:
        checks.finish(reader.card.layer_numbers, "tokens")
    except FormatError as error:
        yield Finding("trace.json", None, _one_line(error, "tokens: "))
    for n, what in (
        (checks.duplicate_requests, "requests repeat another one choice by choice"),
        (checks.requests_with_gaps, "requests have gaps in their positions"),
    ):
        if n:
            yield Finding("trace.json", None, f"{n} {what}", is_damage=False)


def _requests(block: RoutingTrace) -> Iterator[RoutingTrace]:
    starts = [*block.starts_R.tolist(), block.n_tokens]
    for start, stop in itertools.pairwise(starts):
        yield block.rows(slice(start, stop))


def _one_line(error: Exception, known: Path | str) -> str:
    """Without the place, which the finding names already."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (
        text.replace(f"{known}/", "").replace(f"{known}: ", "").removeprefix(str(known))[:ONE_LINE]
    )
