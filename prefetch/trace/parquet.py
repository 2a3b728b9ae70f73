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
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import NO_TOKEN, PHASES, RoutingTrace

SCHEMA = "prefetch.trace/1"
GROUP_BYTES = 16 << 20  # a row group is what the reader holds at once
SHARD_BYTES = 256 << 20
WIDE_CODEC = "none"
SMALL = ("request", "position", "phase", "executed", "token", "domain")
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


def _small_columns(trace: RoutingTrace, domains: tuple[str, ...]) -> dict[str, pa.Array]:
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


class ShardWriter:
    """Writes rows into numbered Parquet shards, one file per stem, cutting only where `may_cut` allows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
                    name: "zstd" if name in small else WIDE_CODEC for name in table.column_names
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
    """The rows of a trace on their way to disk; what they mean is checked by `TraceWriter`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = ShardWriter(folder)
        self._waiting: list[RoutingTrace] = []
        self._waiting_bytes = 0
        self._last_request = -1
        self.domains: tuple[str, ...] = ()
        self.columns: dict[str, list[Any]] = {}

    def append(self, block: RoutingTrace) -> None:
        columns = {
            name: [a.dtype.str, list(a.shape[1:])] for name, a in wide_columns(block).items()
        }
        if self.columns and columns != self.columns:
            raise FormatError(
                f"{self.folder}: every block must record the same; first {self.columns}, now {columns}"
            )
        self.columns = columns
        new = tuple(name for name in block.domains if name not in self.domains)
        self.domains += new
        codes = np.array([self.domains.index(name) for name in block.domains] + [-1], np.int32)
        block = dataclasses.replace(block, domain_T=codes[block.domain_T], domains=self.domains)
        row_bytes = sum(array[:1].nbytes for array in wide_columns(block).values()) + 20
        step = max(1, GROUP_BYTES // row_bytes)
        for start in range(0, block.n_tokens, step):
            part = block.rows(slice(start, start + step))
            self._waiting.append(part)
            self._waiting_bytes += part.n_tokens * row_bytes
            if self._waiting_bytes >= GROUP_BYTES:
                self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        block = concat([dataclasses.replace(part, domains=self.domains) for part in self._waiting])
        self._waiting, self._waiting_bytes = [], 0
        starts = block.starts_R[block.request_T[block.starts_R] != self._last_request]
        if self._shards.is_full and len(starts):
            if starts[0]:
                self._write(block.rows(slice(0, int(starts[0]))), 0)
            self._shards.close()
            block = block.rows(slice(int(starts[0]), None))
        self._write(block, len(starts))
        self._last_request = int(block.request_T[-1])

    def _write(self, block: RoutingTrace, n_requests: int) -> None:
        files: dict[str, dict[str, pa.Array]] = {"tokens": _small_columns(block, self.domains)}
        for name, array in wide_columns(block).items():
            files.setdefault(WIDE[name][0], {})[name] = binary(array)
        self._shards.write({stem: pa.table(columns) for stem, columns in files.items()}, n_requests)

    def close(self, card: ModelCard, provenance: Provenance) -> None:
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


class TraceReader:
    """Reads a trace in blocks of whole requests; opening it reads `trace.json` only."""

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
        if any(dtype.kind not in "uf" for dtype, _ in self.columns.values()):
            raise FormatError(
                f"{path}: expected columns of ids and float16, found {self.about['columns']}"
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
        for number, rows in self.shards:
            for block in self._shard(number, rows, names, max_rows):
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

        return dict(load_file(path))

    def router_weights(self) -> dict[int, NDArray[Any]]:
        """layer number -> [E, D], where gate inputs were recorded."""
        tensors = self.beside("router_weights")
        return {int(name.removeprefix("layer.")): array for name, array in tensors.items()}

    def _shard(
        self, number: int, rows: int, names: tuple[str, ...], max_rows: int
    ) -> Iterator[RoutingTrace]:
        wanted: dict[str, list[str]] = {"tokens": list(SMALL)}
        for name in names:
            wanted.setdefault(WIDE[name][0], []).append(name)
        files = {stem: self._open(f"{stem}-{number:05d}.parquet", rows) for stem in wanted}
        for group in range(files["tokens"].num_row_groups):
            columns = {
                name: column.combine_chunks()
                for stem, names_here in wanted.items()
                for name, column in self._group(files[stem], group, names_here).items()
            }
            if len({len(column) for column in columns.values()}) != 1:
                raise FormatError(f"{self.folder}, shard {number}: its files have unequal rows")
            block = self._block(columns, names)
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
            file = pq.ParquetFile(path, memory_map=False, pre_buffer=False)
        if file.metadata.num_rows != rows:
            raise FormatError(
                f"{path}: trace.json promises {rows} rows, found {file.metadata.num_rows}"
            )
        return file

    def _block(self, columns: Mapping[str, pa.Array], names: tuple[str, ...]) -> RoutingTrace:
        with reading(self.folder, "the columns of a trace"):
            wide = {WIDE[name][1]: unbinary(columns[name], *self.columns[name]) for name in names}
            small = {
                name: _whole(columns[name], name) for name in ("request", "position", "executed")
            }
            return RoutingTrace(
                card=self.card,
                request_T=small["request"],
                position_T=small["position"],
                phase_T=_codes(columns["phase"], PHASES, "phase").astype(np.uint8),
                executed_T=small["executed"],
                token_T=columns["token"].cast(pa.int32()).fill_null(NO_TOKEN).to_numpy(),
                domain_T=_codes(columns["domain"], self.domains, "domain", nullable=True),
                domains=self.domains,
                **wide,
            )


def _whole(column: pa.Array, name: str) -> NDArray[Any]:
    """A small column without gaps, in the type of the schema."""
    if column.null_count:
        raise FormatError(f"column {name}: expected no nulls, found {column.null_count}")
    kind = pa.bool_() if name == "executed" else pa.int32()
    return column.cast(kind).to_numpy(zero_copy_only=False)


def _codes(
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


def read_json(path: Path, schema: str) -> dict[str, Any]:
    """A versioned description file; what it is not is said in one line."""
    if not path.is_file():
        raise FormatError(f"{path}: not found; expected a folder with {path.name} ({schema})")
    with reading(path, f"JSON of schema {schema}"):
        about = json.loads(path.read_text())
    if not isinstance(about, dict) or about.get("schema") != schema:
        found = about.get("schema") if isinstance(about, dict) else type(about).__name__
        raise FormatError(f"{path}: expected schema {schema}, found {found}")
    return about
