"""route_trace v1: rows become tokens, whatever their order, their columns, and the size of a block."""

import numpy as np
import pytest

from prefetch.errors import FormatError
from prefetch.sources import route_csv as module
from prefetch.sources.route_csv import RouteCsv
from prefetch.trace.routing import no_expert

L, K, E = 2, 2, 8
HEADER = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
PREAMBLE = [
    "# route_trace v1",
    f"# model=/models/tiny.gguf arch=tiny n_layer=3 n_expert={E} n_expert_used={K}",
    "# layer=2 expert_bytes=200 dense_bytes=20",
    "# layer=1 expert_bytes=100 dense_bytes=10",
]


def rows(turn=0, prompt=3, decode=2, seed=0):
    """(lines, ids_TLK): prefill layer by layer, as an engine runs it; the last layer sees one prompt token."""
    rng = np.random.default_rng(seed)
    ids = rng.random((prompt + decode, L, E)).argsort(axis=2)[..., :K]
    tokens = [(t, layer, 0) for layer in range(L) for t in range(prompt)]
    tokens += [(t, layer, 1) for t in range(prompt, prompt + decode) for layer in range(L)]
    lines = []
    for t, layer, phase in tokens:
        if phase == 0 and layer == L - 1 and t < prompt - 1:
            ids[t, layer] = no_expert(E)
            continue
        lines += [
            f"{turn},{phase},{t},{layer + 1},{k},{ids[t, layer, k]},{0.75 - k / 2},{phase},{100 * (1 - phase)}"
            for k in range(K)
        ]
    return lines, ids


def write(path, lines, header=HEADER, preamble=PREAMBLE):
    path.write_text("\n".join([*preamble, header, *lines]) + "\n")
    return str(path)


@pytest.mark.parametrize("block_bytes", [300, 8 << 20])
def test_turns_are_requests(collect, tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    (first, ids), (second, more) = rows(), rows(turn=1, prompt=1, decode=3, seed=1)
    reader = collect(RouteCsv(path=write(tmp_path / "a.csv", first + second)))
    trace = reader.load("weights")
    np.testing.assert_array_equal(trace.ids_TLK, np.concatenate([ids, more]))
    assert trace.request_T.tolist() == [0] * 5 + [1] * 4
    assert trace.phase_T.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 1]
    assert trace.weights_TLK[3].tolist() == [[0.75, 0.25]] * L


def test_the_preamble_becomes_the_card(collect, tmp_path):
    card = collect(RouteCsv(path=write(tmp_path / "a.csv", rows()[0]))).card
    assert (card.name, card.n_experts, card.top_k) == ("tiny.gguf", E, K)
    assert (card.layer_numbers, card.expert_bytes_L) == ((1, 2), (100, 200))
    assert card.dense_bytes == 30


def test_what_the_recording_cache_held_becomes_facts(collect, tmp_path):
    lines, ids = rows()
    facts = collect(RouteCsv(path=write(tmp_path / "a.csv", lines))).provenance.facts
    lookups = len(np.unique(ids[:3, 0])) + K  # every expert once per layer of the pass
    assert facts["recorded_prefill_lookups"] == lookups and facts["recorded_prefill_hits"] == 0
    assert facts["recorded_decode_lookups"] == facts["recorded_decode_hits"] == 2 * L * K
    assert facts["recorded_hit_rate"] == 2 * L * K / (lookups + 2 * L * K)


def test_columns_are_read_by_name_and_new_ones_ignored(collect, tmp_path):
    lines, ids = rows()
    turned = [",".join(["x", *reversed(line.split(","))]) for line in lines]
    header = ",".join(["dropped", *reversed(HEADER.split(","))])
    trace = collect(RouteCsv(path=write(tmp_path / "a.csv", turned, header))).load()
    np.testing.assert_array_equal(trace.ids_TLK, ids)
    bare = [",".join(line.split(",")[:6]) for line in lines]
    path = write(tmp_path / "b.csv", bare, "turn,phase,step,layer,slot,expert")
    assert "weights" not in collect(RouteCsv(path=path)).columns


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], r"step 4, layer 2: expected 2 choices, got 1"),
        (lambda lines: lines[:-K], r"step 4, layer 2: expected 2 choices, got 0"),
        (lambda lines: [*lines, lines[0]], r"1 rows repeat"),
        (lambda lines: [*lines, "0,1,9,7,0,1,1,1,0"], r"layer 7: the preamble"),
        (lambda lines: [*lines, "0,1,9,1,2,1,1,1,0"], r"expected slots from 0 to 1"),
        (lambda lines: [*lines, "0,1,9,1,0,88,1,1,0", "0,1,9,1,1,3,1,1,0"], r"layer 2: expected 2"),
        (lambda lines: [*lines, "0,1,9,1,zero,1,1,1,0"], r"zero"),
        (lambda lines: [*lines, "0,1,9,1"], r"[Ee]xpected 9 columns"),
        (lambda lines: [lines[0].replace("0,0,0", "0,2,0", 1), *lines[1:]], r"phase: expected 0"),
        (
            lambda lines: [*lines, *(f"1{line[1:]}" for line in lines), *lines],
            r"request 0.*together",
        ),
    ],
)
def test_damaged_rows_are_refused(collect, tmp_path, change, message):
    path = write(tmp_path / "a.csv", change(rows()[0]))
    with pytest.raises(FormatError, match=rf"a\.csv.*{message}"):
        collect(RouteCsv(path=path))


@pytest.mark.parametrize(
    ("preamble", "message"),
    [
        (["# route_trace v2", *PREAMBLE[1:]], "line 1: expected '# route_trace v1'"),
        (PREAMBLE[:1], "missing.*n_expert"),
        (PREAMBLE[:2], "one per layer"),
        ([*PREAMBLE[:2], "# layer=1 dense_bytes=3"], "expert_bytes"),
        ([], "expected '# route_trace v1'"),
    ],
)
def test_a_preamble_that_is_none_is_refused(collect, tmp_path, preamble, message):
    path = write(tmp_path / "a.csv", rows()[0], preamble=preamble)
    with pytest.raises(FormatError, match=rf"a\.csv.*{message}"):
        collect(RouteCsv(path=path))
