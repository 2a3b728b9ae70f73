"""What a careless writer or a hostile file may do to a trace: refused in words, or read right."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from prefetch.errors import FormatError, PrefetchError
from prefetch.trace.card import plain_card
from prefetch.trace.checks import LOG_CHANCE, check_trace, log_chance_of_uniformity
from prefetch.trace.parquet import TraceReader
from prefetch.trace.predictions import (
    Predictions,
    PredictionsCard,
    PredictionsReader,
    PredictionsWriter,
)
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import trace_of
from prefetch.trace.writer import TraceWriter

CARD = plain_card("toy", n_experts=16, top_k=2, layer_numbers=(4, 5, 6, 7))


def sound(n=64, seed=0):
    return np.random.default_rng(seed).random((n, 4, 16)).argsort(-1)[..., :2]


def writer_in(folder, card=CARD, kind="real"):
    writer = TraceWriter(folder, Provenance(kind, "test"), max_dropped=1.0)
    writer.begin(card)
    return writer


FOREIGN = """
import sys, tempfile
from pathlib import Path
import numpy as np
from prefetch.errors import FormatError
from prefetch.trace.card import plain_card
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import trace_of
from prefetch.trace.writer import TraceWriter
small = plain_card("small", n_experts=16, top_k=2, layer_numbers=(0, 1))
large = plain_card("large", n_experts=60000, top_k=2, layer_numbers=tuple(range(300)))
writer = TraceWriter(Path(tempfile.mkdtemp()), Provenance("synthetic", "x"))
writer.begin(small)
try:
    writer.append(trace_of(large, np.random.default_rng(0).integers(0, 60000, (200, 300, 2))))
except (FormatError, AssertionError) as error:
    sys.exit(0 if "wrong stride" not in str(error) else 3)
