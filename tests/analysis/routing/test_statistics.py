"""The sixteen statistics of the guide, held against the files that define them, and what stands beside them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from routing_traces import odd_traces, random_trace
from scipy import stats

from analysis.routing.batch import accumulate, plan_of
from analysis.routing.statistics import (
    GUIDE_FIELDS,
    Usage,
    coverage,
    entropy_bits,
    gini,
    layer_statistics,
    statistics,
)
from prefetch.scoring import TEST, TRAIN
from prefetch.trace.card import plain_card
from prefetch.trace.routing import trace_of

counts = arrays(np.int64, (3, 7), elements=st.integers(0, 1000))


def card(n_layers: int, n_experts: int):
    return plain_card("x", n_experts=n_experts, top_k=1, layer_numbers=tuple(range(n_layers)))


@given(counts)
def test_moments_and_quartiles_are_those_of_scipy(counts_LE):
    table = layer_statistics(counts_LE, card(3, 7))
    for layer, x in enumerate(counts_LE):
        row = table.loc[layer]
        assert row["std"] == pytest.approx(np.std(x), abs=1e-12)
        assert row["iqr"] == pytest.approx(stats.iqr(x), abs=1e-9)
        assert row["median"] == np.median(x)
        if np.ptp(x):
            assert row["skewness"] == pytest.approx(stats.skew(x), abs=1e-9)
            assert row["kurtosis"] == pytest.approx(stats.kurtosis(x), abs=1e-9)
        if x.sum():
            assert row["entropy_bits"] == pytest.approx(stats.entropy(x, base=2), abs=1e-12)


@given(counts)
def test_gini_is_the_mean_difference_and_coverage_the_fewest(counts_LE):
    for layer, x in enumerate(counts_LE):
        if not x.sum():
            assert np.isnan(gini(counts_LE)[layer]) and np.isnan(coverage(counts_LE, 90)[layer])
            continue
        differences = np.abs(x[:, None] - x[None, :]).sum()
        assert gini(counts_LE)[layer] == pytest.approx(differences / (2 * 7 * x.sum()), abs=1e-12)
        ordered = np.sort(x)[::-1]
        fewest = next(n for n in range(1, 8) if 100 * ordered[:n].sum() >= 90 * x.sum())
        assert coverage(counts_LE, 90)[layer] == fewest


def test_entropy_of_an_even_and_of_a_single_use():
    assert entropy_bits(np.array([[3, 3, 3, 3], [9, 0, 0, 0]])).tolist() == [2.0, 0.0]
    table = layer_statistics(np.array([[3, 3, 3, 3], [8, 0, 0, 0]]), card(2, 4))
    assert table.effective_experts.tolist() == [4.0, 1.0]
    assert table.max_violation.tolist() == [0.0, 3.0]
    assert table.gini.tolist() == [0.0, 0.75]
    assert table.coverage_95.tolist() == [4.0, 1.0]
    assert table.zero_usage_experts.tolist() == [0, 3]


def test_the_committed_statistics_of_switch_are_reproduced(real_data):
    path = real_data / "counts" / "switch-base-128.expert_statistics_3d.json"
    about = json.loads(path.read_text())
    layers = [int(name) for name in about["expert_usage_by_layer"]]
    counts_LE = np.array(
        [[row[str(e)] for e in range(128)] for row in about["expert_usage_by_layer"].values()]
    )
    switch = plain_card("switch", n_experts=128, top_k=1, layer_numbers=tuple(layers))
    table = layer_statistics(counts_LE, switch).set_index("layer")
    for name, stored in about["layer_analysis"].items():
        row, x = table.loc[int(name)], counts_LE[layers.index(int(name))]
        assert row.entropy_bits == pytest.approx(stored["entropy"], abs=1e-9)
        assert row.active_experts == stored["active_experts"]
        assert row.total_usage == stored["total_usage"]
        assert 100 * row.expert_diversity == pytest.approx(stored["diversity_percentage"], abs=1e-9)
        derived = {
            "mean": x.sum() / 128,
            "std": np.sqrt(((x - x.mean()) ** 2).mean()),
            "coefficient_of_variation": x.std() / x.mean(),
            "skewness": stats.skew(x),
            "kurtosis": stats.kurtosis(x),
            "min_usage": x.min(),
            "max_usage": x.max(),
            "median": np.median(x),
            "q25": np.percentile(x, 25),
            "q75": np.percentile(x, 75),
            "iqr": np.subtract(*np.percentile(x, [75, 25])),
            "zero_usage_experts": (x == 0).sum(),
        }
        for field, value in derived.items():
            assert row[field] == pytest.approx(value, abs=1e-9), field
    # the table of its README, to the digits it gives
    assert table.entropy_bits.round(4).tolist() == [6.6904, 5.1203, 6.1319, 5.9552, 5.8496, 4.7914]
    assert table["kurtosis"].round(3).tolist() == [19.379, 65.610, 10.205, 15.164, 14.545, 32.099]
    assert table.coverage_95.tolist() == [108, 84, 93, 86, 79, 55]


def test_the_identities_of_the_second_corpus_hold(real_data):
    path = real_data / "counts" / "switch-base-128.comprehensive_expert_statistics.json"
    about = json.loads(path.read_text())
    assert set(about["metrics_included"]) == set(GUIDE_FIELDS)
    for row in about["layer_statistics"].values():
        assert row["mean"] == pytest.approx(row["total_usage"] / 128, abs=1e-9)
        assert row["coefficient_of_variation"] == pytest.approx(row["std"] / row["mean"], abs=1e-9)
        assert row["iqr"] == pytest.approx(row["q75"] - row["q25"], abs=1e-9)
        assert row["expert_diversity"] == row["active_experts"] / 128
        assert row["active_experts"] + row["zero_usage_experts"] == 128
        assert row["entropy_bits"] <= np.log2(row["active_experts"])


def test_classes_add_up_and_the_first_choice_is_that_of_the_largest_weight():
    trace = random_trace()
    weights = np.random.default_rng(1).random(trace.ids_TLK.shape).astype(np.float16)
    trace = trace_of(
        trace.card,
        trace.ids_TLK,
        request_T=trace.request_T,
        phase_T=trace.phase_T,
        weights_TLK=weights,
    )
    plan = plan_of(trace)
    usage = Usage(plan)
    accumulate(trace, plan, [usage], "weights", max_rows=100)
    ids = trace.ids_TLK.astype(int)
    first = np.take_along_axis(ids, weights.argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
    for layer in range(4):
        want = np.bincount(ids[:, layer].ravel(), minlength=16)
        assert (usage.counts()[layer] == want).all()
        assert (usage.counts(first=True)[layer] == np.bincount(first[:, layer], minlength=16)).all()
        decode = ids[trace.phase_T == 1, layer].ravel()
        assert (usage.counts("decode")[layer] == np.bincount(decode, minlength=16)).all()
    assert (usage.counts(part=TRAIN) + usage.counts(part=TEST) == usage.counts()).all()
    assert (usage.tokens() == 1200).all() and (usage.tokens("prefill") == 600).all()


@pytest.mark.parametrize("name", odd_traces())
def test_odd_traces_have_statistics(name):
    trace = odd_traces()[name]
    table = statistics(trace)
    rows = table[(table.phase == "all") & (table.choices == "all")]
    assert len(rows) == trace.card.n_layers
    run = trace.ids_TLK[trace.executed_T]
    assert rows.total_usage.sum() == (run < trace.card.n_experts).sum()
