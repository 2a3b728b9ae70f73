"""Gate inputs: the five distances against scipy, lookahead against a stable sort in float64; no batch matters."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.spatial import distance

from analysis.routing import gates
from analysis.routing.batch import accumulate, batches, plan_of
from analysis.routing.gates import (
    GateDistances,
    Lookahead,
    gate_distances,
    gate_lookahead,
    recorded_gates,
)
from prefetch.errors import FormatError, MissingData
from prefetch.scoring import LEFT_OUT, TEST, TRAIN
from prefetch.sources.tiny_moe import TinyMoE
from prefetch.trace.card import plain_card
from prefetch.trace.parquet import concat
from prefetch.trace.routing import DECODE, PREFILL, trace_of

D = 12


def toy(n_tokens=60, n_layers=4, n_experts=16, top_k=3, n_requests=6, decode=True, seed=0):
    """A trace whose routers are exact: the choices are the best k of the recorded inputs."""
    rng = np.random.default_rng(seed)
    steps_TLD = rng.standard_normal((n_tokens, n_layers, D))
    inputs_TLD = np.cumsum(steps_TLD, axis=1).astype(np.float16)
    weights = {
        3 * i + 1: rng.standard_normal((n_experts, D)).astype(np.float32) for i in range(n_layers)
    }
    logits_TLE = np.stack(
        [
            inputs_TLD[:, i].astype(float) @ w.T.astype(float)
            for i, w in enumerate(weights.values())
        ],
        1,
    )
    card = plain_card("toy", n_experts=n_experts, top_k=top_k, layer_numbers=tuple(weights))
    request_T = np.sort(rng.integers(0, n_requests, n_tokens))
    trace = trace_of(
        card,
        np.argsort(-logits_TLE, axis=-1, kind="stable")[..., :top_k],
        request_T=request_T,
        phase_T=rng.integers(0, 2, n_tokens) if decode else PREFILL,
        gate_inputs_TLD=inputs_TLD,
    )
    return trace, weights


def counted(trace, plan, new, *cuts, max_rows=1 << 16):
    """What one accumulator says of all, or several, cut at those batches, merged."""
    parts = [new() for _ in range(len(cuts) + 1)]
    for i, batch in enumerate(batches(trace, plan, "gate_inputs", max_rows=max_rows)):
        parts[int(np.searchsorted(cuts, i, side="right"))].add(batch)
    for later in parts[1:]:
        parts[0].merge(later)
    return parts[0]


@pytest.mark.parametrize("decode", [True, False])
def test_distances_are_those_of_scipy(decode):
    trace, _ = toy(decode=decode)
    table = gate_distances(trace)
    rows = trace.phase_T == (DECODE if decode else PREFILL)
    assert table.phase.tolist() == ["decode" if decode else "prefill"] * 3
    assert table.layer.tolist() == [1, 4, 7] and table.next_layer.tolist() == [4, 7, 10]
    for i, row in table.iterrows():
        pairs = list(trace.gate_inputs_TLD[rows, i : i + 2].astype(float))
        expected = {
            "cosine_distance": [distance.cosine(a, b) for a, b in pairs],
            "cosine_similarity": [1 - distance.cosine(a, b) for a, b in pairs],
            "euclidean": [distance.euclidean(a, b) for a, b in pairs],
            "l2_normalized": [distance.euclidean(a, b) / np.sqrt(D) for a, b in pairs],
            "pearson": [np.corrcoef(a, b)[0, 1] for a, b in pairs],
            "mean_absolute": [distance.cityblock(a, b) / D for a, b in pairs],
        }
        assert (row.steps, row.undefined) == (rows.sum(), 0)
        for name, values in expected.items():
            assert row[f"{name}_mean"] == pytest.approx(np.mean(values), rel=1e-11), name
            assert row[f"{name}_std"] == pytest.approx(np.std(values), rel=1e-9), name


def test_steps_are_kept_in_order_and_up_to_a_number():
    trace, _ = toy()
    plan = plan_of(trace)
    whole = counted(trace, plan, lambda: GateDistances(plan)).by_step()
    n_pairs, rows = 3, np.flatnonzero(trace.phase_T == DECODE)
    assert whole.request.tolist() == np.repeat(trace.request_T[rows], n_pairs).tolist()
    assert whole.position.tolist() == np.repeat(trace.position_T[rows], n_pairs).tolist()
    a, b = trace.gate_inputs_TLD[rows[0], :2].astype(float)
    assert whole.euclidean[0] == pytest.approx(distance.euclidean(a, b), rel=1e-6)  # float32
    for cuts in ((), (1,), (2, 4)):
        some = counted(trace, plan, lambda: GateDistances(plan, steps=11), *cuts, max_rows=1)
        pd.testing.assert_frame_equal(some.by_step(), whole[: 11 * n_pairs])
    assert counted(trace, plan, lambda: GateDistances(plan, steps=0)).by_step().empty


def test_a_zero_vector_has_no_cosine_but_the_other_distances():
    trace, _ = toy()
    rows = np.flatnonzero(trace.phase_T == DECODE)
    trace.gate_inputs_TLD[rows[:4], 1] = 0
    trace.gate_inputs_TLD[rows[4], 2] = 1.5  # constant: a cosine, but no correlation
    table = gate_distances(trace)
    assert table.undefined.tolist() == [4, 5, 1]
    assert table.steps.tolist() == [len(rows)] * 3
    here, there = (
        trace.gate_inputs_TLD[rows, 0].astype(float),
        trace.gate_inputs_TLD[rows, 1].astype(float),
    )
    assert table.euclidean_mean[0] == pytest.approx(
        np.linalg.norm(here - there, axis=1).mean(), rel=1e-11
    )
    cosines = [1 - distance.cosine(a, b) for a, b in zip(here[4:], there[4:], strict=True)]
    assert table.cosine_similarity_mean[0] == pytest.approx(np.mean(cosines), rel=1e-11)


def test_a_layer_that_did_not_run_has_no_distance_and_no_recall():
    trace, weights = toy()
    rows = np.flatnonzero(trace.phase_T == DECODE)
    trace.gate_inputs_TLD[rows[:7], 1] = 0
    trace.ids_TLK[rows[:7], 1] = 255
    assert gate_distances(trace).steps.tolist() == [len(rows) - 7, len(rows) - 7, len(rows)]
    table = gate_lookahead(trace, weights).query("phase == 'decode'").groupby("horizon").tokens
    assert table.get_group(0).tolist() == [len(rows), len(rows) - 7, len(rows), len(rows)]
    assert table.get_group(1).tolist() == [len(rows) - 7, len(rows) - 7, len(rows)]


def test_equal_inputs_are_at_no_distance():
    trace, _ = toy(n_layers=2)
    trace.gate_inputs_TLD[:, 1] = trace.gate_inputs_TLD[:, 0]
    table = gate_distances(trace)
    for name in ("cosine_similarity", "pearson"):
        assert table[f"{name}_mean"][0] == pytest.approx(1, abs=1e-15)
        assert table[f"{name}_std"][0] == pytest.approx(0, abs=1e-15)
    assert (table.euclidean_mean[0], table.mean_absolute_std[0]) == (0, 0)


@pytest.mark.parametrize("top_k", [1, 3, 9])  # of 16: 2k above E
def test_recall_is_that_of_a_stable_sort(top_k):
    trace, weights = toy(top_k=top_k)
    gates_L = [w.astype(float) for w in weights.values()]
    table = gate_lookahead(trace, weights, horizons=(1, 2))
    assert len(table) == 3 * (4 + 3 + 2)
    for row in table.itertuples():
        here, there = (row.layer - 1) // 3, (row.later_layer - 1) // 3
        assert there - here == row.horizon
        in_phase = {"all": slice(None), "prefill": trace.phase_T == 0, "decode": trace.phase_T == 1}
        x_TD = trace.gate_inputs_TLD[in_phase[row.phase], here].astype(float)
        order_TE = np.argsort(-x_TD @ gates_L[there].T, axis=1, kind="stable")
        true_TK = trace.ids_TLK[in_phase[row.phase], there]
        for width, recall in ((top_k, row.recall_at_k), (2 * top_k, row.recall_at_2k)):
            hits = (true_TK[:, :, None] == order_TE[:, None, :width]).any(-1)
            assert recall == pytest.approx(hits.mean(), abs=1e-15)
        assert row.tokens == len(true_TK)
        if row.horizon == 0:
            assert row.recall_at_k == 1.0, "the control: a gate on its own input"


def test_equal_logits_go_to_the_lower_id():
    trace, weights = toy(n_layers=1, n_experts=4, top_k=1)
    weights[1][2] = weights[1][1]
    chosen = {"lower": 1, "higher": 2}
    recall = {}
    for name, expert in chosen.items():
        ids_TLK = np.where(np.isin(trace.ids_TLK, [1, 2]), expert, trace.ids_TLK).astype(np.uint8)
        logits_TE = trace.gate_inputs_TLD[:, 0].astype(float) @ weights[1].T.astype(float)
        is_tie_T = np.isin(logits_TE.argmax(axis=1), [1, 2])
        tied = replace(trace, ids_TLK=ids_TLK).rows(is_tie_T)
        ids_T = np.full(len(tied.ids_TLK), expert, np.uint8)
        recall[name] = gate_lookahead(replace(tied, ids_TLK=ids_T[:, None, None]), weights)
    assert recall["lower"].recall_at_k.eq(1).all()
    assert recall["higher"].recall_at_k.eq(0).all() and recall["higher"].recall_at_2k.eq(1).all()


@pytest.mark.parametrize("wide", [False, True])
def test_batches_and_merges_change_nothing(wide, monkeypatch):
    trace, weights = toy(n_tokens=700, n_requests=60, n_experts=300 if wide else 16)
    plan = plan_of(trace)
    kinds = {
        "distances": lambda: GateDistances(plan),
        "lookahead": lambda: Lookahead(plan, weights),
    }
    for new in kinds.values():
        whole = counted(trace, plan, new).table()
        for cuts, max_rows in (((), 1), ((), 100), ((30,), 1), ((10, 20, 40), 1), ((0,), 350)):
            table = counted(trace, plan, new, *cuts, max_rows=max_rows).table()
            pd.testing.assert_frame_equal(table, whole, rtol=1e-12, atol=1e-15)
        monkeypatch.setattr(gates, "CHUNK", 7)
        table = counted(trace, plan, new, max_rows=50).table()
        pd.testing.assert_frame_equal(table, whole, rtol=1e-12, atol=1e-15)
        monkeypatch.undo()


def test_near_ties_are_settled_alike_in_every_batch():
    """Gates that differ by less than float32 can tell."""
    trace, weights = toy(n_tokens=400, n_requests=40)
    rng = np.random.default_rng(1)
    for gate_ED in weights.values():
        gate_ED[1:] = gate_ED[0] + rng.standard_normal((15, D)).astype(np.float32) * 2e-7
    plan = plan_of(trace)
    whole = counted(trace, plan, lambda: Lookahead(plan, weights)).counts_HLGC
    many = counted(trace, plan, lambda: Lookahead(plan, weights), max_rows=1).counts_HLGC
    assert (whole == many).all()
    gate_ED = list(weights.values())[1].astype(float)
    order_TE = np.argsort(-trace.gate_inputs_TLD[:, 0].astype(float) @ gate_ED.T, axis=1)
    hits = (trace.ids_TLK[:, 1, :, None] == order_TE[:, None, :3]).any(-1).sum()
    assert whole[1, 0].sum(axis=0)[2] == hits


def test_one_part_of_the_split_can_be_asked_for():
    trace, weights = toy(n_tokens=200, n_requests=20)
    copied = trace.rows(trace.request_T == np.bincount(trace.request_T).argmax())
    again = replace(copied, request_T=np.full_like(copied.request_T, 99))
    twice = concat([trace, again])
    plan = plan_of(twice)
    assert plan.split.duplicate_requests.tolist() == [99]
    lookahead = counted(twice, plan, lambda: Lookahead(plan, weights, horizons=()))
    tokens = {part: lookahead.table(part).tokens[0] for part in (TRAIN, TEST, LEFT_OUT, None)}
    assert tokens[None] == tokens[TRAIN] + tokens[TEST] == 200
    assert tokens[LEFT_OUT] == again.n_tokens and min(tokens.values()) > 0


def test_nothing_reaches_across_stacks():
    trace, weights = toy()
    card = replace(
        trace.card,
        layer_numbers=(1, 4, 1, 4),
        layer_stacks=("encoder", "encoder", "decoder", "decoder"),
    )
    trace = replace(trace, card=card)
    w = list(weights.values())
    distances = gate_distances(trace)
    assert distances[["stack", "layer", "next_layer"]].values.tolist() == [
        ["encoder", 1, 4],
        ["decoder", 1, 4],
    ]
    plan = plan_of(trace)
    lookahead = Lookahead(plan, {1: w[2], 4: w[3]}, (1, 2), encoder_weights={1: w[0], 4: w[1]})
    accumulate(trace, plan, [lookahead], "gate_inputs")
    table = lookahead.table().query("phase == 'all'")
    assert sorted(zip(table.horizon, table["stack"], table.layer, strict=True)) == [
        (0, "decoder", 1),
        (0, "decoder", 4),
        (0, "encoder", 1),
        (0, "encoder", 4),
        (1, "decoder", 1),
        (1, "encoder", 1),
    ]
    assert table[table.horizon == 0].recall_at_k.eq(1).all()
    only_decoder = Lookahead(plan, {1: w[2], 4: w[3]}, (1, 2)).table()
    assert set(only_decoder["stack"]) == {"decoder"} and only_decoder.recall_at_k.isna().all()


def test_one_layer_one_token():
    trace, weights = toy(n_layers=1)
    assert gate_distances(trace).empty and "cosine_similarity_mean" in gate_distances(trace)
    plan = plan_of(trace)
    assert counted(trace, plan, lambda: GateDistances(plan)).by_step().empty
    single = trace.rows(slice(0, 1))
    assert gate_lookahead(single, weights).recall_at_k.tolist() == [1.0]
    assert gate_distances(toy()[0].rows(slice(0, 1))).euclidean_std.tolist() == [0, 0, 0]


def test_what_is_missing_is_named():
    trace, weights = toy()
    without = replace(trace, gate_inputs_TLD=None)
    for function in (gate_distances, gate_lookahead):
        with pytest.raises(MissingData, match=r"source\.gate_inputs=true"):
            function(without)
    with pytest.raises(MissingData, match="pass router_weights"):
        gate_lookahead(trace)
    with pytest.raises(MissingData, match="no layer of this trace"):
        gate_lookahead(trace, {99: weights[1]})
    with pytest.raises(
        FormatError, match=r"layer 1: expected router weights of shape \[16, hidden"
    ):
        gate_lookahead(trace, {1: weights[1][:5]})
    with pytest.raises(
        FormatError, match=f"inputs of width 3, but the recorded gate inputs have {D}"
    ):
        gate_lookahead(trace, {1: weights[1][:, :3]})
    plan = plan_of(trace)
    with pytest.raises(MissingData, match="were not read"):
        GateDistances(plan).add(next(batches(without, plan)))


def test_the_embedded_model_from_its_folder(collect, tmp_path):
    source = TinyMoE(
        layers=3,
        experts=8,
        d=32,
        ff=8,
        context=24,
        vocabulary=300,
        steps=3,
        domains=["data"],
        bytes_per_domain=20_000,
        requests_per_domain=5,
        prompt_tokens=12,
        new_tokens=10,
        gate_inputs=True,
    )
    (tmp_path / "model").mkdir()
    source.upstream()["model"].build(tmp_path / "model", {})
    reader = collect(source, upstream={"model": tmp_path / "model"})
    table = gate_lookahead(reader)
    control = table[table.horizon == 0]
    assert control.recall_at_k.min() > 0.98  # inputs are float16 here: near ties flip
    assert control.recall_at_2k.eq(1).all()
    assert gate_distances(reader.folder).steps.tolist() == [50, 50]
    (reader.folder / "router_weights.safetensors").unlink()
    with pytest.raises(MissingData, match="no router weights"):
        recorded_gates(reader)


def test_ranks_are_exact_where_float32_cannot_tell():
    """Whole numbers with many ties, and logits that are off by less than the slack: the exact products decide."""
    rng, (n_tokens, n_experts, top_k, nobody) = np.random.default_rng(0), (400, 9, 2, 255)
    x_TD = rng.integers(-2, 3, (n_tokens, 3)).astype(np.float32)
    gate_ED = rng.integers(-2, 3, (n_experts, 3)).astype(np.float32)
    exact_TE = x_TD @ gate_ED.T
    logits_TE = exact_TE + rng.uniform(-0.4, 0.4, exact_TE.shape).astype(np.float32)
    logits_TE[7], slack_T = np.nan, np.ones(n_tokens)
    ids_TK = np.argsort(rng.random((n_tokens, n_experts)), axis=1)[:, :top_k].astype(np.uint8)
    ids_TK[rng.random(ids_TK.shape) < 0.1] = nobody
    group_T = rng.integers(-1, 2, n_tokens)
    group_T[7] = 0
    expected_GC = np.zeros((2, 4), np.int64)
    for t in np.flatnonzero(group_T >= 0):
        chosen = [e for e in ids_TK[t].tolist() if e != nobody]
        order = np.argsort(-exact_TE[t], kind="stable").tolist()
        ranks = [n_experts if t == 7 else order.index(e) for e in chosen]
        hits = sum(r < top_k for r in ranks), sum(r < 2 * top_k for r in ranks)
        expected_GC[group_T[t]] += [len(chosen) > 0, len(chosen), *hits]
    counts_GC = np.zeros_like(expected_GC)
    gates._count_hits(x_TD, gate_ED, logits_TE, slack_T, ids_TK, nobody, group_T, counts_GC)
    assert counts_GC.tolist() == expected_GC.tolist()
