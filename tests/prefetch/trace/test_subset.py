"""A part of a trace holds exactly what was asked for, is a trace of its own, and parts of parts are parts."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from whole_traces import (
    CARD,
    EVERYTHING,
    assert_same_bytes,
    assert_same_rows,
    domains_of,
    everything,
    files_of,
    write,
)

from prefetch.errors import ConfigError, FormatError
from prefetch.trace import parquet
from prefetch.trace.checks import check_trace
from prefetch.trace.findings import findings
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.selection import Selection, ranges_of
from prefetch.trace.subset import subset

LENGTHS = [4, 3, 7, 5, 1, 6, 2, 9]


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path / "whole", everything(LENGTHS), routers=True)


def cut(whole, to, **asked) -> TraceReader:
    leave_out = asked.pop("leave_out", ())
    done = subset(whole.folder, to, Selection(**asked), leave_out=leave_out)
    reader = TraceReader(to)
    assert (done.tokens, done.requests) == (reader.n_tokens, reader.n_requests)
    check_trace(reader)
    assert not [found for found in findings(to) if found.is_damage]
    return reader


def rows_of(whole, keep_T):
    """What a subset of these rows must be: the requests numbered anew."""
    trace = whole.load(*EVERYTHING).rows(keep_T)
    numbers = np.unique(trace.request_T, return_inverse=True)[1].astype(np.int32)
    return type(trace)(**{**vars(trace), "request_T": numbers})


@pytest.mark.parametrize(
    ("asked", "requests"),
    [
        ({"requests": [1, "3-5"]}, [1, 3, 4, 5]),
        ({"requests": "0-2,7"}, [0, 1, 2, 7]),
        ({"requests": 6}, [6]),
        ({"requests": "5-100"}, [5, 6, 7]),
        ({"first": 3}, [0, 1, 2]),
        ({"domains": ("law",)}, [1, 4, 7]),
        ({"domains": "law"}, [1, 4, 7]),
        ({"domains": ("law", "code")}, [1, 2, 4, 5, 7]),
        ({"domains": ("law",), "first": 2}, [1, 4]),
        ({"tokens": 14}, [0, 1, 2]),
        ({"tokens": 13}, [0, 1]),
        ({"requests": "2-7", "tokens": 20}, [2, 3, 4, 5]),
    ],
)
def test_requests_stay_whole_in_their_order_and_are_numbered_anew(whole, tmp_path, asked, requests):
    reader = cut(whole, tmp_path / "part", **asked)
    keep_T = np.isin(whole.load().request_T, requests)
    assert_same_rows(reader.load(*EVERYTHING), rows_of(whole, keep_T))
    assert reader.card == whole.card
    assert set(reader.domains) == {name for name in domains_of(reader.load()) if name}


def test_a_phase_keeps_positions_and_drops_requests_without_it(whole, tmp_path):
    reader = cut(whole, tmp_path / "part", phase="decode")
    trace = whole.load()
    assert_same_rows(reader.load(*EVERYTHING), rows_of(whole, trace.phase_T == 1))
    assert reader.n_requests == 7, "the request of one token is all prompt"
    assert reader.load().position_T[0] == 2


def test_tokens_are_counted_after_the_phase(whole, tmp_path):
    assert cut(whole, tmp_path / "part", phase="decode", tokens=3).n_requests == 2


def test_layers_keep_their_numbers_and_take_everything_with_them(whole, tmp_path):
    reader, all_of = cut(whole, tmp_path / "part", layers=["4", 1]), whole.load(*EVERYTHING)
    assert reader.card.layer_numbers == (1, 4) and reader.card.expert_bytes_L == (10, 40)
    part = reader.load(*EVERYTHING)
    np.testing.assert_array_equal(part.ids_TLK, all_of.ids_TLK[:, [0, 2]])
    for name in ("weights_TLK", "scores_TLM", "gate_inputs_TLD", "pre_attention_TLD"):
        np.testing.assert_array_equal(getattr(part, name), getattr(all_of, name)[:, [0, 2]])
    assert sorted(reader.router_weights()) == [1, 4]
    assert (reader.router_weights()[4] == 4).all()


def test_a_stack_can_be_named(tmp_path):
    card = type(CARD)("two", 16, 2, (1, 3, 1), ("encoder", "encoder", "decoder"))
    whole = write(tmp_path / "whole", everything([9], card=card))
    numbers = {
        asked: cut(whole, tmp_path / asked.replace(":", ""), layers=asked).card
        for asked in ("1", "encoder:1", "decoder:1")
    }
    assert numbers["1"].layer_stacks == ("encoder", "decoder")
    assert numbers["encoder:1"].layer_stacks == ("encoder",)
    assert numbers["decoder:1"].layer_stacks == ("decoder",)


def test_routers_of_both_stacks_go_with_their_layers(tmp_path):
    card = type(CARD)("two", 16, 2, (1, 3, 1), ("encoder", "encoder", "decoder"))
    whole = write(tmp_path / "whole", everything([9], card=card))
    for name, numbers in (("router_weights", [1]), ("encoder_router_weights", [1, 3])):
        arrays = {f"layer.{n}": np.full((16, 5), n, np.float32) for n in numbers}
        save_file(arrays, whole.folder / f"{name}.safetensors")
    encoder = cut(whole, tmp_path / "a", layers="encoder:1-3")
    assert sorted(encoder.beside("encoder_router_weights")) == ["layer.1", "layer.3"]
    assert not (encoder.folder / "router_weights.safetensors").exists()
    decoder = cut(whole, tmp_path / "b", layers="decoder:1")
    assert sorted(decoder.router_weights()) == [1]
    assert not (decoder.folder / "encoder_router_weights.safetensors").exists()


def test_drawn_requests_follow_the_seed(whole, tmp_path):
    seeds = {seed: cut(whole, tmp_path / str(seed), drawn=3, seed=seed) for seed in range(8)}
    again = cut(whole, tmp_path / "again", drawn=3, seed=0)
    assert files_of(again.folder) == files_of(seeds[0].folder)
    assert len({reader.load().token_T.tobytes() for reader in seeds.values()}) > 1
    assert {reader.n_requests for reader in seeds.values()} == {3}


@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=3, max_size=12),
    group_bytes=st.sampled_from([300, 3000, 1 << 24]),
    data=st.data(),
)
def test_a_part_of_a_part_is_the_part(lengths, group_bytes, data, tmp_path_factory):
    """Whatever the row groups: requests first and then layers and phase, or all at once."""
    tmp_path, n = tmp_path_factory.mktemp("law"), len(lengths)
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, n - 1)] * 2)))
    inner = data.draw(st.integers(0, high - low))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "GROUP_BYTES", group_bytes)
        patch.setattr(parquet, "SHARD_BYTES", 4 * group_bytes)
        whole = write(tmp_path / "whole", everything(lengths))
        cut(
            whole, tmp_path / "once", requests=f"{low}-{low + inner}", layers="2-4", phase="prefill"
        )
        half = cut(whole, tmp_path / "half", requests=f"{low}-{high}", layers="2-4")
        cut(half, tmp_path / "twice", first=inner + 1, phase="prefill")
        assert_same_bytes(tmp_path / "once", tmp_path / "twice")


def test_all_of_a_trace_is_the_trace(whole, tmp_path):
    cut(whole, tmp_path / "part", first=len(LENGTHS))
    assert_same_bytes(whole.folder, tmp_path / "part")


def test_columns_are_left_out_only_when_named(whole, tmp_path):
    reader = cut(whole, tmp_path / "part", first=2, leave_out=("scores", "pre_attention"))
    assert set(reader.columns) == {"experts", "weights", "gate_inputs"}
    assert "left out: scores" in reader.provenance.notes
    with pytest.raises(FormatError, match=r"expected among \['gate_inputs'.* got \['score'\]"):
        cut(whole, tmp_path / "other", first=2, leave_out=("score",))


def test_what_was_measured_on_the_whole_is_no_fact_of_the_part(tmp_path):
    told = Provenance(
        "real", "test", facts={"agreement": 0.5}, dropped_rows={"cut": 90}, notes=("a note",)
    )
    whole = write(tmp_path / "whole", everything(LENGTHS), provenance=told)
    said = cut(whole, tmp_path / "part", requests=[1, 4]).provenance
    assert set(said.facts) == {"duplicate_requests", "requests_with_gaps"}
    assert not said.dropped_rows, "else a part would seem to have lost more than it holds"
    text = json.dumps(said.notes)
    assert "agreement=0.5" in text and "cut (rows)=90" in text and "a note" in text
    assert "requests=1,4; 2 of 8 requests" in text
    assert len(said.inputs["trace"]) == 16 and said.kind == "real"


def test_arrays_of_all_layers_together_are_left_out_by_name(tmp_path):
    whole = write(tmp_path / "whole", everything(LENGTHS))
    save_file({"x": np.ones(3)}, whole.folder / "transitions.safetensors")
    assert cut(whole, tmp_path / "a", first=1).beside("transitions")["x"].tolist() == [1, 1, 1]
    reader = cut(whole, tmp_path / "b", layers=2)
    assert not (reader.folder / "transitions.safetensors").exists()
    assert "left out: transitions, which belongs to all layers together" in reader.provenance.notes


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"domains": ("laws",)}, r"\['laws'\] are none of this trace; it has \['law', 'code'\]"),
        ({"requests": [8]}, "requests: 8 is none of this trace; it has 8, from 0 on"),
        ({"requests": "3-1"}, r"expected numbers and ranges such as \[3, 7-9\], got '3-1'"),
        ({"layers": 3}, r"layers: 3 is none of this trace; its layers are \[1, 2, 4\]"),
        ({"layers": "middle:1"}, "expected decoder:N or encoder:N"),
        ({"phase": "both"}, "phase: expected one of"),
        ({"first": 0}, "first=0: must be at least 1"),
        ({"drawn": 9}, "drawn=9: only 8 requests are left to draw from"),
        ({"tokens": 3}, "tokens=3: the first request that is left has 4 rows already"),
        ({"requests": 4, "phase": "decode"}, "nothing is left of requests=4, phase=decode"),
    ],
)
def test_what_cannot_be_had_is_said_and_leaves_nothing(whole, tmp_path, asked, message):
    with pytest.raises(ConfigError, match=message):
        cut(whole, tmp_path / "part", **asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_ranges_that_reach_past_the_trace_are_said(whole, tmp_path):
    asked = Selection(layers="0-2,4", requests="6-9")
    done = subset(whole.folder, tmp_path / "part", asked)
    assert done.said[:2] == (
        "layers 0-2: the trace has 1 to 4",
        "requests 6-9: the trace has 0 to 7",
    )
    assert done.requests == 2 and TraceReader(tmp_path / "part").card.layer_numbers == (1, 2, 4)
    assert not subset(whole.folder, tmp_path / "b", Selection(layers="2-4", requests="0-7")).said


def test_nothing_is_written_into_what_is_read(whole):
    before = files_of(whole.folder)
    with pytest.raises(ConfigError, match=r"part: lies inside .*whole, which is read"):
        cut(whole, whole.folder / "part", first=1)
    assert files_of(whole.folder) == before


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)).map(sorted), min_size=1))
def test_ranges_mean_the_same_as_words_and_as_text(pairs):
    words = [f"{low}-{high}" for low, high in pairs]
    assert ranges_of(words, "x") == ranges_of(",".join(words), "x") == tuple(map(tuple, pairs))
