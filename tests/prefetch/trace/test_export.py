"""What is exported comes back equal through our own readers, and what a format cannot hold is said and counted."""

import dataclasses
import json
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from whole_traces import CARD, assert_same_rows, domains_of, everything, files_of, write

from prefetch.errors import ConfigError, FormatError
from prefetch.sources.arrays import Arrays
from prefetch.sources.counts import Counts
from prefetch.sources.esft import Esft
from prefetch.sources.llama_imatrix import LlamaImatrix
from prefetch.sources.route_csv import RouteCsv
from prefetch.sources.vllm import Vllm
from prefetch.trace import parquet
from prefetch.trace.card import plain_card
from prefetch.trace.counts import ExpertCounts
from prefetch.trace.export import OF_COUNTS, export, export_counts
from prefetch.trace.exports.counts import count_experts
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import no_expert
from prefetch.trace.selection import Selection
from prefetch.trace.subset import subset

LENGTHS = [4, 3, 7, 5, 1, 6, 2, 9]
NONE = no_expert(16)


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 900)
    monkeypatch.setattr(parquet, "SHARD_BYTES", 3000)


def executed(**known):
    """A trace in which every row ran, since other formats do not tell."""
    return everything(LENGTHS, executed_T=True, **known)


def alone(trace):
    """Only what source=arrays reads back."""
    others = ("scores_TLM", "gate_inputs_TLD", "pre_attention_TLD")
    return dataclasses.replace(trace, **dict.fromkeys(others))


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_arrays_come_back(tmp_path, collect, small_groups, suffix):
    trace = executed()
    trace.ids_TLK[5, 1] = NONE
    done = export(write(tmp_path / "t", trace), tmp_path / f"x{suffix}")
    back = collect(Arrays(path=str(done.path), n_experts=16))
    named = dataclasses.replace(trace, domains=("law", "code", ""), domain_T=trace.domain_T % 3)
    assert_same_rows(back.load("weights"), alone(named))
    assert back.card.layer_numbers == (1, 2, 4)
    text = "\n".join(done.said)
    assert f"{sum(n is None for n in domains_of(trace))} rows have no domain" in text
    assert "not read back by source=arrays: scores, gate_inputs, pre_attention" in text
    assert "executed" not in text, "every row was"


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_everything_recorded_stands_in_the_arrays(tmp_path, small_groups, suffix):
    trace = everything(LENGTHS)
    reader = write(tmp_path / "t", trace, routers=True)
    done = export(reader, tmp_path / f"x{suffix}")
    if suffix == ".npz":
        with np.load(done.path) as file:
            found, about = dict(file), json.loads(str(file["about"]))
    else:
        table = pq.read_table(done.path)
        found = {n: np.array(table.column(n).to_pylist()) for n in table.column_names}
        about = json.loads(table.schema.metadata[b"prefetch"])
    for name in ("scores", "gate_inputs", "weights", "pre_attention"):
        field = {"weights": "weights_TLK", "scores": "scores_TLM"}.get(name, f"{name}_TLD")
        np.testing.assert_array_equal(found[name].astype(np.float16), getattr(trace, field))
    np.testing.assert_array_equal(found["executed"], trace.executed_T)
    np.testing.assert_array_equal(found["token"], trace.token_T)
    assert about["card"]["expert_bytes_L"] == [10, 20, 40]
    assert about["provenance"]["source"] == "test"
    text = "\n".join(done.said)
    assert f"{int((~trace.executed_T).sum())} rows were not executed" in text
    assert "left out: router_weights, which stands beside the rows" in text


def test_scores_of_the_best_keep_their_ids(tmp_path):
    n = sum(LENGTHS)
    best = {
        "scores_TLM": np.linspace(0, 1, n * 9).reshape(n, 3, 3).astype(np.float16),
        "score_ids_TLM": np.tile(np.array([0, 1, NONE], np.uint8), (n, 3, 1)),
    }
    reader = write(tmp_path / "t", executed(**best))
    with np.load(export(reader, tmp_path / "x.npz").path) as file:
        np.testing.assert_array_equal(file["scores"], best["scores_TLM"])
        assert file["score_ids"][4, 1].tolist() == [0, 1, -1]


