"""Co-activation: counts equal those taken by hand, chance keeps its margins, what is planted is found, noise is not."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from routing_traces import odd_traces, random_trace
from scipy import stats
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score, silhouette_score

from analysis.routing.batch import Plan, accumulate, batches, plan_of
from analysis.routing.coactivation import (
    SIZES,
    CoActivation,
    coactivation,
    cut,
    expert_clusters,
    factors,
    silhouette,
)
from analysis.routing.significance import q_values
from prefetch.errors import MissingData
from prefetch.scoring import TEST, TRAIN
from prefetch.trace.card import plain_card
from prefetch.trace.routing import DECODE, PREFILL, RoutingTrace, trace_of


def traced(ids_TLK: NDArray[Any], n_experts: int, per_request: int = 20, **of: Any) -> RoutingTrace:
    n_tokens, n_layers, top_k = ids_TLK.shape
    numbers = tuple(range(n_layers))
    card = plain_card("made", n_experts=n_experts, top_k=top_k, layer_numbers=numbers)
    return trace_of(card, ids_TLK, request_T=np.arange(n_tokens) // per_request, **of)


def counted(trace: RoutingTrace, plan: Plan | None = None, max_rows: int = 1 << 16) -> CoActivation:
    plan = plan or plan_of(trace)
    found = CoActivation(plan)
    accumulate(trace, plan, [found], max_rows=max_rows)
    return found


def with_holes(trace: RoutingTrace, seed: int) -> RoutingTrace:
    ids = trace.ids_TLK.astype(int)
    ids[np.random.default_rng(seed).random(ids.shape) < 0.1] = -1
    return trace_of(trace.card, ids, request_T=trace.request_T)


@given(st.integers(0, 10**6), st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_counts_are_those_taken_by_hand(seed: int, top_k: int) -> None:
    made = random_trace(seed, n_requests=8, tokens=6, n_layers=2, n_experts=6, top_k=top_k)
    trace = with_holes(made, seed)
    plan = plan_of(trace)
    slow_CLEE = np.zeros((2, 2, 6, 6), int)
    slow_CL = np.zeros((2, 2), int)
    parts_T = plan.split.parts(trace, np.arange(trace.n_tokens))
    for row_LK, part in zip(trace.ids_TLK.tolist(), parts_T.tolist(), strict=True):
        for layer, row_K in enumerate(row_LK):
            chosen = [e for e in row_K if e < 6]
            if part in (TRAIN, TEST):
                slow_CL[part, layer] += bool(chosen)
                for a in chosen:
                    for b in chosen:
                        slow_CLEE[part, layer, a, b] += 1
    found = counted(trace, plan)
    np.testing.assert_array_equal(found.pairs_CLEE(), slow_CLEE)
    np.testing.assert_array_equal(found.tokens_CL(), slow_CL)


def test_the_strongest_pair_is_that_of_the_tested_ones() -> None:
    """And every pair that was seen, however rarely, or that chance would have shown, has its row."""
    found = counted(random_trace(5, n_requests=14, tokens=12, n_experts=12, top_k=3, skew=1.5))
    summary, pairs = found.summary(), found.pairs()
    pairs_LEE = found.pairs_CLEE().sum(axis=0)
    for row in summary.itertuples():
        own = pairs[pairs.layer == row.layer]
        seen = {(a, b) for a, b in combinations(range(12), 2) if pairs_LEE[row.layer, a, b]}
        listed = own[own["count"] > 0]
        assert set(zip(listed.expert_a, listed.expert_b, strict=True)) == seen
        assert (own["count"].min() == 1) and (own.expected[own["count"] == 0] >= 5).all()
        tested = own[own.q_value.notna()]
        best = tested.loc[tested.lift.idxmax()]
        assert row.pairs_tested == len(tested) < len(own)
        assert row.strongest_lift == best.lift == tested.lift.max()
        assert (row.expert_a, row.expert_b) == (best.expert_a, best.expert_b)


def test_chance_leaves_everybody_their_partners_however_few() -> None:
    """Also where the busiest is in a little more than half of all pairs."""
    rng = np.random.default_rng(0)
    x_NE = rng.exponential(1, (300, 5)) * np.where(np.arange(5), 0.5, rng.uniform(1, 5, (300, 1)))
    partners_NE = x_NE * (x_NE.sum(axis=1, keepdims=True) - x_NE)
    partners_NE = partners_NE[partners_NE.max(axis=1) >= 1]  # as counts have it
    found_NE = factors(partners_NE)
    left_NE = found_NE * (found_NE.sum(axis=1, keepdims=True) - found_NE)
    np.testing.assert_allclose(left_NE, partners_NE, rtol=1e-7)


@pytest.mark.parametrize("phase", [PREFILL, DECODE])
def test_a_trace_of_one_phase_is_counted_as_any_other(phase: int) -> None:
    made = random_trace(3, n_requests=8, tokens=6, n_experts=6, top_k=2)
    one = trace_of(made.card, made.ids_TLK, request_T=made.request_T, phase_T=phase)
    plan = plan_of(one)
    is_test_T = plan.split.parts(one, np.arange(one.n_tokens)) == TEST
    found = counted(one, plan)
    assert found.tokens_CL().tolist() == [[(~is_test_T).sum()] * 4, [is_test_T.sum()] * 4]
    own_CL = found.pairs_CLEE().diagonal(axis1=2, axis2=3).sum(axis=2)
    assert (own_CL == 2 * found.tokens_CL()).all()


def test_no_batch_changes_a_number() -> None:
    trace = with_holes(random_trace(3), 3)
    plan = plan_of(trace)
    whole = counted(trace, plan)
    parts = list(batches(trace, plan, max_rows=1))
    halves = [CoActivation(plan), CoActivation(plan)]
    for i, batch in enumerate(parts):
        halves[i >= len(parts) // 3].add(batch)
    halves[0].merge(halves[1])
    for other in (counted(trace, plan, 1), counted(trace, plan, 100), halves[0]):
        np.testing.assert_array_equal(other.pairs_CLEE(), whole.pairs_CLEE())
        np.testing.assert_array_equal(other.tokens_CL(), whole.tokens_CL())
        for table in ("pairs", "summary", "clusters"):
            pd.testing.assert_frame_equal(getattr(other, table)(), getattr(whole, table)())


def slow_factors(partners_E: NDArray[Any], rounds: int = 20_000) -> NDArray[np.float64]:
    """Symmetric iterative scaling of a table of ones without diagonal."""
    x_E = np.sqrt(partners_E / max(1, len(partners_E)))
    for _ in range(rounds):
        sum_E = x_E * (x_E.sum() - x_E)
        x_E = x_E * np.sqrt(np.divide(partners_E, sum_E, out=np.zeros(len(x_E)), where=sum_E > 0))
    return x_E


@given(st.lists(st.lists(st.integers(0, 9), min_size=10, max_size=10), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_chance_leaves_every_expert_its_number_of_partners(tables: list[list[int]]) -> None:
    """Whatever the counts, even where one expert is in every pair."""
    pairs_LEE = np.zeros((len(tables), 5, 5), int)
    pairs_LEE[:, *np.triu_indices(5, 1)] = tables
    pairs_LEE += pairs_LEE.swapaxes(1, 2)
    partners_LE = pairs_LEE.sum(axis=2)
    x_LE = factors(partners_LE)
    expected_LEE = x_LE[:, :, None] * x_LE[:, None, :] * ~np.eye(5, dtype=bool)
    # a root where two meet is known to half the digits of a double
    np.testing.assert_allclose(expected_LEE.sum(axis=2), partners_LE, rtol=1e-7)
    assert (x_LE[partners_LE == 0] == 0).all()


def test_chance_is_what_iterative_scaling_comes_to() -> None:
    partners_E = np.array([900, 700, 400, 300, 0, 200, 100])
    np.testing.assert_allclose(factors(partners_E[None])[0], slow_factors(partners_E), rtol=1e-9)


@given(st.integers(0, 99), st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_the_silhouette_is_that_of_scikit_learn(seed: int, n_clusters: int) -> None:
    rng = np.random.default_rng(seed)
    half_UU = np.triu(rng.random((9, 9)), 1)
    label_U = np.append(np.arange(n_clusters), rng.integers(0, n_clusters, 9 - n_clusters))
    found = silhouette(half_UU + half_UU.T, label_U)
    slow = silhouette_score(half_UU + half_UU.T, label_U, metric="precomputed")
    np.testing.assert_allclose(found, slow, atol=1e-12)


def test_an_expert_of_every_token_is_chosen_with_each_as_often_as_that_one_is_used() -> None:
    others = np.random.default_rng(0).choice(np.arange(1, 6), 3000, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    ids = np.stack([np.zeros(3000, int), others], axis=1)[:, None]
    rows = counted(traced(ids, 6)).pairs()
    assert (rows.expert_a == 0).all()
    np.testing.assert_allclose(rows.lift, 1, rtol=1e-6)
    assert not rows.is_significant.any()


def skewed_pairs(n_tokens: int, seed: int, n_experts: int = 20) -> NDArray[np.int64]:
    """k = 2, pairs drawn with probability x_a x_b: chance itself."""
    rng = np.random.default_rng(seed)
    x_E = np.arange(1, n_experts + 1) ** -0.7
    both = np.array(list(combinations(range(n_experts), 2)))
    p = x_E[both].prod(axis=1)
    return both[rng.choice(len(both), n_tokens, p=p / p.sum())][:, None]


def test_pairs_drawn_by_chance_look_like_chance() -> None:
    rows = coactivation(traced(skewed_pairs(40_000, 1), 20))
    frequent = rows[rows.expected >= 20]
    # fitted margins take 2 of 19 degrees of freedom per expert: a little under one is right
    assert 0.8 < frequent.z.std() < 1.1
    assert not rows.is_significant.any()
    assert abs(np.average(rows.lift, weights=rows.expected) - 1) < 0.01
    # against c_a c_b / T half of the pairs would be missing: that is why it is not used
    used_E = np.bincount(
        np.r_[rows.expert_a.repeat(rows["count"]), rows.expert_b.repeat(rows["count"])]
    )
    naive = rows["count"] / (used_E[rows.expert_a] * used_E[rows.expert_b] / 40_000)
    assert naive.median() < 0.65


def test_a_planted_pair_is_found_and_its_rivals_are_not_called_friends() -> None:
    ids = skewed_pairs(20_000, 2)
    ids[::50, 0] = [7, 13]
    found = counted(traced(ids, 20))
    rows = found.pairs()
    planted = rows[(rows.expert_a == 7) & (rows.expert_b == 13)].iloc[0]
    assert planted.is_significant and planted.lift > 3 and planted.q_value < 1e-10
    assert min(planted.lift_train, planted.lift_test) > 2
    assert rows[rows.is_significant & (rows.lift > 1)].shape[0] == 1
    summary = found.summary().iloc[0]
    assert (summary.expert_a, summary.expert_b) == (7, 13)
    assert summary.pairs_possible == 190 and summary.pairs_attracted == 1


def test_what_only_one_part_shows_is_not_significant() -> None:
    trace = traced(skewed_pairs(20_000, 4), 20)
    is_test_T = plan_of(trace).split.parts(trace, np.arange(trace.n_tokens)) == TEST
    ids = trace.ids_TLK.astype(int)
    ids[np.flatnonzero(is_test_T)[::10], 0] = [7, 13]
    rows = coactivation(traced(ids, 20))
    planted = rows[(rows.expert_a == 7) & (rows.expert_b == 13)].iloc[0]
    assert planted.q_value < 0.01 and not planted.is_significant


def in_runs(
    n_requests: int, per_request: int, stays: float, seed: int, planted: float = 0.0
) -> RoutingTrace:
    """Even sets of 3 of 16 experts in 3 independent layers; a token repeats the set before with chance `stays`.

    A share `planted` of the sets that are drawn holds both 7 and 13.
    """
    rng, n = np.random.default_rng(seed), n_requests * per_request
    noise_TLE = rng.random((n, 3, 16))
    noise_TLE[:, :, [7, 13]] -= (rng.random((n, 3, 1)) < planted) * 1.0
    keeps_TL = rng.random((n, 3)) < stays
    keeps_TL[::per_request] = False
    source_TL = np.maximum.accumulate(np.where(keeps_TL, 0, np.arange(n)[:, None]), axis=0)
    ids = np.argsort(noise_TLE, axis=2)[:, :, :3][source_TL, np.arange(3)]
    return traced(ids, 16, per_request)


@pytest.mark.parametrize(("n_requests", "per_request"), [(10, 400), (100, 40)])
def test_runs_of_like_tokens_make_no_pair_significant(n_requests: int, per_request: int) -> None:
    """Taken as independent, 80 of the 360 pairs would be in both parts."""
    for seed in range(3):
        rows = coactivation(in_runs(n_requests, per_request, 0.95, seed))
        assert not rows.is_significant.any()
        assert (rows.q_value < 0.01).sum() <= 1 and rows.q_value.notna().any()
        assert rows.design_effect.median() > 10


def test_among_runs_a_planted_pair_is_found() -> None:
    rows = coactivation(in_runs(200, 50, 0.8, 0, planted=0.1))
    found = rows[rows.is_significant & (rows.lift > 1)]
    assert found[["layer", "expert_a", "expert_b"]].to_numpy().tolist() == [
        [layer, 7, 13] for layer in range(3)
    ]


def test_chances_hold_for_tokens_that_come_in_runs() -> None:
    """Of pairs without any bond, one in a hundred is called so at 0.01; the standard score spreads by one."""
    tables = [coactivation(in_runs(60, 100, 0.7, seed)) for seed in range(4)]
    z = np.concatenate([rows.z[rows.q_value.notna()] for rows in tables])
    assert 0.9 < z.std() < 1.2
    assert (2 * stats.t.sf(np.abs(z), 59) < 0.01).mean() < 0.03


def slow_effects(trace: RoutingTrace, layer: int) -> NDArray[np.float64]:
    """The spread of a pair's excess over requests by that over tokens, with every token's share written out."""
    chosen_TE = (trace.ids_TLK[:, layer, :, None] == np.arange(trace.card.n_experts)).any(axis=1)
    request_T = trace.request_T[chosen_TE.any(axis=1)]
    chosen_TE = chosen_TE[chosen_TE.any(axis=1)].astype(float)
    pairs_EE = chosen_TE.T @ chosen_TE
    used_E = pairs_EE.diagonal()
    x_E = factors((pairs_EE.sum(axis=1) - used_E)[None])[0]
    one_N, other_N = np.triu_indices(len(x_E), 1)
    e_N = x_E[one_N] * x_E[other_N]
    a_TN, b_TN = chosen_TE[:, one_N], chosen_TE[:, other_N]
    u_TN = a_TN * b_TN - e_N / used_E[one_N] * a_TN - e_N / used_E[other_N] * b_TN
    u_TN -= u_TN.mean(axis=0)
    sums_RN = np.stack([u_TN[request_T == r].sum(axis=0) for r in np.unique(request_T)])
    freedom = 1 - 1 / len(sums_RN)
    effects: NDArray[np.float64] = (sums_RN**2).sum(axis=0) / (u_TN**2).sum(axis=0) / freedom
    return np.maximum(1, effects)


@pytest.mark.parametrize(("n_requests", "tokens"), [(12, 60), (400, 2)], ids=["long", "short"])
def test_design_effects_are_those_written_out(n_requests: int, tokens: int) -> None:
    """Long requests are counted by the whole table of pairs, short ones pair by pair."""
    trace = with_holes(in_runs(n_requests, tokens, 0.6, 5), 5)
    rows = counted(trace, max_rows=100).pairs()
    for layer in range(3):
        of_layer = rows[rows.layer == layer]
        assert len(of_layer) == 120
        np.testing.assert_allclose(of_layer.design_effect, slow_effects(trace, layer), rtol=1e-9)


def test_few_requests_do_not_tell_what_is_significant() -> None:
    for n_requests, is_told in ((3, False), (9, False), (10, True)):
        found = counted(in_runs(n_requests, 200, 0.0, 0, planted=0.5))
        rows, summary = found.pairs(), found.summary()
        assert rows.is_significant.any() == is_told
        assert rows[["design_effect", "z", "q_value"]].notna().all(axis=None) == is_told
        assert summary.pairs_significant.notna().all() == is_told
        assert (summary.requests == n_requests).all() and (summary.pairs_possible == 120).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 3))
def test_q_values_are_those_of_scipy(p: list[float], n_untested: int) -> None:
    q_N = q_values(np.array([p + [np.nan] * n_untested]))[0]
    np.testing.assert_allclose(q_N[: len(p)], stats.false_discovery_control(p), rtol=1e-12)
    assert np.isnan(q_N[len(p) :]).all()


def in_blocks(
    n_tokens: int = 6000, n_blocks: int = 4, size: int = 6, seed: int = 0
) -> RoutingTrace:
    """Every token takes three experts of one block, and now and then one of another; low blocks more often."""
    rng = np.random.default_rng(seed)
    weight = np.arange(n_blocks, 0, -1) / np.arange(1, n_blocks + 1).sum()
    block_T = rng.choice(n_blocks, n_tokens, p=weight)
    ids = block_T[:, None] * size + np.argsort(rng.random((n_tokens, size)), axis=1)[:, :3]
    stray_T = rng.random(n_tokens) < 0.1
    ids[stray_T, 0] = (ids[stray_T, 0] + size) % (n_blocks * size)
    return traced(ids[:, None], n_blocks * size)


def test_planted_clusters_are_found_and_numbered_by_load() -> None:
    rows = expert_clusters(in_blocks())
    assert adjusted_rand_score(rows.expert // 6, rows.cluster) == 1
    assert (rows.cluster == rows.expert // 6).all()
    assert (rows.n_clusters == 4).all() and (rows.silhouette > 0.3).all()


def test_one_tree_cut_at_every_size_is_what_sklearn_grows_for_that_size() -> None:
    rng = np.random.default_rng(0)
    apart = rng.random((40, 40))
    apart += apart.T
    np.fill_diagonal(apart, 0)
    given = {"metric": "precomputed", "linkage": "average"}
    tree = AgglomerativeClustering(compute_full_tree=True, **given).fit(apart)
    for size in SIZES:
        labels = AgglomerativeClustering(n_clusters=size, **given).fit_predict(apart)
        assert adjusted_rand_score(labels, cut(tree.children_, size)) == 1


def test_layers_with_too_few_experts_have_no_clusters() -> None:
    few = np.random.default_rng(0).permuted(np.tile([0, 1, 2], (300, 1)), axis=1)[:, None, :2]
    many = random_trace(n_requests=15, tokens=20, n_layers=1, n_experts=8, top_k=2).ids_TLK
    rows = expert_clusters(traced(np.concatenate([few, many], axis=1), 8))
    assert set(rows.layer) == {1}
    assert expert_clusters(traced(few, 8)).empty
    fewer = counted(traced(many, 8)).clusters(most=3)
    assert (fewer.n_clusters <= 3).all()


def test_one_expert_per_token_is_never_chosen_with_another() -> None:
    with pytest.raises(MissingData, match="one expert per token"):
        coactivation(random_trace(top_k=1))


@pytest.mark.parametrize("name", odd_traces())
def test_odd_traces_work(name: str) -> None:
    trace = odd_traces()[name]
    if trace.card.top_k == 1:
        return
    found = counted(trace)
    rows, summary = found.pairs(), found.summary()
    assert len(summary) == trace.card.n_layers
    assert (rows.expert_a < rows.expert_b).all() and (rows.expected > 0).all()
    assert (summary.pairs_tested <= summary.pairs_possible).all()
    assert ("stack" in rows) == ("stack" in found.clusters()) == (name == "two stacks")
    if trace.n_tokens == 1:  # all there is, is in one of the parts
        assert rows.lift_train.isna().all() and not rows.is_significant.any()
