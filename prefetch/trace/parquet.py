"""A trace on disk: `trace.json` and Parquet shards, written and read in constant memory.

One row is one token. Arrays with an axis for layers are fixed-size binary columns, so a column is the array:
nothing is parsed. Ids, weights and what else looks random are stored as they are, because zstd reads random ids at
0.2 GB/s (scripts/bench/bench_trace.py); the few small columns are compressed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prefetch.errors import FormatError, reading
from prefetch.trace.card import ModelCard
from prefetch.trace.columns import binary, codes_of, small_columns, unbinary, whole
from prefetch.trace.packed import check_packed
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import NO_TOKEN, PHASES, RoutingTrace
from prefetch.trace.version import read_json

SCHEMA = "prefetch.trace/1"
GROUP_BYTES = 16 << 20  # a row group is what the reader holds at once
SHARD_BYTES = 256 << 20
WIDE_CODEC = "none"
SMALL = ("request", "position", "phase", "executed", "token", "domain")
WORDS = ("phase", "domain")  # read as who has which: a long one is not unfolded for every row
# column -> (file stem, field of RoutingTrace); every one is FixedSizeBinary
WIDE = {
    "experts": ("tokens", "ids_TLK"),
    "weights": ("tokens", "weights_TLK"),
    "scores": ("scores", "scores_TLM"),
    "score_ids": ("scores", "score_ids_TLM"),
    "gate_inputs": ("gate_inputs", "gate_inputs_TLD"),
    "pre_attention": ("pre_attention", "pre_attention_TLD"),
}


def concat(blocks: list[RoutingTrace]) -> RoutingTrace:
    """Blocks of one trace, one after the other."""
    if len(blocks) == 1:
        return blocks[0]
    arrays: dict[str, Any] = {
        field.name: np.concatenate([getattr(block, field.name) for block in blocks])
        for field in dataclasses.fields(RoutingTrace)
        if isinstance(getattr(blocks[0], field.name), np.ndarray)
    }
    return dataclasses.replace(blocks[0], **arrays)


def wide_columns(trace: RoutingTrace) -> dict[str, NDArray[Any]]:
    return {
        name: getattr(trace, field)
        for name, (_, field) in WIDE.items()
        if getattr(trace, field) is not None
    }


class ShardWriter:
    """Writes rows into numbered Parquet shards, one file per stem, cutting only where `may_cut` allows."""

    def __init__(self, folder: Path, codec: str | None = None) -> None:
        self.folder = folder
        self.codec = codec  # of the wide columns; None: as a trace's
        self.shards: list[dict[str, Any]] = []
        self._files: dict[str, pq.ParquetWriter] = {}
        self._bytes = 0

    def write(self, files: Mapping[str, pa.Table], n_requests: int) -> None:
        if not self._files:
            number = len(self.shards)
            self.shards.append({"number": number, "rows": 0, "requests": 0})
            for stem, table in files.items():
                path = self.folder / f"{stem}-{number:05d}.parquet"
                small = [name for name in table.column_names if name in SMALL]
                codec = {
                    name: "zstd" if name in small else self.codec or WIDE_CODEC
                    for name in table.column_names
                }
                self._files[stem] = pq.ParquetWriter(
                    path,
                    table.schema,
                    compression=codec,
                    use_dictionary=small,
                    write_statistics=small,
                )
        for stem, table in files.items():
            self._files[stem].write_table(table, row_group_size=max(1, table.num_rows))
            self._bytes += table.nbytes
        self.shards[-1]["rows"] += next(iter(files.values())).num_rows
        self.shards[-1]["requests"] += n_requests

    @property
    def is_full(self) -> bool:
        return self._bytes >= SHARD_BYTES

    def close(self) -> None:
        for writer in self._files.values():
            writer.close()
        self._files, self._bytes = {}, 0


class TraceFiles:
    """The rows of a trace on their way to disk; what they mean is checked by `TraceWriter`.

    The same rows give the same bytes, whatever the blocks that they come in: row groups are cut by their size alone,
    and domains are listed as they first occur.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = ShardWriter(folder)
        self._waiting: list[RoutingTrace] = []
        self._waiting_rows = 0
        self._group_rows = 0
        self._last_request = -1
        self._n_named = 0  # domains that the rows on disk have named
        self.domains: tuple[str, ...] = ()
        self.columns: dict[str, list[Any]] = {}

    def append(self, block: RoutingTrace) -> None:
        columns = {
            name: [a.dtype.str, list(a.shape[1:])] for name, a in wide_columns(block).items()
        }
        if self.columns and columns != self.columns:
            raise FormatError(
                f"every block must record the same; first {self.columns}, now {columns}"
            )
        self.columns = columns
        row_bytes = sum(array[:1].nbytes for array in wide_columns(block).values()) + 20
        self._group_rows = max(1, GROUP_BYTES // row_bytes)
        block = self._renamed(block)
        for start in range(0, block.n_tokens, self._group_rows):
            part = block.rows(slice(start, start + self._group_rows))
            self._waiting.append(part)
            self._waiting_rows += part.n_tokens
            if self._waiting_rows >= self._group_rows:
                self._flush()

    def _renamed(self, block: RoutingTrace) -> RoutingTrace:
        """Domains by their numbers in this trace."""
        used, first = np.unique(block.domain_T[block.domain_T >= 0], return_index=True)
        names = [block.domains[code] for code in used[np.argsort(first)].tolist()]
        self.domains += tuple(name for name in names if name not in self.domains)
        codes = np.full(len(block.domains) + 1, -1, np.int32)
        codes[used] = [self.domains.index(block.domains[code]) for code in used.tolist()]
        return dataclasses.replace(block, domain_T=codes[block.domain_T], domains=self.domains)

    def _flush(self) -> None:
        """One row group."""
        whole = concat([dataclasses.replace(part, domains=self.domains) for part in self._waiting])
        block, rest = (whole.rows(rows) for rows in _halves(self._group_rows))
        self._waiting, self._waiting_rows = [rest] * bool(rest.n_tokens), rest.n_tokens
        starts = block.starts_R[block.request_T[block.starts_R] != self._last_request]
        if self._shards.is_full and len(starts):
            if starts[0]:
                self._write(block.rows(slice(0, int(starts[0]))), 0)
            self._shards.close()
            block = block.rows(slice(int(starts[0]), None))
        self._write(block, len(starts))
        self._last_request = int(block.request_T[-1])

    def _write(self, block: RoutingTrace, n_requests: int) -> None:
        self._n_named = max(self._n_named, int(block.domain_T.max()) + 1)
        named = self.domains[: self._n_named]
        files: dict[str, dict[str, pa.Array]] = {"tokens": small_columns(block, named)}
        for name, array in wide_columns(block).items():
            files.setdefault(WIDE[name][0], {})[name] = binary(array)
        self._shards.write({stem: pa.table(columns) for stem, columns in files.items()}, n_requests)

    def close(self, card: ModelCard, provenance: Provenance) -> None:
        if self._waiting:
            self._flush()
        self._shards.close()
        shards = self._shards.shards
        about = {
            "schema": SCHEMA,
            "tokens": sum(shard["rows"] for shard in shards),
            "requests": sum(shard["requests"] for shard in shards),
            "columns": self.columns,
            "domains": list(self.domains),
            "shards": shards,
            "card": card.to_json(),
            "provenance": provenance.to_json(),
        }
        (self.folder / "trace.json").write_text(json.dumps(about, indent=1) + "\n")


def _halves(row: int) -> tuple[slice, slice]:
    return slice(None, row), slice(row, None)


def opened(path: Path) -> pq.ParquetFile:
    about = pq.read_metadata(path)
    words = [word for word in WORDS if word in about.schema.names]
    return pq.ParquetFile(
        path, metadata=about, read_dictionary=words, memory_map=False, pre_buffer=False
    )


class TraceReader:
    """Reads a trace in blocks of whole requests; opening it reads `trace.json` only."""

    first_row = 0  # row groups that end before it are not read
    row_of_first = 0  # of the rows that are read, where the first one stands; known once it is read

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "trace.json"
        if not path.exists() and (self.folder / "counts.json").exists():
            raise FormatError(
                f"{self.folder}: holds counts of experts, not a trace; load_counts reads them, "
                "and of the analyses statistics and expert_load take them"
            )
        self.about = read_json(path, SCHEMA)
        with reading(path, "the description of a trace"):
            self.n_tokens = int(self.about["tokens"])
            self.n_requests = int(self.about["requests"])
            self.domains = tuple(str(name) for name in self.about["domains"])
            self.columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
                str(name): (np.dtype(kind), tuple(int(size) for size in shape))
                for name, (kind, shape) in self.about["columns"].items()
            }
            self.shards = [
                (int(shard["number"]), int(shard["rows"])) for shard in self.about["shards"]
            ]
            self.card = ModelCard.from_json(self.about["card"], str(path))
            self.provenance = Provenance.from_json(self.about["provenance"], str(path))
        if len({number for number, _ in self.shards}) != len(self.shards) or self.n_tokens != sum(
            rows for _, rows in self.shards
        ):
            raise FormatError(
                f"{path}: {self.n_tokens} tokens are not what its shards hold: {self.shards}"
            )
        if any(dtype.kind not in "uf" for dtype, _ in self.columns.values()) or not (
            {"experts"} <= set(self.columns) <= set(WIDE)
        ):
            raise FormatError(
                f"{path}: expected columns of ids and float16 among {', '.join(WIDE)}, found {self.about['columns']}"
            )

    def batches(self, *recorded: str, max_rows: int = 1 << 16) -> Iterator[RoutingTrace]:
        """Blocks of whole requests, about `max_rows` rows each; `recorded` names the optional columns wanted."""
        names = ("experts", *recorded)
        missing = [name for name in names if name not in self.columns]
        if missing:
            raise FormatError(
                f"{self.folder}: this trace has not recorded {missing}; it has {sorted(self.columns)}"
            )
        carry: list[RoutingTrace] = []
        row = 0
        for number, rows in self.shards:
            row += rows
            if row <= self.first_row:
                continue
            for block in self._shard(number, rows, names, max_rows, row - rows):
                last = int(block.starts_R[-1])
                if last == 0 and carry and carry[-1].request_T[-1] == block.request_T[0]:
                    carry.append(block)
                    continue
                if last:
                    yield concat([*carry, block.rows(slice(0, last))])
                elif carry:
                    yield concat(carry)
                carry = [block.rows(slice(last, None))]
        if carry:
            yield concat(carry)

    def load(self, *recorded: str) -> RoutingTrace:
        """The whole trace in memory."""
        blocks = list(self.batches(*recorded))
        if not blocks:
            raise FormatError(f"{self.folder}: the trace has no rows")
        return concat(blocks)

    def beside(self, name: str) -> dict[str, NDArray[Any]]:
        """Arrays that the source kept for the trace as a whole."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            raise FormatError(f"{path}: this trace has no {name}; its source did not record them")
        from safetensors.numpy import load_file

        with reading(path, "arrays as safetensors"):
            return dict(load_file(path))

    def router_weights(self) -> dict[int, NDArray[Any]]:
        """layer number -> [E, D], where gate inputs were recorded."""
        tensors = self.beside("router_weights")
        with reading(self.folder / "router_weights.safetensors", "arrays named layer.NUMBER"):
            return {int(name.removeprefix("layer.")): array for name, array in tensors.items()}

    def _shard(
        self, number: int, rows: int, names: tuple[str, ...], max_rows: int, row: int
    ) -> Iterator[RoutingTrace]:
        wanted: dict[str, list[str]] = {"tokens": list(SMALL)}
        for name in names:
            wanted.setdefault(WIDE[name][0], []).append(name)
        files = {stem: self._open(f"{stem}-{number:05d}.parquet", rows) for stem in wanted}
        for group in range(files["tokens"].num_row_groups):
            row += files["tokens"].metadata.row_group(group).num_rows
            if row <= self.first_row:
                continue
            columns = {
                name: column.combine_chunks()
                for stem, names_here in wanted.items()
                for name, column in self._group(files[stem], group, names_here).items()
            }
            if len({len(column) for column in columns.values()}) != 1:
                raise FormatError(f"{self.folder}, shard {number}: its files have unequal rows")
            block = self._block(columns, names)
            if row - block.n_tokens <= self.first_row:
                self.row_of_first = row - block.n_tokens
            for start in range(0, block.n_tokens, max_rows):
                yield block.rows(slice(start, start + max_rows))
        for file in files.values():
            file.close()

    def _group(
        self, file: pq.ParquetFile, group: int, names: list[str]
    ) -> dict[str, pa.ChunkedArray]:
        with reading(self.folder, f"row group {group} with the columns {names}"):
            table = file.read_row_group(group, columns=names, use_threads=False)
            table.validate(full=True)
            return {name: table.column(name) for name in names}

    def _open(self, name: str, rows: int) -> pq.ParquetFile:
        path = self.folder / name
        with reading(path, "a Parquet shard"):
            file = opened(path)
            check_packed(file.metadata, path)
        if file.metadata.num_rows != rows:
            raise FormatError(
                f"{path}: trace.json promises {rows} rows, found {file.metadata.num_rows}"
            )
        return file

    def small(self) -> Iterator[dict[str, NDArray[Any]]]:
        """What every row has beside its choices, under the names of `RoutingTrace`, row group by row group."""
        for number, rows in self.shards:
            file = self._open(f"tokens-{number:05d}.parquet", rows)
            for group in range(file.num_row_groups):
                found = self._group(file, group, list(SMALL))
                with reading(self.folder, "the columns of a trace"):
                    yield self.small_of({name: c.combine_chunks() for name, c in found.items()})
            file.close()

    def small_of(self, columns: Mapping[str, pa.Array]) -> dict[str, NDArray[Any]]:
        plain = ("request", "position", "executed")
        small = {f"{name}_T": whole(columns[name], name) for name in plain}
        return {
            **small,
            "phase_T": codes_of(columns["phase"], PHASES, "phase").astype(np.uint8),
            "token_T": columns["token"].cast(pa.int32()).fill_null(NO_TOKEN).to_numpy(),
            "domain_T": codes_of(columns["domain"], self.domains, "domain", nullable=True),
        }

    def _block(self, columns: Mapping[str, pa.Array], names: tuple[str, ...]) -> RoutingTrace:
        with reading(self.folder, "the columns of a trace"):
            wide = {WIDE[name][1]: unbinary(columns[name], *self.columns[name]) for name in names}
            small = self.small_of(columns)
            return RoutingTrace(card=self.card, domains=self.domains, **small, **wide)
