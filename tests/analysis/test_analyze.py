"""The stage as a whole: every table from any trace, the same in any batches, with a reason for each that is missing."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from routing_traces import odd_traces, random_trace

import analysis
from analysis.analyze import write_guide_files
from analysis.routing.everything import Findings, Settings, analyze_counts, analyze_trace
from analysis.routing.gallery import draw_all
from analysis.routing.headline import metrics
from analysis.routing.paths import sample_paths
from analysis.routing.statistics import GUIDE_FIELDS
from analysis.routing.words import summary
from prefetch.trace.card import plain_card
from prefetch.trace.counts import ExpertCounts
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace

SETTINGS = Settings(window_tokens=64)
PROMISED = {
    "entropy_bits",
    "normalized_entropy",
    "conditional_entropy_bits",
    "mutual_information_bits",
    "mutual_information_shuffled_bits",
    "popularity_recall_at_k",
    "markov_recall_at_k",
    "markov_recall_at_k_shuffled",
    "repeat_rate",
    "gini",
    "max_violation",
    "dead_experts",
    "lru_hit_rate_25",
    "optimal_hit_rate_25",
}


def numbers(found: Findings, trace: RoutingTrace) -> dict[str, float]:
    return metrics(found, trace.card.top_k, trace.card.n_experts)


def domains_trace(**shape: int) -> RoutingTrace:
    """Two domains that prefer different experts."""
    one, two = random_trace(0, **shape), random_trace(1, **shape)
    ids = np.concatenate([one.ids_TLK, one.card.n_experts - 1 - two.ids_TLK])
    half = len(one.ids_TLK)
    return RoutingTrace(
        **{
            **vars(one),
            "ids_TLK": ids.astype(one.ids_TLK.dtype),
            **{
                name: np.concatenate([getattr(one, name), getattr(two, name)])
                for name in ("position_T", "phase_T", "executed_T", "token_T")
            },
            "request_T": np.concatenate([one.request_T, two.request_T + one.request_T.max() + 1]),
            "domain_T": np.repeat(np.array([0, 1], np.int32), half),
            "domains": ("a $b$", "c"),
        }
    )


def test_every_promised_number_is_there_and_finite():
    trace = domains_trace()
    got = numbers(analyze_trace(trace, SETTINGS), trace)
    assert set(got) >= PROMISED | {"domain_accuracy"}
    assert all(math.isfinite(value) for value in got.values())
    assert got["domain_accuracy"] > 0.9


@pytest.mark.parametrize("max_rows", [1, 40, 400])
def test_a_thousand_batches_ten_or_one_give_the_same_tables(max_rows):
    trace = domains_trace(n_requests=200, tokens=10)
    whole, cut = analyze_trace(trace, SETTINGS), analyze_trace(trace, SETTINGS, max_rows)
    assert set(whole.tables) == set(cut.tables) and whole.missing == cut.missing
    for name, frame in (whole.tables | whole.data).items():
        other = (cut.tables | cut.data)[name]
        pd.testing.assert_frame_equal(frame, other, check_exact=False, rtol=1e-12, atol=1e-12)
        for column in frame.select_dtypes("integer"):
            assert (frame[column] == other[column]).all(), (name, column)


@pytest.mark.parametrize("name", odd_traces())
def test_odd_traces_work_and_every_missing_table_says_why(name):
    trace = odd_traces()[name]
    found = analyze_trace(trace, SETTINGS)
    assert {"statistics", "load", "health"} <= set(found.tables)
    assert all(len(why) > 10 for why in found.missing.values())
    assert not set(found.missing) & (set(found.tables) | set(found.data))
    got = numbers(found, trace)
    assert all(math.isfinite(value) for value in got.values())
    page = summary(found, trace.card, Provenance("synthetic", "test"), got)
    assert "nan" not in page.lower() and len(page.splitlines()) > 20


@pytest.mark.parametrize("name", ["one token", "two stacks", "one of one", "wide ids"])
def test_odd_traces_can_be_drawn(name, tmp_path):
    trace = odd_traces()[name]
    files = draw_all(analyze_trace(trace, SETTINGS), trace.card, tmp_path, "note")
    names = {path.name for path in files}
    assert {"comparative_layer_statistics.png", "balance_overview.svg"} <= names
    assert all(path.stat().st_size > 2000 for path in files)


def test_the_pictures_of_the_guide_have_its_names(tmp_path):
    trace = domains_trace()
    draw_all(analyze_trace(trace, SETTINGS), trace.card, tmp_path, "note")
    drawn = {path.name for path in tmp_path.iterdir()}
    guide = ["comparative_layer_statistics", "expert_selection_traces", "expert_transition_heatmap"]
    guide += ["expert_usage_timeline", *(f"layer_{layer}_expert_frequency" for layer in range(4))]
    ours = ["entropy_by_layer", "recall_by_horizon", "cache_curves", "domain_usage"]
    ours += ["coactivation", "balance_overview"]
    assert drawn == {f"{name}.{kind}" for name in guide + ours for kind in ("png", "svg")}


def test_the_files_of_the_guide_hold_its_fields(tmp_path):
    trace = random_trace()
    found = analyze_trace(trace, SETTINGS)
    counts_LE = found.usage.counts()
    write_guide_files(found, trace.card, counts_LE, tmp_path)
    about = json.loads((tmp_path / "comprehensive_expert_statistics.json").read_text())
    assert "ddof" in about["schema"]["std"] and "base 2" in about["schema"]["entropy"]
    for block in ("layer_statistics", "layer_statistics_first_choice"):
        assert all(set(row) == {"layer_id", *GUIDE_FIELDS} for row in about[block].values())
    dense = json.loads((tmp_path / "proper_3d_statistics.json").read_text())
    got = [[row[str(e)] for e in range(16)] for row in dense["statistics"].values()]
    assert got == counts_LE.tolist()
    paths = json.loads((tmp_path / "sample_trace_paths.json").read_text())
    first = paths["0"][0]
    request = int(first["sample_id"].removeprefix("request_"))
    rows = trace.ids_TLK[trace.request_T == request]
    for layer in range(4):
        sample = paths[str(layer)][0]
        assert sample["expert_sequence"] == rows[:, layer, 0].tolist()
        assert sample["sequence_length"] == len(rows)


def test_paths_are_those_of_the_same_requests_in_every_layer():
    table = sample_paths(random_trace(), samples=3, tokens=5)
    assert table.groupby("layer").request.unique().map(tuple).nunique() == 1
    assert len(table) == 3 * 5 * 4


def test_counts_give_what_they_can_and_say_what_they_cannot(tmp_path):
    card = plain_card("counted", n_experts=8, top_k=2, layer_numbers=(3, 5))
    counts_LE = np.array([[40, 30, 20, 10, 5, 5, 0, 0], [14] * 8]) * 100
    counts = ExpertCounts(card, counts_LE, Provenance("real", "counts"))
    found = analyze_counts(counts, SETTINGS)
    assert {"statistics", "load", "health"} <= set(found.tables)
    assert "order" in found.missing["cache_curves"] and "order" in found.missing["recall"]
    got = metrics(found, 2, 8)
    assert got["dead_experts"] == 1.0 and "markov_recall_at_k" not in got
    page = summary(found, card, counts.provenance, got)
    assert "Balance" in page and "Cache" not in page
    assert draw_all(found, card, tmp_path, "note")


def test_a_log_that_is_more_even_than_chance_is_doubted():
    ids = np.tile(np.arange(16).reshape(8, 1, 2), (200, 2, 1))
    card = plain_card("strided", n_experts=16, top_k=2, layer_numbers=(0, 1))
    from prefetch.trace.routing import trace_of

    trace = trace_of(card, ids, request_T=np.arange(1600) // 8)
    found = analyze_trace(trace, SETTINGS)
    page = summary(found, card, Provenance("real", "test"), numbers(found, trace))
    assert "more even than chance" in page


def test_notebooks_find_every_analysis_by_name():
    for name in analysis.__all__:
        assert callable(getattr(analysis, name)), name
    with pytest.raises(AttributeError, match="nothing_such"):
        analysis.nothing_such  # noqa: B018
    assert Path(analysis.__file__).exists()


def test_more_experts_than_pair_counts_have_room_for_are_said_and_the_rest_is_told():
    trace = random_trace(n_requests=4, tokens=6, n_layers=2, n_experts=20_000, top_k=2)
    found = analyze_trace(trace, SETTINGS)
    for name in ("transitions", "next_tokens", "coactivation"):
        assert "GB" in found.missing[name]
    assert {"statistics", "load", "working_sets"} <= set(found.tables)