def test_columns_are_left_out_only_when_named(tmp_path):
    reader = write(tmp_path / "t", executed())
    done = export(reader, tmp_path / "x.npz", leave_out=("gate_inputs", "scores"))
    with np.load(done.path) as file:
        assert "gate_inputs" not in file and "scores" not in file and "weights" in file
    assert {"left out: gate_inputs, as asked", "left out: scores, as asked"} < set(done.said)


@pytest.mark.parametrize("format", ["route_csv", "esft", "vllm", "counts"])
def test_every_column_that_a_format_does_not_hold_is_said(tmp_path, format):
    reader = write(tmp_path / "t", executed(), routers=True)
    to = (
        tmp_path
        / {"route_csv": "x.csv", "esft": "x", "vllm": "x.jsonl", "counts": "x.json"}[format]
    )
    lost = "not held: scores, gate_inputs, pre_attention, router_weights, which the trace has"
    assert lost in export(reader, to, format).said
    (bare := tmp_path / "bare").mkdir()
    plain = write(tmp_path / "u", alone(executed()))
    assert not [
        line for line in export(plain, bare / to.name, format).said if "which the trace" in line
    ]


def test_a_trace_without_domains_takes_the_name_of_the_file(tmp_path, collect):
    trace = dataclasses.replace(executed(), domains=(), domain_T=np.full(37, -1, np.int32))
    done = export(write(tmp_path / "t", trace), tmp_path / "law.npz")
    assert "no domains: read back, the file's name becomes the domain" in done.said
    assert collect(Arrays(path=str(done.path), n_experts=16)).domains == ("law",)


def test_many_experts_need_wider_numbers(tmp_path, collect):
    card = plain_card("wide", n_experts=40000, top_k=2, layer_numbers=(0,))
    ids = np.array([[[39999, 0]], [[7, 8]]])
    trace = everything([2], card=dataclasses.replace(card, n_experts=16))
    trace = type(trace)(
        card=card,
        ids_TLK=ids.astype(np.uint16),
        **{n: getattr(trace, n) for n in ("request_T", "position_T", "phase_T", "executed_T")},
        token_T=trace.token_T,
        domain_T=trace.domain_T,
        domains=trace.domains,
    )
    for suffix in (".npz", ".parquet"):
        done = export(write(tmp_path / suffix, trace), tmp_path / f"x{suffix}")
        back = collect(Arrays(path=str(done.path), n_experts=40000))
        np.testing.assert_array_equal(back.load().ids_TLK, ids)


def test_route_csv_comes_back(tmp_path, collect, small_groups):
    trace = executed()
    trace.ids_TLK[1, 2], trace.weights_TLK[1, 2] = NONE, 0  # prefill, last layer: allowed
    trace.weights_TLK[:3, 0, 0] = [6e-8, 65504, 0.33333]  # the smallest and the largest of float16
    done = export(write(tmp_path / "t", trace), tmp_path / "x.csv")
    back = collect(RouteCsv(path=str(done.path)))
    unknown = {"domains": ("x",), "domain_T": np.zeros(37, np.int32)}
    unknown["token_T"] = np.full(37, -1, np.int32)
    assert_same_rows(back.load("weights"), alone(dataclasses.replace(trace, **unknown)))
    card = back.card
    assert (card.layer_numbers, card.expert_bytes_L) == ((1, 2, 4), (10, 20, 40))
    assert (card.n_experts, card.top_k, card.name) == (16, 2, "model")
    assert "the model's name is read back as model, not toy/model" in done.said
    assert "the dense bytes of the model are not known: written as 0" in done.said


def test_route_csv_counts_what_it_leaves_out(tmp_path, collect):
    trace = everything(LENGTHS, executed_T=~np.isin(np.arange(37), [0, 9]))
    trace.ids_TLK[3, 0, 1] = trace.ids_TLK[6, 2] = NONE  # half a choice; none in decode
    done = export(write(tmp_path / "t", trace), tmp_path / "x.csv")
    assert "left out: 2 rows that were not executed" in done.said
    assert "left out: 2 tokens with fewer than k choices in some layer" in done.said
    back = collect(RouteCsv(path=str(done.path))).load("weights")
    kept = np.setdiff1d(np.arange(37), [0, 9, 3, 6])
    np.testing.assert_array_equal(back.ids_TLK, trace.ids_TLK[kept])
    np.testing.assert_array_equal(back.weights_TLK, trace.weights_TLK[kept])
    np.testing.assert_array_equal(back.position_T, trace.position_T[kept])


