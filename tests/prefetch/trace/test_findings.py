"""A folder that somebody sent: every fault is found with its file and row, and a sound one has none."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from whole_traces import everything, write

from prefetch.artifacts import Recipe, Store
from prefetch.trace import parquet
from prefetch.trace.card import plain_card
from prefetch.trace.columns import binary
from prefetch.trace.findings import Finding, findings
from prefetch.trace.parquet import TraceFiles, TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.row_findings import MOST_ROWS

LENGTHS = [4, 3, 7, 5, 1, 6, 2, 9]


def found(folder: Path) -> list[Finding]:
    return list(findings(folder))


def damage(folder: Path) -> list[str]:
    return [finding.line() for finding in findings(folder) if finding.is_damage]


def raw(folder: Path, trace: RoutingTrace) -> Path:
    """Written past every check, as a program of somebody else would."""
    folder.mkdir()
    files = TraceFiles(folder)
    files.append(trace)
    files.close(trace.card, Provenance("real", "elsewhere"))
    return folder


def edit(folder: Path, column: str, change, shard: int = 0) -> None:
    """Changes a column of a shard in place; the numbers of rows stay."""
    (path,) = (
        folder.glob(f"*-{shard:05d}.parquet")
        if column != "experts"
        else [folder / f"tokens-{shard:05d}.parquet"]
    )
    table = pq.read_table(path)
    array = change(table.column(column).combine_chunks())
    table = table.set_column(table.column_names.index(column), column, array)
    pq.write_table(table, path, row_group_size=1 << 20)


@pytest.fixture
def plain():
    """Only what stands in tokens-*.parquet."""
    others = ("scores_TLM", "gate_inputs_TLD", "pre_attention_TLD")
    return dataclasses.replace(everything(LENGTHS), **dict.fromkeys(others))


def test_a_sound_trace_has_nothing_to_look_at(tmp_path):
    assert found(write(tmp_path / "t", everything(LENGTHS), routers=True).folder) == []


@pytest.mark.parametrize("column", ["experts", "weights", "gate_inputs"])
def test_a_column_of_another_shape_than_the_model_is_named(tmp_path, column):
    """Turned around it has as many bytes, and would be read as layers that are none."""
    folder = write(tmp_path / "t", everything(LENGTHS)).folder
    about = json.loads((folder / "trace.json").read_text())
    about["columns"][column][1].reverse()
    (folder / "trace.json").write_text(json.dumps(about))
    assert any(f"trace.json: column {column} holds [" in line for line in damage(folder))


def test_every_row_is_named_with_its_file(tmp_path, monkeypatch, plain):
    """Over row groups and shards: the row counts in its own file."""
    monkeypatch.setattr(parquet, "GROUP_BYTES", 300)
    monkeypatch.setattr(parquet, "SHARD_BYTES", 500)
    plain.ids_TLK[2, 1] = 5
    plain.ids_TLK[20, 0] = 7
    plain.weights_TLK[30, 2, 1] = np.nan
    position_T = plain.position_T.copy()
    position_T[9] = position_T[8]
    plain = dataclasses.replace(plain, position_T=position_T)
    folder = raw(tmp_path / "t", plain)
    stops = np.cumsum([rows for _, rows in TraceReader(folder).shards])
    assert len(stops) > 2

    def place(row: int) -> str:
        shard = int(np.searchsorted(stops, row, side="right"))
        return f"tokens-{shard:05d}.parquet, row {row - (stops[shard - 1] if shard else 0)}"

    assert sorted(damage(folder)) == sorted(
        [
            f"damaged  {place(2)}: layer 2, experts [5, 5]: an expert is named twice",
            f"damaged  {place(20)}: layer 1, experts [7, 7]: an expert is named twice",
            f"damaged  {place(30)}: layer 4: expected finite weights, got "
            f"{plain.weights_TLK[30, 2].tolist()}",
            f"damaged  {place(9)}: position {plain.position_T[9]} after {plain.position_T[8]} in request 2: "
            "must ascend",
        ]
    )
    assert found(folder)[-1].what.startswith("not looked at, because rows are damaged")


def test_ids_out_of_range_are_found_where_the_reader_would_stop(tmp_path, plain):
    folder = raw(tmp_path / "t", plain)
    ids = plain.ids_TLK.copy()
    ids[[3, 11], 1, 0] = 99
    edit(folder, "experts", lambda _: binary(ids))
    lines = damage(folder)
    assert [line.split(":")[0] for line in lines] == [
        "damaged  tokens-00000.parquet, row 3",
        "damaged  tokens-00000.parquet, row 11",
    ]
    assert "layer 2, experts [99, " in lines[0] and "out of range for 16 experts" in lines[0]


def test_many_rows_of_one_kind_are_counted(tmp_path, plain):
    plain.ids_TLK[:, 0] = 3
    lines = damage(raw(tmp_path / "t", plain))
    assert len(lines) == MOST_ROWS + 1
    assert lines[-1].endswith(f"and {37 - MOST_ROWS} rows more of this kind")


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        (
            "request",
            lambda c: pa.array([5, *c.to_pylist()[1:]], pa.int32()),
            "requests must ascend",
        ),
        (
            "request",
            lambda c: pa.array([None, *c.to_pylist()[1:]], pa.int32()),
            "expected no nulls",
        ),
        ("phase", lambda c: pa.array(["middle"] * len(c)), "column phase: expected one of"),
        ("domain", lambda c: pa.array(["cooking"] * len(c)), "column domain: expected one of"),
        (
            "weights",
            lambda c: pa.array([b"1234"] * len(c), pa.binary(4)),
            "a column of 12 bytes a row",
        ),
    ],
)
def test_columns_that_are_none(tmp_path, plain, column, change, message):
    folder = raw(tmp_path / "t", plain)
    edit(folder, column, change)
    lines = damage(folder)
    assert lines[0].startswith("damaged  tokens-00000.parquet, row ") and message in lines[0]


def test_files_that_are_lost_cut_or_of_another_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 900)
    monkeypatch.setattr(parquet, "SHARD_BYTES", 1500)
    folder = write(tmp_path / "t", everything(LENGTHS)).folder
    other = write(tmp_path / "u", everything([5])).folder
    (folder / "scores-00000.parquet").unlink()
    whole = (folder / "gate_inputs-00001.parquet").read_bytes()
    (folder / "gate_inputs-00001.parquet").write_bytes(whole[:-20])
    (folder / "tokens-00002.parquet").write_bytes((other / "tokens-00000.parquet").read_bytes())
    text = "\n".join(damage(folder))
    assert "scores-00000.parquet: cannot be opened" in text
    assert "gate_inputs-00001.parquet: cannot be opened" in text
    assert "tokens-00002.parquet: has 5 rows, trace.json promises" in text


def test_bytes_that_rot_inside_a_row_group_are_found(tmp_path):
    """Without a seal there is no checksum of random bytes: what is compressed, or out of range, still shows."""
    folder = write(tmp_path / "t", everything([400, 400])).folder
    path = folder / "tokens-00000.parquet"
    data = bytearray(path.read_bytes())
    data[5:60] = bytes(55)
    path.write_bytes(data)
    assert damage(folder)


def test_a_description_that_is_none_is_one_finding(tmp_path):
    folder = write(tmp_path / "t", everything([5])).folder
    about = json.loads((folder / "trace.json").read_text())
    for change, message in (
        ({"schema": "prefetch.trace/9"}, "a newer version of this project wrote it"),
        ({"schema": "prefetch.trace/0"}, "it is older: stage=traces traces.do=migrate"),
        ({"tokens": 6}, "6 tokens are not what its shards hold"),
        ({"card": {**about["card"], "top_k": 99}}, "top_k must be from 1 to n_experts=16"),
    ):
        (folder / "trace.json").write_text(json.dumps({**about, **change}))
        (line,) = damage(folder)
        assert line.startswith("damaged  trace.json: ") and message in line
    (folder / "trace.json").write_text("{")
    assert "expected JSON" in damage(folder)[0]
    (folder / "trace.json").unlink()
    assert "not found" in damage(folder)[0]


def test_a_promise_of_other_requests_is_found(tmp_path):
    folder = write(tmp_path / "t", everything([5, 4])).folder
    about = json.loads((folder / "trace.json").read_text())
    (folder / "trace.json").write_text(json.dumps({**about, "requests": 3}))
    assert damage(folder) == ["damaged  trace.json: promises 3 requests, the shards hold 2"]


def sealed(tmp_path: Path) -> Path:
    def build(folder: Path, _upstream) -> None:
        folder.rmdir()
        write(folder, everything(LENGTHS))

    return Store(tmp_path / "store").make(Recipe("trace", 1, {}, build)).folder


def test_a_seal_tells_what_no_reader_can(tmp_path):
    folder = sealed(tmp_path)
    assert found(folder) == []
    (folder / "note.txt").write_text("mine")
    data = bytearray((folder / "gate_inputs-00000.parquet").read_bytes())
    data[200] ^= 1  # another float16, as good as any
    (folder / "gate_inputs-00000.parquet").write_bytes(data)
    (folder / "pre_attention-00000.parquet").write_bytes(b"PAR1")
    (folder / "scores-00000.parquet").unlink()
    lines = [finding.line() for finding in findings(folder)]
    assert (
        "damaged  gate_inputs-00000.parquet: its sha256 differs from the manifest: bytes were changed"
        in lines
    )
    assert "damaged  scores-00000.parquet: is missing; the manifest lists it" in lines
    assert any(
        line.startswith("damaged  pre_attention-00000.parquet: has 4 bytes") for line in lines
    )
    assert "look at  note.txt: is not in the manifest" in lines


def test_a_log_with_a_wrong_stride_is_found_by_request(tmp_path):
    """Each later line holds the next ranks of the first token, in one request of two."""
    rng = np.random.default_rng(0)
    card = plain_card("m", n_experts=16, top_k=2, layer_numbers=(0, 1, 2))
    trace = everything([64, 64], card=card, phase_T=0)
    ranks = rng.random((8, 3, 16)).argsort(-1)
    trace.ids_TLK[64:] = ranks.transpose(0, 2, 1).reshape(64, 2, 3).transpose(0, 2, 1)
    (line,) = damage(raw(tmp_path / "t", trace))
    assert line.startswith("damaged  tokens-00000.parquet, row 64: request 1, prefill: ")
    assert "written with a wrong stride" in line


def test_copied_layers_and_repeated_requests(tmp_path):
    trace = everything([9, 9, 9])
    trace.ids_TLK[9:18] = trace.ids_TLK[:9]
    (finding,) = found(raw(tmp_path / "t", trace))
    assert finding.line() == "look at  trace.json: 1 requests repeat another one choice by choice"
    trace.ids_TLK[:, 2] = trace.ids_TLK[:, 0]
    assert damage(raw(tmp_path / "u", trace))[0].startswith(
        "damaged  trace.json: layers 1 and 4 are byte-identical"
    )


def test_weights_that_do_not_add_up_are_a_doubt(tmp_path):
    card = plain_card("m", n_experts=16, top_k=2, layer_numbers=(0, 1, 2), weights_normalised=True)
    weights = np.full((9, 3, 2), 0.5, np.float16)
    assert found(raw(tmp_path / "t", everything([9], card=card, weights_TLK=weights))) == []
    weights[4, 1] = 0.25
    (finding,) = found(raw(tmp_path / "u", everything([9], card=card, weights_TLK=weights)))
    assert not finding.is_damage and finding.row == 4
    assert "1 of 27 rows of layers do not add up to 1 (0.500 first)" in finding.what
