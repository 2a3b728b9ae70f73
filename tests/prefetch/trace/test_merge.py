"""Traces of one model put together: what was cut apart comes together in the same bytes, and nothing else is mixed."""

import dataclasses
import itertools

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

from prefetch.artifacts import Outside
from prefetch.errors import ConfigError, FormatError
from prefetch.trace import parquet
from prefetch.trace.checks import check_trace
from prefetch.trace.merge import merge
from prefetch.trace.parquet import TraceReader, concat
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.selection import Selection
from prefetch.trace.subset import subset


def put(folders, to, **how) -> TraceReader:
    done = merge(folders, to, **how)
    reader = TraceReader(to)
    assert (done.tokens, done.requests) == (reader.n_tokens, reader.n_requests)
    check_trace(reader)
    return reader


@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=3, max_size=12),
    group_bytes=st.sampled_from([300, 2000, 1 << 24]),
    cuts=st.sets(st.integers(1, 11), min_size=1, max_size=3),
)
def test_what_was_cut_by_requests_comes_together_in_the_same_bytes(
    lengths, group_bytes, cuts, tmp_path_factory
):
    """Whatever the row groups and shards, and wherever it was cut."""
    tmp_path, n = tmp_path_factory.mktemp("law"), len(lengths)
    edges = sorted({0, n, *(cut for cut in cuts if cut < n)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "GROUP_BYTES", group_bytes)
        patch.setattr(parquet, "SHARD_BYTES", 4 * group_bytes)
        whole = write(tmp_path / "whole", everything(lengths), routers=True)
        parts = []
        for low, high in itertools.pairwise(edges):
            parts.append(tmp_path / f"part {low}")
            subset(whole, parts[-1], Selection(requests=f"{low}-{high - 1}"))
        if len(parts) > 1:
            put(parts, tmp_path / "again")
            assert_same_bytes(whole.folder, tmp_path / "again")


def test_requests_are_numbered_on_and_domains_kept(tmp_path):
    a, b = (write(tmp_path / name, everything([3, 5, 2], seed)) for seed, name in enumerate("ab"))
    trace = put([a.folder, b], tmp_path / "m").load(*EVERYTHING)
    second = b.load(*EVERYTHING)
    moved = {**vars(second), "request_T": second.request_T + np.int32(3)}
    assert_same_rows(trace, concat([a.load(*EVERYTHING), RoutingTrace(**moved)]))


def test_a_domain_for_each(tmp_path):
    readers = [write(tmp_path / name, everything([3, 5], seed)) for seed, name in enumerate("ab")]
    merged = put(readers, tmp_path / "m", domains=["medicine", None])
    assert domains_of(merged.load()) == ["medicine"] * 8 + [None] * 3 + ["law"] * 5
    assert merged.domains == ("medicine", "law")
    assert "trace 1: its domain was set to medicine" in merged.provenance.notes
    with pytest.raises(ConfigError, match="expected one for each of the 2 traces"):
        put(readers, tmp_path / "n", domains=["medicine"])


def test_the_provenance_names_every_input_with_its_key(tmp_path):
    told = [
        Provenance(
            "real",
            "esft",
            versions={"numpy": version},
            seed=1,
            inputs={"a.txt": digest},
            dropped_rows={"cut": 2},
            notes=("assumed", note),
            facts={"agreement": 0.5},
        )
        for version, digest, note in (("2.0", "d1", "one"), ("2.1", "d2", "two"))
    ]
    readers = [
        write(tmp_path / name, everything([9, 9], seed), provenance=own)
        for seed, (name, own) in enumerate(zip("ab", told, strict=True))
    ]
    said = put(readers, tmp_path / "m").provenance
    keys = [Outside("trace", reader.folder).key for reader in readers]
    assert said.inputs == {
        "trace 1": keys[0],
        "trace 1: a.txt": "d1",
        "trace 2": keys[1],
        "trace 2: a.txt": "d2",
    }
    assert said.versions == {"numpy": "2.0, 2.1"} and said.source == "esft" and said.seed == 1
    assert said.dropped_rows == {"cut": 4}
    assert said.notes.count("assumed") == 1 and {"one", "two"} < set(said.notes)
    assert "measured on trace 2: agreement=0.5" in said.notes
    assert set(said.facts) == {"duplicate_requests", "requests_with_gaps"}


def test_a_request_that_stands_in_both_is_counted_as_a_repetition(tmp_path):
    same = everything([9, 12])
    merged = put([write(tmp_path / "a", same), write(tmp_path / "b", same)], tmp_path / "m")
    assert merged.provenance.facts["duplicate_requests"] == 2


@pytest.mark.parametrize(
    ("field", "value", "ours"),
    [
        ("name", "other", "'toy/model'"),
        ("layer_numbers", (1, 2, 3), r"\(1, 2, 4\)"),
        ("expert_bytes_L", None, r"\(10, 20, 40\)"),
        ("routed_precision", "bf16", "None"),
        ("kv_bytes_per_token", 4, "None"),
    ],
)
def test_another_model_is_refused_by_the_field_that_differs(tmp_path, field, value, ours):
    card = dataclasses.replace(CARD, **{field: value})
    folders = [write(tmp_path / "a", everything([4])).folder]
    folders.append(write(tmp_path / "b", everything([4], card=card)).folder)
    message = rf"b: not the same model: {field} is .*{str(value)[1:3]}.*a it is {ours}"
    with pytest.raises(FormatError, match=message):
        put(folders, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_drawn_and_recorded_routing_are_never_mixed(tmp_path):
    readers = [write(tmp_path / kind, everything([4]), kind=kind) for kind in ("real", "synthetic")]
    with pytest.raises(FormatError, match=r"synthetic: is synthetic, .*real is real: drawn and"):
        put(readers, tmp_path / "m")


def test_routers_that_differ_are_another_model(tmp_path):
    a, b = (write(tmp_path / n, everything([4], s), routers=True) for s, n in enumerate("ab"))
    assert put([a, b], tmp_path / "m").router_weights()[4].max() == 4
    save_file({"layer.1": np.ones((16, 5), np.float32)}, b.folder / "router_weights.safetensors")
    with pytest.raises(FormatError, match=r"b: its router_weights differ from those of"):
        put([a, b], tmp_path / "n")
    (b.folder / "router_weights.safetensors").unlink()
    notes = put([a, b], tmp_path / "o").provenance.notes
    assert "router_weights: from a; not all of the traces have it" in notes


def test_drawn_chains_that_differ_are_left_out_by_name(tmp_path):
    readers = [
        write(tmp_path / n, everything([4], s), kind="synthetic") for s, n in enumerate("ab")
    ]
    for number, reader in enumerate(readers):
        save_file({"steps": np.full(2, number)}, reader.folder / "transitions.safetensors")
    merged = put(readers, tmp_path / "m")
    assert not (merged.folder / "transitions.safetensors").exists()
    assert any(
        note.startswith("left out: transitions, which differs") for note in merged.provenance.notes
    )


def test_columns_that_not_all_have_alike_are_left_out_by_name(tmp_path):
    plain = {"weights_TLK": None, "pre_attention_TLD": None}
    wide = {"gate_inputs_TLD": np.zeros((4, 3, 6), np.float16)}
    a = write(tmp_path / "a", everything([4]))
    b = write(tmp_path / "b", everything([4], 1, **plain, **wide))
    merged = put([a, b], tmp_path / "m")
    assert set(merged.columns) == {"experts", "scores"}
    text = "\n".join(merged.provenance.notes)
    assert f"left out: weights, which {b.folder} has not recorded" in text
    assert "left out: gate_inputs, recorded in unequal shapes [3, 5], [3, 6]" in text


def test_scores_go_with_their_ids(tmp_path):
    best = {
        "scores_TLM": np.ones((4, 3, 3), np.float16),
        "score_ids_TLM": np.tile(np.arange(3, dtype=np.uint8), (4, 3, 1)),
    }
    a, b = write(tmp_path / "a", everything([4])), write(tmp_path / "b", everything([4], 1, **best))
    c = write(tmp_path / "c", everything([4], 2, **best))
    assert not {"scores", "score_ids"} & set(put([a, b], tmp_path / "m").columns)
    assert {"scores", "score_ids"} < set(put([b, c], tmp_path / "n").columns)
    assert not {"scores", "score_ids"} & set(
        put([b, c], tmp_path / "o", leave_out=("scores",)).columns
    )


def test_one_trace_or_one_twice_is_a_mistake(tmp_path):
    a = write(tmp_path / "a", everything([4]))
    with pytest.raises(ConfigError, match="expected two traces or more, got 1"):
        put([a], tmp_path / "m")
    (tmp_path / "link").symlink_to(a.folder)
    with pytest.raises(ConfigError, match="a is named twice"):
        put([a.folder, tmp_path / "link"], tmp_path / "m")


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    readers = [write(tmp_path / n, everything([4, 9], s)) for s, n in enumerate("ab")]
    one, two = (put(readers, tmp_path / name) for name in "mn")
    assert files_of(one.folder) == files_of(two.folder)