def test_route_csv_wants_sizes_and_one_decoder(tmp_path):
    for name, card, message in (
        ("a", dataclasses.replace(CARD, expert_bytes_L=None), "which the model card does not know"),
        ("b", dataclasses.replace(CARD, layer_stacks=("encoder",) * 3), "layers of one decoder"),
    ):
        reader = write(tmp_path / name, everything([4], card=card))
        with pytest.raises(FormatError, match=message):
            export(reader, tmp_path / "x.csv")
    assert not list(tmp_path.glob("*.csv*"))


def test_esft_comes_back_by_domain(tmp_path, collect, small_groups):
    trace = executed(phase_T=0, token_T=-1)
    trace.weights_TLK[:3, 0, 0] = [6e-8, 65504, 0.33333]  # the smallest and the largest of float16
    reader = write(tmp_path / "t", trace)
    done = export(reader, tmp_path / "texts", "esft")
    assert sorted(p.name for p in done.path.iterdir()) == ["all", "code", "law"]
    back = collect(Esft(path=str(done.path), top_k=2, n_experts=16))
    order = [r for d in (-1, 1, 0) for r in range(8) if r % 3 - 1 == d]  # all, code, law
    rows = np.concatenate([np.flatnonzero(trace.request_T == r) for r in order])
    lengths = np.array(LENGTHS)[order]
    moved = dataclasses.replace(
        alone(trace.rows(rows)),
        request_T=np.repeat(np.arange(8), lengths).astype(np.int32),
        domains=("law", "code", "all"),
    )
    moved = dataclasses.replace(moved, domain_T=moved.domain_T % 3)
    assert_same_rows(back.load("weights"), moved)
    assert back.card.layer_numbers == (1, 2, 4)


def test_esft_counts_what_it_leaves_out_and_what_it_turns_into_prompts(tmp_path, collect):
    trace = everything(LENGTHS, executed_T=~np.isin(np.arange(37), [5, 30]))
    trace.ids_TLK[3, 0, 1] = NONE
    reader = write(tmp_path / "t", trace)
    done = export(reader, tmp_path / "texts", "esft")
    text = "\n".join(done.said)
    assert "left out: 3 rows without all k choices, or not executed" in text
    assert f"{int(trace.phase_T.sum())} decode rows are read back as prefill" in text
    assert collect(Esft(path=str(done.path), top_k=2, n_experts=16)).n_tokens == 34
    bare = write(tmp_path / "bare", executed(weights_TLK=None))
    with pytest.raises(FormatError, match="holds weights, which were not recorded"):
        export(bare, tmp_path / "other", "esft")
    assert not (tmp_path / "other").exists()


def test_domains_that_are_no_folder_names_stay_apart(tmp_path, collect):
    trace = dataclasses.replace(executed(), domains=("../a", ".._a"))
    done = export(write(tmp_path / "t", trace), tmp_path / "texts", "esft")
    assert sorted(p.name for p in done.path.iterdir()) == ["_a", "_a_", "all"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "texts"]


def test_responses_come_back(tmp_path, collect, small_groups):
    """Prompts with a cached start, generated tokens, ids of tokens; and requests that are all generated."""
    first = everything(LENGTHS).position_T
    trace = everything(LENGTHS, executed_T=first > 0, token_T=first + 5)
    trace.ids_TLK[5, 1] = NONE
    for name, own in (("whole", trace), ("tail", trace.rows(trace.phase_T == 1))):
        reader = write(tmp_path / name, own)
        done = export(reader, tmp_path / f"{name}.jsonl")
        back = collect(Vllm(path=str(done.path), n_experts=16)).load()
        others = {"weights_TLK": None, "domains": (name,), "domain_T": np.zeros_like(own.domain_T)}
        others |= {"request_T": reader.load().request_T}
        if name == "tail":
            others["token_T"] = np.full_like(own.token_T, -1)
        assert_same_rows(back, alone(dataclasses.replace(own, **others)))