sys.exit(4)
"""


def test_a_block_of_another_model_is_refused_not_a_segmentation_fault():
    done = subprocess.run([sys.executable, "-c", FOREIGN], timeout=120, check=False)
    assert done.returncode == 0, done.returncode


def test_interleaved_requests_are_refused_and_not_cut_into_one_request_per_token(tmp_path):
    writer = writer_in(tmp_path)
    with pytest.raises(FormatError, match="request"):
        writer.append(trace_of(CARD, sound(), request_T=[0, 1] * 32))
        writer.close()


def test_rows_from_a_prefix_cache_are_kept_not_dropped_as_warm_up(tmp_path):
    ids = sound()
    ids[:20] = -1
    writer = writer_in(tmp_path)
    writer.append(trace_of(CARD, ids, executed_T=np.arange(64) >= 20))
    assert writer.close().dropped_rows == {}
    assert TraceReader(tmp_path).n_tokens == 64


@pytest.mark.parametrize("size", [20, 8, 5, 1])
def test_warm_up_is_found_whatever_the_size_of_the_blocks(tmp_path, size):
    ids = sound(100)
    ids[:40] = ids[0]
    writer = writer_in(tmp_path)
    for start in range(0, 100, size):
        writer.append(trace_of(CARD, ids[start : start + size], request_T=start))
    assert sum(writer.close().dropped_rows.values()) == 40


def test_where_every_expert_is_chosen_equal_rows_are_no_warm_up(tmp_path):
    card = plain_card("all", n_experts=2, top_k=2, layer_numbers=(0, 1, 2, 3))
    writer = writer_in(tmp_path, card)
    writer.append(trace_of(card, np.tile([0, 1], (50, 4, 1))))
    assert writer.close().dropped_rows == {}


@pytest.mark.parametrize("bad", [np.nan, 1.7, -0.5])
def test_ids_that_are_not_whole_numbers_are_refused(bad):
    ids = sound().astype(float)
    ids[3, 1, 0] = bad
    with pytest.raises(FormatError):
        trace_of(CARD, ids)


def test_request_and_position_numbers_do_not_wrap_around():
    with pytest.raises(FormatError):
        trace = trace_of(CARD, sound(2), request_T=np.array([2**40, 2**40 + 2**32]))
        assert trace.request_T[0] != trace.request_T[1], "two requests became one"
        raise FormatError("kept apart is as good")


@pytest.mark.parametrize("skipped", [0, 1, 3, 19])
def test_the_stride_defect_shows_wherever_the_log_begins(skipped):
    rng = np.random.default_rng(0)
    ranks = np.argsort(np.log(np.arange(1, 161)) - rng.gumbel(size=(512, 160)), axis=1)
    strided = ranks.ravel()[: 512 * 8].reshape(512, 1, 8).astype(np.uint8)
    assert log_chance_of_uniformity(np.ascontiguousarray(strided[skipped:]), 160) < LOG_CHANCE


def test_the_row_in_an_error_is_the_row_of_the_file_it_names(tmp_path):
    writer = writer_in(tmp_path)
    writer.file("a.csv")
    writer.append(trace_of(CARD, sound()))
    writer.file("b.csv")
    ids = sound(10, 1)
    ids[3, 1] = [3, 3]
    with pytest.raises(FormatError, match=r"b\.csv, row 3,"):
        writer.append(trace_of(CARD, ids))


def test_two_collapsed_routers_are_not_called_copies(tmp_path):
    ids = sound()
    ids[:, 0] = ids[:, 2] = [1, 2]  # both routers have died on the same pair: no evidence of a copy
    writer = writer_in(tmp_path)
    writer.append(trace_of(CARD, ids))
    writer.close()


@pytest.mark.parametrize("number", [np.int64(3), np.int32(3)])
def test_counts_of_numpy_may_be_dropped(tmp_path, number):
    writer = writer_in(tmp_path)
    writer.append(trace_of(CARD, sound()))
    writer.drop("x", number)
    writer.close()


@pytest.mark.parametrize("value", [np.float32(0.5), float("nan"), float("inf")])
def test_a_fact_is_a_finite_number_or_refused_before_the_trace_is_sealed(tmp_path, value):
    writer = writer_in(tmp_path)
    writer.append(trace_of(CARD, sound()))
    try:
        writer.fact("x", value)
        writer.close()
    except (PrefetchError, AssertionError):
        return
    json.loads((tmp_path / "trace.json").read_text(), parse_constant=lambda text: pytest.fail(text))


def test_a_domain_that_is_no_utf8_is_written_or_refused_in_words(tmp_path):
    writer = writer_in(tmp_path)
    try:
        writer.append(trace_of(CARD, sound(), domain="law\udcff"))
        writer.close()
    except PrefetchError:
        return
    TraceReader(tmp_path).load()


@pytest.mark.parametrize(
    "change",
    [
        {"phase_T": np.full(64, 7, np.uint8)},
        {"domain_T": np.full(64, 5, np.int32)},
        {"scores_TLM": np.zeros(64, np.float16)},
        {
            "scores_TLM": np.zeros((64, 4, 3), np.float16),
            "score_ids_TLM": np.full((64, 4, 3), 99, np.uint8),
        },
        {"scores_TLM": np.zeros((64, 4, 3))},  # float64 in a file that promises float16
    ],
)
def test_a_routing_trace_cannot_be_wrong(change):
    with pytest.raises(FormatError):
        dataclasses.replace(trace_of(CARD, sound()), **change)


def test_a_trace_of_finite_weights_beyond_float16_is_not_called_infinite(tmp_path):
    writer = writer_in(tmp_path)
    with pytest.raises(FormatError, match=r"does not fit float16"):
        writer.append(trace_of(CARD, sound(), weights_TLK=np.full((64, 4, 2), 7e4)))


def written(folder):
    writer = writer_in(folder)
    phases = np.tile([0] * 16 + [1] * 16, 2)
    writer.append(
        trace_of(CARD, sound(), request_T=np.repeat([0, 1], 32), phase_T=phases, domain="d")
    )
    writer.close()
    return folder


def with_column(folder, name, column):
    path = written(folder) / "tokens-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, column), path)
    return TraceReader(folder)


def test_phases_are_read_by_their_names_not_by_the_order_of_another_writers_dictionary(tmp_path):
    codes = pa.array([0 if i % 32 >= 16 else 1 for i in range(64)], pa.int8())
    reader = with_column(
        tmp_path, "phase", pa.DictionaryArray.from_arrays(codes, ["decode", "prefill"])
    )
    assert reader.load().phase_T.tolist() == ([0] * 16 + [1] * 16) * 2


def test_a_trace_of_decode_rows_alone_written_by_pandas_is_decode(tmp_path):
    reader = with_column(tmp_path, "phase", pa.array(["decode"] * 64).dictionary_encode())
    assert set(reader.load().phase_T.tolist()) == {1}


COLUMNS = {
    "phase as plain strings": ("phase", pa.array(["decode"] * 64)),
    "phase null": ("phase", pa.array([None] * 64, pa.string()).dictionary_encode()),
    "phase of another name": ("phase", pa.array(["x"] * 64).dictionary_encode()),
    "request null": ("request", pa.array([None] + [1] * 63, pa.int32())),
    "request out of order": ("request", pa.array(np.arange(64, dtype=np.int32) % 2)),
    "position falls": ("position", pa.array(np.arange(64, dtype=np.int32)[::-1].copy())),
    "domain unknown": ("domain", pa.array(["zzz"] * 64).dictionary_encode()),
    "domain plain": ("domain", pa.array(["d"] * 64)),
    "experts int64": ("experts", pa.array([1] * 64)),
    "experts of 7 bytes": ("experts", pa.array([b"1234567"] * 64, pa.binary(7))),
    "experts null": ("experts", pa.array([None] * 64, pa.binary(8))),
    "experts twice the same": ("experts", pa.array([b"\1" * 8] * 64, pa.binary(8))),
    "token text": ("token", pa.array(["a"] * 64)),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_shard_with_another_column_is_refused_in_words_or_read_right(tmp_path, name):
    reader = with_column(tmp_path, *COLUMNS[name])
    if name in ("phase as plain strings", "domain plain"):
        reader.load()
        return
    with pytest.raises(FormatError):
        check_trace(reader)


def at(*path, value):
    def change(about):
        for part in path[:-1]:
            about = about[part]
        about[path[-1]] = value

    return change


ABOUT = {
    "tokens text": at("tokens", value="abc"),
    "tokens wrong": at("tokens", value=7),
    "domains empty": at("domains", value=[]),
    "dtype object": at("columns", "experts", value=["|O", [4, 2]]),
    "column that no trace has": at("columns", "extra", value=["|u1", [4, 2]]),
    "dtype nonsense": at("columns", "experts", value=["zzz", [4, 2]]),
    "shape": at("columns", "experts", value=["|u1", [4, 9]]),
    "column is a number": at("columns", "experts", value=3),
    "shard number": at("shards", value=[{"number": "../x", "rows": 64}]),
    "shard twice": at("shards", value=[{"number": 0, "rows": 64}] * 2),
    "card is a number": at("card", value=5),
    "experts text": at("card", "n_experts", value="16"),
    "experts fraction": at("card", "n_experts", value=16.5),
    "layers a number": at("card", "layer_numbers", value=5),
    "stacks of lists": at("card", "layer_stacks", value=[[], [], [], []]),
    "bytes of text": at("card", "expert_bytes_L", value=["a"] * 4),
    "hidden text": at("card", "hidden_size", value="x"),
    "notes a number": at("provenance", "notes", value=5),
    "facts of text": at("provenance", "facts", value={"a": "b"}),
    "dropped of text": at("provenance", "dropped_rows", value={"a": "b"}),
}


@pytest.mark.parametrize("name", ABOUT)
def test_a_wrong_description_is_refused_in_words(tmp_path, name):
    path = written(tmp_path) / "trace.json"
    about = json.loads(path.read_text())
    ABOUT[name](about)
    path.write_text(json.dumps(about))
    with pytest.raises(FormatError, match=re.escape(str(tmp_path))):
        TraceReader(tmp_path).load()


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, b"\x10" + b"\x00" * 7 + b"{}" * 8])
def test_a_damaged_file_beside_the_rows_is_refused_in_words(tmp_path, data):
    path = written(tmp_path) / "router_weights.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"router_weights\.safetensors"):
        TraceReader(tmp_path).router_weights()


def test_arrays_beside_the_rows_of_other_names_are_refused_in_words(tmp_path):
    save_file({"x": np.ones((2, 2))}, written(tmp_path) / "router_weights.safetensors")
    with pytest.raises(FormatError, match=r"router_weights\.safetensors"):
        TraceReader(tmp_path).router_weights()


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"schema": "prefetch.trace/1", "tokens": ' + "9" * 5000 + "}"]
)
def test_json_that_no_parser_takes_is_refused_in_words(tmp_path, text):
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(FormatError, match=r"trace\.json"):
        TraceReader(tmp_path)


def test_a_damaged_shard_is_always_refused_in_words(tmp_path):
    path = written(tmp_path) / "tokens-00000.parquet"
    sound_bytes, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(sound_bytes)
        for at_byte in rng.integers(4, len(damaged), 3):
            damaged[at_byte] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            TraceReader(tmp_path).load()
        except FormatError:
            continue


GUESSES = PredictionsCard(
    trace="abc",
    predictor="toy",
    n_experts=16,
    n_layers=3,
    width=4,
    horizons=(1, 4),
    causality="decode",
    score="p",
    requests=(0, 2),
    fitted_requests=(1,),
)


def guesses(requests, card=GUESSES):
    shape = (len(requests), 2, 3, 16)
    ids = np.random.default_rng(0).random(shape).argsort(-1)[..., :4].astype(np.uint8)
    return Predictions(
        card,
        np.array(requests, np.int32),
        np.arange(len(requests), dtype=np.int32),
        ids,
        np.full((*shape[:3], 4), 0.5, np.float16),
    )


@pytest.mark.parametrize("requests", [[2, 2, 0, 0], [0, 2, 0, 2]])
def test_guesses_stand_in_the_order_that_their_card_promises(tmp_path, requests):
    writer = PredictionsWriter(tmp_path, GUESSES)
    with pytest.raises(FormatError):
        writer.append(guesses(requests))
        writer.close()


@pytest.mark.parametrize("change", [{"width": 3}, {"n_experts": 300}, {"requests": [5, 6, 7]}])
def test_guesses_that_do_not_fit_their_card_are_refused_in_words(tmp_path, change):
    writer = PredictionsWriter(tmp_path, GUESSES)
    writer.append(guesses([0, 0, 2]))
    writer.close()
    path = tmp_path / "predictions.json"
    about = json.loads(path.read_text())
    about["card"].update(change)
    path.write_text(json.dumps(about))
    with pytest.raises(FormatError):
        list(PredictionsReader(tmp_path).batches())


@pytest.mark.parametrize(
    "change",
    [
        {"n_experts": 70_000},
        {"n_layers": 0},
        {"fitted_requests": [[1]]},
        {"requests": (0, 2.0)},
        {"width": 4.0},
    ],
)
def test_a_card_of_guesses_has_the_limits_of_a_trace(change):
    with pytest.raises(FormatError):
        dataclasses.replace(GUESSES, **change)
