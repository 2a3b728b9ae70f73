"""The sixteen statistics of the guide, held against the files that define them, and what stands beside them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from routing_traces import odd_traces, random_trace
from scipy import stats

from analysis.routing.batch import accumulate, batches, plan_of
from analysis.routing.statistics import (
    GUIDE_FIELDS,
    Usage,
    classes,
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
        entropy = stats.entropy(x, base=2) if x.sum() else 0.0
        assert row["entropy_bits"] == pytest.approx(entropy, abs=1e-12)


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
    assert entropy_bits(np.array([[1, 0], [0, 0]]))[0] == 0, "one choice is no surprise"


def test_a_layer_in_numbers_that_can_be_checked_by_hand():
    row = layer_statistics(np.array([[0, 1, 3, 8]]), card(1, 4)).loc[0]
    assert (row["mean"], row["min_usage"], row["max_usage"]) == (3, 0, 8)
    assert row["std"] == pytest.approx(np.sqrt((9 + 4 + 0 + 25) / 4))
    assert row["coefficient_of_variation"] == pytest.approx(row["std"] / 3)
    assert (row["q25"], row["median"], row["q75"], row["iqr"]) == (0.75, 2, 4.25, 3.5)
    assert (row["active_experts"], row["expert_diversity"], row["total_usage"]) == (3, 0.75, 12)
    bits = (np.log2(12) + 3 * np.log2(4) + 8 * np.log2(1.5)) / 12
    assert row["entropy_bits"] == pytest.approx(bits)
    assert row["normalized_entropy"] == pytest.approx(bits / 2)
    assert row["effective_experts"] == pytest.approx(2**bits)
    assert (row["max_over_mean"], row["max_violation"]) == pytest.approx((8 / 3, 5 / 3))
    assert [row[f"coverage_{share}"] for share in (50, 80, 90, 95)] == [1, 2, 2, 3]


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
    is_test_T = np.isin(trace.request_T, plan.split.test_requests)
    for part, rows in ((TEST, is_test_T), (TRAIN, ~is_test_T)):
        want_LE = [np.bincount(ids[rows, layer].ravel(), minlength=16) for layer in range(4)]
        assert (usage.counts(part=part) == want_LE).all()
        prefill = ids[rows & (trace.phase_T == 0), 2].ravel()
        found = usage.counts("prefill", part=part)[2]
        assert (found == np.bincount(prefill, minlength=16)).all()
        assert (usage.tokens(part=part) == rows.sum()).all()
    first, later = Usage(plan), Usage(plan)
    for place, batch in enumerate(batches(trace, plan, "weights", max_rows=100)):
        (first if place < 4 else later).add(batch)
    first.merge(later)
    assert (first.counts_CLE == usage.counts_CLE).all()
    assert (first.first_CLE == usage.first_CLE).all()
    assert (first.tokens_CL == usage.tokens_CL).all()
    assert (usage.tokens() == 1200).all() and (usage.tokens("prefill") == 600).all()


def test_a_class_is_part_phase_and_template() -> None:
    part_T, phase_T, template_T = np.indices((3, 2, 2)).reshape(3, -1)
    block = SimpleNamespace(phase_T=phase_T)
    batch = SimpleNamespace(block=block, is_template_T=template_T > 0, part_T=part_T)
    class_T = classes(batch)  # type: ignore[arg-type]
    assert sorted(class_T) == list(range(12)) and (class_T % 2 == template_T).all()
    assert (class_T // 4 == part_T).all() and (class_T // 2 % 2 == phase_T).all()


def test_tokens_are_rows_with_an_expert_there() -> None:
    trace = random_trace(n_requests=6, tokens=10)
    ids = trace.ids_TLK.astype(int)
    ids[::7, 1], ids[::5, 2, 0] = -1, -1
    found = statistics(trace_of(trace.card, ids, request_T=trace.request_T))
    rows = found[(found.phase == "all") & (found.choices == "all")]
    assert rows.tokens.tolist() == [60, 60 - 9, 60, 60]
    assert rows.total_usage.tolist() == [180, 180 - 27, 180 - 12, 180]


@pytest.mark.parametrize("name", odd_traces())
def test_odd_traces_have_statistics(name):
    trace = odd_traces()[name]
    table = statistics(trace)
    assert table.index.tolist() == [*range(len(table))]
    rows = table[(table.phase == "all") & (table.choices == "all")]
    assert len(rows) == trace.card.n_layers
    run = trace.ids_TLK[trace.executed_T]
    assert rows.total_usage.sum() == (run < trace.card.n_experts).sum()