def test_requests_that_are_no_response_are_counted(tmp_path, collect):
    trace = everything(LENGTHS, executed_T=True, token_T=3)
    position_T, phase_T, token_T = (
        getattr(trace, name).copy() for name in ("position_T", "phase_T", "token_T")
    )
    position_T[3] = 9  # a gap in request 0
    phase_T[7:14] = 1
    phase_T[9] = 0  # a prompt after generated tokens in request 2
    token_T[15] = -1  # request 3
    odd = dataclasses.replace(trace, position_T=position_T, phase_T=phase_T, token_T=token_T)
    done = export(write(tmp_path / "t", odd), tmp_path / "x.jsonl")
    assert any(
        line.startswith("left out: 2 requests: a response has positions") for line in done.said
    )
    assert "1 requests do not know all their token ids: written without" in done.said
    assert collect(Vllm(path=str(done.path), n_experts=16)).n_requests == 6
    with pytest.raises(FormatError, match="no request can be written as a response"):
        export(write(tmp_path / "u", odd.rows(slice(0, 4))), tmp_path / "y.jsonl")
    assert not (tmp_path / "y.jsonl").exists()


def count(source):
    return source.count(Provenance("real", "counts"))


@pytest.mark.parametrize("format", [name for name in OF_COUNTS if name != "imatrix"])
def test_counts_come_back(tmp_path, small_groups, format):
    trace = everything(LENGTHS)
    reader = write(tmp_path / "t", trace)
    done = export(reader, tmp_path / ("x.npz" if format == "counts_npz" else "x.json"), format)
    back = count(Counts(path=str(done.path), top_k=2))
    run = trace.rows(trace.executed_T)
    expected = [np.bincount(run.ids_TLK[:, i].ravel(), minlength=16) for i in range(3)]
    np.testing.assert_array_equal(back.counts_LE, expected)
    assert (back.card.layer_numbers, back.card.n_experts, back.card.top_k) == ((1, 2, 4), 16, 2)
    assert f"left out: {int((~trace.executed_T).sum())} rows that were not executed" in done.said


def test_an_importance_matrix_comes_back(tmp_path):
    pytest.importorskip("gguf")
    reader = write(tmp_path / "t", everything(LENGTHS))
    done = export(reader, tmp_path / "x.gguf")
    back = count(LlamaImatrix(path=str(done.path), top_k=2))
    np.testing.assert_array_equal(back.counts_LE, count_experts(reader).counts.counts_LE)
    assert back.card.layer_numbers == (1, 2, 4)
    assert any(line.startswith("no in_sum2") for line in done.said)


def test_a_locality_file_keeps_domains_and_k(tmp_path):
    trace = executed()
    done = export(write(tmp_path / "t", trace), tmp_path / "x.json", "locality")
    law = count(Counts(path=str(done.path), family="law"))
    rows = trace.rows(trace.domain_T == 0)
    np.testing.assert_array_equal(
        law.counts_LE[2], np.bincount(rows.ids_TLK[:, 2].ravel(), minlength=16)
    )
    assert law.card.top_k == 2, "the file says it"
    trace.ids_TLK[3, 0, 1] = NONE
    with pytest.raises(FormatError, match="some tokens have fewer than k=2 choices"):
        export(write(tmp_path / "u", trace), tmp_path / "y.json", "locality")


def test_specmoe_statistics_have_their_fields(tmp_path):
    reader = write(tmp_path / "t", everything(LENGTHS))
    done = export(reader, tmp_path / "x.json", "specmoe_dense")
    about = json.loads(done.path.read_text())
    assert list(about) == [
        "format", "dimensions", "num_experts", "layers", "expert_usage_by_layer", "layer_analysis"
    ]  # fmt: skip
    row_E = count_experts(reader).counts.counts_LE[0]
    told = about["layer_analysis"]["1"]
    share = row_E[row_E > 0] / row_E.sum()
    assert told["entropy"] == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-12)
    assert told["total_usage"] == row_E.sum() and told["active_experts"] == (row_E > 0).sum()
    assert told["top_5_experts"][0] == [str(row_E.argmax()), int(row_E.max())]
    assert any("best expert of a token alone" in line for line in done.said)


