"""A few kilobytes of runs are not unfolded; what tools write of routing is far from the limit."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefetch.errors import FormatError
from prefetch.sources.columns import open_columns
from prefetch.trace.card import plain_card
from prefetch.trace.footer import row_groups_of
from prefetch.trace.packed import check_packed
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import trace_of
from prefetch.trace.writer import TraceWriter

MANY = 20_000_000
READ = """
from pathlib import Path
from prefetch.errors import PrefetchError
from prefetch.sources.columns import open_columns
try:
    print(list(open_columns(Path("{path}")).blocks(["ids"], 16)))
except PrefetchError as error:
    print(type(error).__name__, error)
"""


def test_a_list_of_one_value_is_not_unfolded(tmp_path):
    path, offsets = tmp_path / "a.parquet", pa.array([0, MANY], pa.int32())
    ids = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(MANY, np.int32)))
    pq.write_table(pa.table({"expert_ids": ids}), path, compression="zstd")
    assert path.stat().st_size < 1 << 16
    columns = open_columns(path)
    with pytest.raises(FormatError, match=r"a\.parquet: column expert_ids.*refused as a bomb"):
        next(columns.blocks(["expert_ids"], 16))


def test_one_long_name_for_every_row_is_not_unfolded(tmp_path):
    path, named = tmp_path / "a.parquet", pa.array(["x" * (1 << 20)])
    who = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, np.int32)), named)
    offsets = pa.array(np.arange(1001, dtype=np.int32))
    ids = pa.ListArray.from_arrays(offsets, pa.array(np.arange(1000, dtype=np.int32) % 16))
    words = pa.ListArray.from_arrays(offsets, who.dictionary_decode())
    table = pa.table({"expert_ids": ids, "request": who, "words": words})
    pq.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1 << 16
    columns = open_columns(path)
    with pytest.raises(
        FormatError, match=r"a\.parquet: column request: 1,000 rows hold 1,048,576,"
    ):
        next(columns.blocks(["expert_ids", "request"], 1 << 16))
    with pytest.raises(FormatError, match=r"column words: expected lists of numbers, found list"):
        next(columns.blocks(["words"], 16))


def test_one_long_domain_for_every_row_is_not_unfolded(tmp_path):
    card = plain_card("toy", n_experts=16, top_k=2, layer_numbers=(0, 1))
    writer = TraceWriter(tmp_path, Provenance("real", "test"), max_dropped=1.0)
    writer.begin(card)
    rng = np.random.default_rng(0)
    writer.append(trace_of(card, rng.random((1000, 2, 16)).argsort(-1)[..., :2]))
    writer.close()
    path = tmp_path / "tokens-00000.parquet"
    table = pq.read_table(path)
    said = pa.array(["x" * (1 << 20)])
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, np.int32)), said)
    at = table.column_names.index("domain")
    pq.write_table(
        table.set_column(at, "domain", long), path, compression="zstd", store_schema=False
    )
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(FormatError, match="column domain: expected one of"):
            TraceReader(tmp_path).load()
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 100 << 20


def test_a_shard_of_one_row_again_and_again_is_not_unfolded(tmp_path):
    card = plain_card("toy", n_experts=16, top_k=2, layer_numbers=tuple(range(64)))
    writer = TraceWriter(tmp_path, Provenance("real", "test"), max_dropped=1.0)
    writer.begin(card)
    rng = np.random.default_rng(0)
    writer.append(trace_of(card, rng.random((8, 64, 16)).argsort(-1)[..., :2]))
    writer.close()
    path, about = (
        tmp_path / "tokens-00000.parquet",
        json.loads((tmp_path / "trace.json").read_text()),
    )
    table = pq.read_table(path)
    row = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(1 << 20, np.int8)), table.column("experts").chunk(0)[:1]
    )
    small = {
        name: pa.repeat(table.column(name)[0].as_py(), 1 << 20)
        for name in ("request", "position", "executed")
    }
    columns = {**small, "experts": row.dictionary_decode()}
    pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=True)
    about["tokens"] = about["shards"][0]["rows"] = 1 << 20
    (tmp_path / "trace.json").write_text(json.dumps(about))
    with pytest.raises(
        FormatError, match=r"tokens-00000\.parquet: column experts.*refused as a bomb"
    ):
        TraceReader(tmp_path).load()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_routing_is_far_from_the_limit(tmp_path, compression):
    ids = np.random.default_rng(0).random((4096, 8, 32)).argsort(-1)[..., :4]
    flat = pa.FixedSizeListArray.from_arrays(
        pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), 4), 8
    )
    pq.write_table(
        pa.table({"ids": flat, "request": np.zeros(4096)}),
        tmp_path / "a.parquet",
        compression=compression,
    )
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        check_packed(file.metadata, tmp_path / "a.parquet")
        chunk = file.metadata.row_group(0).column(0)
        assert chunk.num_values * 8 < 20 * chunk.total_compressed_size
        (group,) = row_groups_of(tmp_path / "a.parquet")
        told = [file.metadata.row_group(0).column(at) for at in range(file.metadata.num_columns)]
    assert group.n_rows == 4096
    assert [(one.n_values, one.compressed_bytes) for one in group.chunks] == [
        (column.num_values, column.total_compressed_size) for column in told
    ]


def test_statistics_that_contradict_each_other_do_not_end_the_process(tmp_path):
    """A list's histograms of levels have as many numbers as there are levels; of a file that says otherwise Arrow's
    Python door to the column's sizes calls `terminate`."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"ids": [[1, 2], [3], []] * 50}), path)
    data = path.read_bytes()
    whole = bytes((0x19, 0x46, 0, 100, 0, 0xAC, 2))  # four counts of levels: 0, 50, 0, 150
    assert data.count(whole) == 1
    n_bytes = int.from_bytes(data[-8:-4], "little") - 3
    short = data.replace(whole, bytes((0x19, 0x26, 0, 100)))  # two
    path.write_bytes(short[:-8] + n_bytes.to_bytes(4, "little") + b"PAR1")
    asked = [sys.executable, "-c", READ.format(path=str(path))]
    read = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=120)
    assert read.returncode == 0 and "FormatError" in read.stdout, read.stderr


@pytest.mark.parametrize("data", [b"", b"PAR1", b"\x00" * 20 + b"PAR1", b"\xff\xff\xff\x7fPAR1"])
def test_what_does_not_end_as_parquet_is_refused(tmp_path, data):
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(FormatError):
        row_groups_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("byte", [0x19, 0x1C, 0x1B])  # lists of lists, structures, maps
def test_an_end_that_nests_without_end_is_refused(tmp_path, byte):
    end = bytes([byte]) * 5000
    (tmp_path / "a.parquet").write_bytes(end + len(end).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(FormatError):
        row_groups_of(tmp_path / "a.parquet")