def test_counts_that_never_had_an_order_are_written_as_counts_only(tmp_path):
    card = plain_card("c", n_experts=4, top_k=2, layer_numbers=(3, 5))
    found = ExpertCounts(card, np.array([[3, 0, 5, 4], [6, 2, 0, 4]]), Provenance("real", "x"))
    for name in ("x.npz", "x.json"):
        back = count(Counts(path=str(export_counts(found, tmp_path / name).path), top_k=2))
        np.testing.assert_array_equal(back.counts_LE, found.counts_LE)
    done = export_counts(found, tmp_path / "y.json", "locality")
    assert count(Counts(path=str(done.path))).card.top_k == 2
    with pytest.raises(ConfigError, match="format=parquet: holds the order of choices"):
        export_counts(found, tmp_path / "x.parquet")


def test_drawn_routing_is_said_to_be_drawn(tmp_path):
    reader = write(tmp_path / "t", executed(), kind="synthetic")
    assert any(
        line.startswith("drawn routing:") for line in export(reader, tmp_path / "x.npz").said
    )


def test_two_stacks_with_the_same_numbers_are_refused_where_numbers_tell_layers(tmp_path):
    card = dataclasses.replace(
        CARD, layer_numbers=(1, 2, 1), layer_stacks=("encoder",) * 2 + ("decoder",)
    )
    reader = write(tmp_path / "t", everything([4], card=card))
    for name, format in (("x.json", "counts"), ("x", "esft")):
        with pytest.raises(FormatError, match="two layers have the same number"):
            export(reader, tmp_path / name, format)


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("x.bin", None, "which format"),
        ("x.npz", "csv", "format=csv: expected one of npz, parquet, route_csv, esft, vllm, counts"),
        ("x.npz", "parquet", r"a file of format parquet ends in \.parquet"),
    ],
)
def test_a_format_that_does_not_exist_is_said(tmp_path, name, format, message):
    reader = write(tmp_path / "t", executed())
    with pytest.raises(ConfigError, match=message):
        export(reader, tmp_path / name, format)


@pytest.mark.parametrize("name", ["x.npz", "x.parquet", "x.csv", "x.json", "x.jsonl", "texts"])
def test_the_same_trace_gives_the_same_bytes_and_overwrites_nothing(tmp_path, name):
    reader = write(tmp_path / "t", executed())
    places = [tmp_path / "a" / name, tmp_path / "b" / name]
    format = "esft" if name == "texts" else None
    for place in places:
        export(reader, place, format)
    if name == "texts":
        one, other = ({p.name: files_of(p) for p in place.iterdir()} for place in places)
    else:
        one, other = (place.read_bytes() for place in places)
    assert one == other
    if name == "x.npz":  # which is written in less than the two seconds that a zip can tell
        with zipfile.ZipFile(places[0]) as archive:
            assert {entry.date_time[0] for entry in archive.infolist()} == {1980}
    with pytest.raises(ConfigError, match="is there already"):
        export(reader, places[0], format)


def test_a_real_recording_comes_back(tmp_path, collect, real_data):
    """DeepSeek-V2-Lite as others keep it, through every format that holds tokens."""
    path = real_data / "traces" / "esft-deepseek-v2-lite" / "esft_deepseek_v2_lite_intent.npz"
    whole = collect(Arrays(path=str(path), model_card="deepseek_v2_lite"))
    subset(whole, tmp_path / "part", Selection(first=12))
    part = TraceReader(tmp_path / "part")
    for name, format, source in (
        ("x.npz", None, Arrays(path=str(tmp_path / "x.npz"), n_experts=64)),
        ("x.parquet", None, Arrays(path=str(tmp_path / "x.parquet"), n_experts=64)),
        ("intent.csv", None, RouteCsv(path=str(tmp_path / "intent.csv"))),
        ("texts", "esft", Esft(path=str(tmp_path / "texts"), n_experts=64)),
    ):
        export(part, tmp_path / name, format)
        back, ours = collect(source).load("weights"), part.load("weights")
        np.testing.assert_array_equal(back.ids_TLK, ours.ids_TLK)
        np.testing.assert_array_equal(back.weights_TLK, ours.weights_TLK)
        np.testing.assert_array_equal(back.request_T, ours.request_T)
        assert back.card.layer_numbers == ours.card.layer_numbers == tuple(range(1, 27))
