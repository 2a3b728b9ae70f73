"""Load, health, capacity, hotspots, memory and remedies: equal to plain Python, the same from any batches."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, false_discovery_control

from analysis.routing.balance import TOO_FEW, balance, expert_load, health, hotspots, load
from analysis.routing.batch import Batch, Plan, accumulate, batches, plan_of
from analysis.routing.locality import working_sets
from analysis.routing.remedies import memory, remedies
from analysis.routing.windows import FACTORS_F, Windows, WindowSums, capacity_curve, fano
from prefetch.errors import MissingData
from prefetch.trace.card import ModelCard, plain_card
from prefetch.trace.counts import ExpertCounts
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace, trace_of


def card_of(n_layers: int, n_experts: int, top_k: int, **known: Any) -> ModelCard:
    numbers = tuple(range(1, n_layers + 1))
    return plain_card("m", n_experts=n_experts, top_k=top_k, layer_numbers=numbers, **known)


def drawn(
    n_tokens: int, n_layers: int = 2, n_experts: int = 12, top_k: int = 3, seed: int = 0
) -> RoutingTrace:
    """Requests of 1 to 9 rows, not all executed; some choices are missing, so that some rows have none."""
    rng = np.random.default_rng(seed)
    weight_E = np.arange(1, n_experts + 1) ** -0.7
    scores_TLE = rng.random((n_tokens, n_layers, n_experts)) ** (1 / weight_E)
    ids_TLK = np.argsort(-scores_TLE, axis=2)[:, :, :top_k].astype(np.int64)
    ids_TLK[rng.random(ids_TLK.shape) < 0.3] = -1
    request_T = np.repeat(np.arange(n_tokens), rng.integers(1, 10, n_tokens))[:n_tokens]
    executed_T = rng.random(n_tokens) < 0.9
    return trace_of(
        card_of(n_layers, n_experts, top_k),
        ids_TLK,
        request_T=request_T,
        executed_T=executed_T | ~executed_T.any(),
    )


def windows_of(trace: RoutingTrace, tokens: int, plan: Plan | None = None) -> Windows:
    counted = Windows(plan or plan_of(trace), tokens)
    accumulate(trace, counted.plan, [counted])
    return counted


def slow_windows(trace: RoutingTrace, layer: int, tokens: int) -> list[tuple[int, np.ndarray]]:
    """Rows with an expert and counts of every window that has any."""
    found: dict[int, tuple[int, np.ndarray]] = {}
    for t in np.flatnonzero(trace.executed_T).tolist():
        experts = [e for e in trace.ids_TLK[t, layer].tolist() if e < trace.card.n_experts]
        if experts:
            rows, counts = found.get(t // tokens, (0, np.zeros(trace.card.n_experts, int)))
            found[t // tokens] = rows + 1, counts + np.bincount(experts, minlength=len(counts))
    return list(found.values())


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 150), st.integers(0, 99), st.integers(1, 12), st.integers(1, 12))
def test_windows_equal_windows_by_hand(n_tokens: int, seed: int, tokens: int, top_k: int) -> None:
    trace = drawn(n_tokens, top_k=top_k, seed=seed)
    counted = windows_of(trace, tokens)
    sums, curve, fano_LE = counted.total(), capacity_curve(counted), fano(counted.total())
    for layer in range(2):
        every = slow_windows(trace, layer, tokens)
        full = [counts for rows, counts in every if rows == tokens]
        assert sums.full_L[layer] == len(full)
        assert sums.choices_L[layer] == sum(counts.sum() for _, counts in every)
        ratios = [12 * counts / counts.sum() for counts in full]
        assert sums.violation_L[layer] == pytest.approx(sum(r.max() - 1 for r in ratios))
        if full:
            assert sums.worst_LE[layer] == pytest.approx(np.max(ratios, axis=0))
        if len(full) > 1:
            mean_E = np.mean(full, axis=0)
            expected = np.var(full, axis=0, ddof=1)[mean_E > 0] / mean_E[mean_E > 0]
            assert fano_LE[layer][mean_E > 0] == pytest.approx(expected)
        rows = curve[curve.layer == layer + 1]
        assert len(rows) == (len(FACTORS_F) if every else 0)
        for row in rows.itertuples():
            limits = [math.ceil(row.capacity_factor * n * top_k / 12) for n, _ in every]
            pairs = list(zip(limits, [counts for _, counts in every], strict=True))
            lost = sum(np.maximum(0, counts - limit).sum() for limit, counts in pairs)
            kept = sum(np.minimum(counts, limit).sum() for limit, counts in pairs)
            assert row.dropped_share == pytest.approx(lost / (lost + kept))
            assert row.padding_share == pytest.approx(1 - kept / (12 * sum(limits)))
        assert (np.diff(rows.dropped_share) <= 0).all()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 90),
    st.integers(1, 12),
    st.integers(1, 15),
    st.integers(0, 99),
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
)
def test_batches_and_parts_change_nothing(
    n_tokens: int, tokens: int, max_rows: int, seed: int, cuts: list[int]
) -> None:
    trace = drawn(n_tokens, seed=seed)
    plan = plan_of(trace)
    whole, every = windows_of(trace, tokens, plan), list(batches(trace, plan, max_rows=max_rows))
    from_left, from_right = (parts_of(every, cuts, plan, tokens) for _ in range(2))
    for later in from_left[1:]:
        from_left[0].merge(later)
    while len(from_right) > 1:
        from_right[-2].merge(from_right.pop())
    same_sums(from_left[0].total(), whole.total())
    same_sums(from_right[0].total(), whole.total())
    assert len(from_right[0].open) <= 2


def parts_of(every: list[Batch], cuts: list[int], plan: Plan, tokens: int) -> list[Windows]:
    parts = []
    for first, last in pairwise([0, *sorted(cuts), len(every)]):
        parts.append(Windows(plan, tokens))
        for batch in every[first:last]:
            parts[-1].add(batch)
    return parts


def same_sums(mine: WindowSums, expected: WindowSums) -> None:
    for one, other in zip(mine, expected, strict=True):
        if one.dtype.kind == "i":
            assert (one == other).all()
        else:
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_what_additions_round_away_is_kept_where_parts_are_merged() -> None:
    plan = plan_of(drawn(20))
    parts = [Windows(plan, 4) for _ in range(3)]
    for part, large in zip(parts, (1e16, 1.0, -1e16), strict=True):
        part.sums.violation_L[:] = large
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert (parts[0].total().violation_L == 1).all()
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        Windows(plan, 0)


def test_fano_of_independent_choices() -> None:
    ids_TLK = np.random.default_rng(0).integers(0, 4, (200_000, 1, 1))
    windows = windows_of(trace_of(card_of(1, 4, 1), ids_TLK), 100)
    assert fano(windows.total())[0] == pytest.approx(np.full(4, 0.75), abs=0.06)


@pytest.mark.parametrize("n_tokens", [1536, 1999, 3000, 40_960])
def test_fano_is_no_artefact_of_the_window(n_tokens: int) -> None:
    """Even choices, k of E: 1 - k/E whatever the trace's length; a window and a half tell nothing."""
    noise = np.random.default_rng(n_tokens).random((n_tokens, 2, 16))
    trace = trace_of(card_of(2, 16, 4), np.argsort(noise, axis=2)[:, :, :4])
    windows = windows_of(trace, 1024)
    fano_LE = fano(windows.total())
    if n_tokens < 2048:
        assert np.isnan(fano_LE).all()
    else:
        assert fano_LE.mean() == pytest.approx(0.75, abs=0.3 if n_tokens == 3000 else 0.1)
        assert fano_LE.max() < (10 if n_tokens == 3000 else 2)
    assert (windows.total().full_L == n_tokens // 1024).all()


def test_a_layer_has_windows_only_where_it_ran_all_along() -> None:
    ids_TLK = np.random.default_rng(0).integers(0, 4, (100, 2, 1))
    ids_TLK[::20, 1] = -1  # one row in every second window of ten
    table = balance(trace_of(card_of(2, 4, 1), ids_TLK), tokens=10)
    assert list(windows_of(trace_of(card_of(2, 4, 1), ids_TLK), 10).total().full_L) == [10, 5]
    assert table[["max_violation_windows", "fano_max"]].notna().all(axis=None)
    ids_TLK[::10, 1] = -1
    table = balance(trace_of(card_of(2, 4, 1), ids_TLK), tokens=10)
    assert list(table.max_violation_windows.isna()) == list(table.fano_max.isna()) == [False, True]
    assert table.capacity_factor_1pct.notna().all()


def load_of(counts: list[int], tokens: int, top_k: int = 1, **limits: float) -> pd.DataFrame:
    card = card_of(1, len(counts), top_k)
    return load(np.array([counts]), np.array([tokens]), top_k, card, **limits)


def test_load_against_scipy() -> None:
    counts = [500, 90, 110, 105, 95, 100, 0, 100, 104, 96]
    table = load_of(counts, 650, 2)
    expected = np.array(counts) - 130
    z_E = expected / math.sqrt(650 * 0.2 * 0.8)
    assert table.z.to_numpy() == pytest.approx(z_E)
    tails = [
        [binomtest(n, 650, 0.2, alternative=side).pvalue for side in ("less", "greater")]
        for n in counts
    ]
    assert table.p_value.to_numpy() == pytest.approx([min(1, 2 * min(pair)) for pair in tails])
    assert table.q_value.to_numpy() == pytest.approx(false_discovery_control(table.p_value))
    assert table.share.sum() == pytest.approx(1)
    assert table.ratio.iloc[0] == pytest.approx(500 / 130)
    assert list(table.state)[:7] == ["overused", *["balanced"] * 5, "dead"]


def test_state_takes_both_significance_and_size() -> None:
    assert set(load_of([9, 1, 5, 5], 20).state) == {"balanced"}  # large, by chance
    assert set(load_of([900_000, 1_000_000], 1_900_000).state) == {"balanced"}  # sure, small
    states = list(load_of([100, 1000, 1000, 3900], 6000).state)
    assert states == ["underused", "balanced", "balanced", "overused"]


def test_one_token_is_as_far_off_as_it_is():
    """One choice of four: 3/4 above its mean, in spreads of sqrt(1/4 x 3/4)."""
    z = load_of([1, 0, 0, 0], 1).z.to_numpy()
    assert z == pytest.approx(np.array([0.75, -0.25, -0.25, -0.25]) / np.sqrt(3 / 16))


def test_half_and_twice_the_even_share_are_still_balanced():
    counts_LE = np.array([[500, 2000, 750, 750], [499, 2001, 750, 750]])
    table = load(counts_LE, np.array([4000, 4000]), 1, card_of(2, 4, 1))
    assert table.state[:4].tolist() == ["balanced"] * 4 and (table.q_value[:4] < 0.01).all()
    assert table.state[4:].tolist() == ["underused", "overused", "balanced", "balanced"]
    assert set(load_of([100, 1000, 1000, 3900], 6000, under=0.01, over=3).state) == {"balanced"}


def test_dead_takes_enough_tokens() -> None:
    """E (1 - k/E)^T < 0.01 from T = 22 on, for E = 4 and k = 1."""
    assert 4 * 0.75**20 > 0.01 > 4 * 0.75**21
    for tokens, state in ((20, TOO_FEW), (21, "dead")):
        table = load_of([tokens, 0, 0, 0], tokens)
        assert list(table.state)[1:] == [state] * 3
        card = card_of(1, 4, 1)
        row = health(np.array([[tokens, 0, 0, 0]]), np.array([tokens]), 1, card, None).iloc[0]
        assert row.tokens_for_dead == 21
        assert (row.dead_experts, row.unused_experts) == ((3, 0) if state == "dead" else (0, 3))


def test_even_choices_are_seldom_called_uneven() -> None:
    rng = np.random.default_rng(0)
    counts_LE = rng.multinomial(10_000, np.full(64, 1 / 64), size=200)
    card = card_of(200, 64, 1)
    table = load(counts_LE, np.full(200, 10_000), 1, card, under=1, over=1)
    layers = table[table.state != "balanced"].layer.nunique()
    assert layers <= 200 * 0.05
    rows = health(counts_LE, np.full(200, 10_000), 1, card, None)
    assert 0.4 < (rows.max_over_mean <= rows.noise_floor).mean() < 0.75


def even_counts(
    n_layers: int, n_tokens: int, n_experts: int, top_k: int, *, missing: float = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Counts [L, E] and tokens [L] of independent tokens that take k experts, any k alike."""
    rng = np.random.default_rng((n_tokens, n_experts, top_k))
    noise_LTE = rng.random((n_layers, n_tokens, n_experts), np.float32)
    nth_LT1 = np.partition(noise_LTE, top_k - 1, axis=2)[:, :, top_k - 1 : top_k]
    used_LTE = noise_LTE <= nth_LT1
    if missing:
        used_LTE &= rng.random(used_LTE.shape, np.float32) >= missing
    return used_LTE.sum(axis=1), used_LTE.any(axis=2).sum(axis=1)


def even_health(n_layers: int, n_tokens: int, n_experts: int, top_k: int) -> pd.DataFrame:
    counts_LE, tokens_L = even_counts(n_layers, n_tokens, n_experts, top_k)
    return health(counts_LE, tokens_L, top_k, card_of(n_layers, n_experts, top_k), None)


@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "top_k"),
    [(1, 64, 1), (10, 128, 1), (30, 128, 1), (10, 256, 8), (30, 256, 8), (10, 64, 6)],
)
def test_few_even_tokens_overuse_nobody(n_tokens: int, n_experts: int, top_k: int) -> None:
    """A false discovery rate of 1 % where all is chance: one layer in a hundred, not one in three."""
    table = even_health(300, n_tokens, n_experts, top_k)
    assert (table.overused > 0).mean() <= 0.02 and (table.underused > 0).mean() <= 0.02


@pytest.mark.parametrize(
    ("n_experts", "top_k"), [(2, 1), *((n, k) for n in (8, 32, 128) for k in (1, 2, 3, 4))]
)
def test_noise_floor_is_what_even_use_shows(n_experts: int, top_k: int) -> None:
    """6 %: three standard errors of the simulation at E = 2, and what the binomial law leaves at E = 128."""
    table = even_health(min(2000, 40_000 // n_experts), 120, n_experts, top_k)
    measured = (table.max_over_mean - 1).mean()
    assert table.noise_floor.iloc[0] - 1 == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "top_k"),
    [(10, 2, 1), (400, 2, 1), (40, 4, 1), (400, 8, 2), (400, 8, 7), (100, 32, 4), (5, 64, 6)],
)
def test_even_use_is_seldom_too_even(n_tokens: int, n_experts: int, top_k: int) -> None:
    """A p-value: below 5 % in 5 % of the cases at most, ties of few tokens included."""
    p_L = even_health(1000, n_tokens, n_experts, top_k).too_even_p_value
    for level in (0.2, 0.05, 0.01):
        assert (p_L < level).mean() <= level + 3 * math.sqrt(level / 1000)
    if n_tokens == 400:  # and no waste where tokens are many
        assert (p_L < 0.2).mean() > 0.1 and p_L.mean() < 0.62


def test_logs_of_even_routers_are_not_accused() -> None:
    """640 layers of Mixtral's shape: at the summary's threshold none of them."""
    assert even_health(640, 500, 8, 2).too_even_p_value.min() > 1e-4 / 32


def test_missing_choices_are_no_evenness() -> None:
    counts_LE, tokens_L = even_counts(1000, 200, 8, 2, missing=0.4)
    p_L = health(counts_LE, tokens_L, 2, card_of(1000, 8, 2), None).too_even_p_value
    assert (p_L < 0.05).mean() <= 0.07 and p_L.notna().all()


def test_equal_counts_are_too_even_if_tokens_are_many() -> None:
    def p_value(n_tokens: int, n_experts: int, top_k: int) -> float:
        counts_LE = np.full((1, n_experts), n_tokens * top_k // n_experts)
        card = card_of(1, n_experts, top_k)
        return health(counts_LE, np.array([n_tokens]), top_k, card, None).too_even_p_value.iloc[0]

    assert p_value(2000, 8, 2) < 1e-8 and p_value(1600, 64, 6) < 1e-20
    for n in (2, 4, 8):  # as many tokens as experts: all different with chance n! / n**n
        assert p_value(n, n, 1) >= math.factorial(n) / n**n
    tie = math.comb(2000, 1000) / 2**2000  # two experts: a tie is no wonder
    assert p_value(2000, 2, 1) == pytest.approx(tie, rel=0.01)
    assert math.isnan(p_value(7, 4, 4)) and math.isnan(p_value(0, 4, 2))
    assert math.isnan(p_value(9, 1, 1))


def test_every_expert_every_time() -> None:
    """k = E: nothing can vary, nothing is uneven, nothing divides by zero."""
    card, counts_LE = card_of(1, 4, 4), np.full((1, 4), 7)
    table = load(counts_LE, np.array([7]), 4, card)
    assert (table.z == 0).all() and (table.p_value == 1).all() and (table.q_value == 1).all()
    assert set(table.state) == {"balanced"}
    row = health(counts_LE, np.array([7]), 4, card, None).iloc[0]
    assert (row.noise_floor, row.max_over_mean, row.tokens_for_dead) == (1, 1, 1)
    assert math.isnan(row.spread) and not row.is_collapsed


def test_missing_choices_are_no_underuse() -> None:
    """Half of the second choices were dropped: every expert still has its part."""
    table = load_of([1500] * 4, 4000, 2)
    assert (table.z == 0).all() and set(table.state) == {"balanced"}


def test_health_by_hand() -> None:
    counts_LE = np.array([[600, 200, 150, 50], [250] * 4, [0] * 4])
    tokens_L = np.array([1000, 1000, 0])
    table = health(counts_LE, tokens_L, 1, card_of(3, 4, 1), None)
    first, second, third = (row for _, row in table.iterrows())
    assert first.max_over_mean == pytest.approx(2.4)
    assert (first.max_violation, first.min_violation) == pytest.approx((1.4, -0.8))
    expected_maximum = 1.0294  # of four standard normals (Harter 1961), spread by their one sum
    floor = 1 + expected_maximum * math.sqrt(4 / 3) * math.sqrt(3 / 1000)
    assert first.noise_floor == second.noise_floor == pytest.approx(floor, abs=0.003)
    assert first.too_even_p_value > 0.99 and second.too_even_p_value < 1e-3
    assert (first.overused, first.underused, first.top_1_share) == (1, 1, pytest.approx(0.6))
    assert first.gini == pytest.approx((-3 * 50 - 150 + 200 + 3 * 600) / 4000)
    assert (second.gini, second.spread, second.normalized_entropy) == pytest.approx((0, 1, 1))
    assert (third.tokens, third.dead_experts, third.unused_experts) == (0, 0, 4)
    assert math.isnan(third.max_over_mean) and math.isnan(third.gini) and not third.is_collapsed
    nothing = table[["max_violation_windows", "capacity_factor_1pct", "fano_max"]]
    assert nothing.isna().all(axis=None)


def test_a_handful_of_tokens_is_no_collapse() -> None:
    """Three tokens that agree: no router is broken; 3,000 that agree: this one is."""
    for tokens, is_collapsed in ((3, False), (3000, True)):
        counts_LE = np.array([[tokens] + [0] * 63])
        row = health(counts_LE, np.array([tokens]), 1, card_of(1, 64, 1), None).iloc[0]
        assert row.spread == 0 and row.is_collapsed == is_collapsed


@pytest.mark.parametrize(("top_k", "is_collapsed"), [(1, True), (2, True), (3, False)])
def test_collapse_is_measured_from_what_k_allows(top_k: int, is_collapsed: bool) -> None:
    """Entropy of k experts out of 64 is log2 k at least, so the same entropy means more at a larger k."""
    counts_LE = np.array([[9000] * top_k + [1000 if top_k < 3 else 9000] * (64 - top_k)])
    counts_LE[0, top_k:] //= 64 if top_k < 3 else 1
    tokens_L = counts_LE.sum(axis=1) // top_k
    row = health(counts_LE, tokens_L, top_k, card_of(1, 64, top_k), None).iloc[0]
    assert row.is_collapsed == is_collapsed
    least = math.log2(top_k)
    expected = (row.normalized_entropy * 6 - least) / (6 - least)
    assert row.spread == pytest.approx(expected, abs=1e-4)


def test_health_in_windows() -> None:
    """Every window has one busy expert, another every time: balanced over the whole, not in any window."""
    ids_T = np.repeat(np.tile(np.arange(4), 5), 10)
    trace = trace_of(card_of(1, 4, 1), ids_T[:, None, None])
    row = balance(trace, tokens=10).iloc[0]
    assert (row.max_violation, row.max_violation_windows) == (0, 3)
    assert row.capacity_factor_1pct == 4  # E: one expert takes all
    assert row.fano_max == pytest.approx(np.var([10, 0, 0, 0] * 5, ddof=1) / 2.5)
    coarse = balance(trace, tokens=40).iloc[0]
    assert (coarse.max_violation_windows, coarse.capacity_factor_1pct) == (0, 1)
    assert math.isnan(balance(trace, tokens=1000).fano_max.iloc[0])  # no window is full


def test_the_short_last_window_is_in_drops_only() -> None:
    ids_T = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0])
    windows = windows_of(trace_of(card_of(1, 4, 1), ids_T[:, None, None]), 4)
    sums = windows.total()
    assert (sums.full_L[0], sums.choices_L[0], sums.violation_L[0]) == (2, 9, 0)
    curve = capacity_curve(windows).set_index("capacity_factor")
    assert curve.dropped_share[1.0] == 0
    assert curve.padding_share[1.0] == pytest.approx(3 / 12)
    assert curve.dropped_share[0.5] == 0  # rounded up to one


def test_hotspots() -> None:
    rng = np.random.default_rng(0)
    ids_TLK = rng.integers(0, 8, (4000, 2, 1))
    ids_TLK[:1000, 1] = 5  # in one quarter of the trace
    trace = trace_of(card_of(2, 8, 1), ids_TLK)
    windows, table = windows_of(trace, 500), expert_load(trace)
    found = hotspots(table, windows, trace.card, most=3)
    assert (found.layer.iloc[0], found.expert.iloc[0]) == (2, 5)
    assert found.largest_window_ratio.iloc[0] == 8
    assert found.fano.iloc[0] > 50
    assert (found.q_value <= 0.01).all() and (found.ratio > 1).all() and len(found) <= 3
    assert hotspots(table.assign(q_value=0.5), windows, trace.card).empty


def test_memory() -> None:
    card = card_of(2, 12, 3, expert_bytes_L=(100, 1000))
    trace = drawn(400)
    counts_LE = np.array([[1] * 12, [1] * 6 + [0] * 6])
    sets = working_sets(trace, (1, 64))
    assert memory(counts_LE, None, card).bytes_window_64.isna().all()
    assert memory(counts_LE, sets, card).bytes_window_64.isna().all()  # requests are short
    long = working_sets(trace_of(card, trace.ids_TLK.astype(int) % 12), (64, 1024))
    table = memory(counts_LE, long, card)
    assert list(table.all_bytes) == [1200, 12_000]
    assert list(table.touched_bytes) == [1200, 6000]
    assert list(table.bytes_per_token) == [300, 3000]
    expected = long[long.window == 64].mean_experts.to_numpy() * (100, 1000)
    assert list(table.bytes_window_64) == pytest.approx(list(expected))
    assert table.bytes_window_1024.isna().all()
    with pytest.raises(MissingData, match="bytes of an expert"):
        memory(counts_LE, None, card_of(2, 12, 3))


def remedies_of(train: list[int], test: list[int], **known: Any) -> pd.DataFrame:
    card = card_of(1, len(train), 1, **known)
    return remedies(np.array([train]), np.array([test]), card, None)


def test_remedies_by_hand() -> None:
    train = [80, 40, 20, 10, 10, 10, 10, 20]
    test = [60, 60, 10, 20, 10, 10, 10, 20]
    table = remedies_of(train, test, expert_bytes_L=(5 * 10**8,))
    pins = table[table.remedy == "pin experts"]
    sizes = zip((1, 2, 4), ("500 MB", "1 GB", "2 GB"), strict=True)
    assert list(pins.setting) == [f"{m} per layer ({size} in all)" for m, size in sizes]
    assert list(pins.before) == [1 / 8, 1 / 4, 1 / 2]
    assert list(pins.after) == pytest.approx([0.3, 0.6, 0.75])  # the tie goes to the smaller id
    (copy,) = table[table.remedy == "replicate experts"].itertuples()
    assert (copy.before, copy.after) == pytest.approx((60 / 25, 60 / (200 / 9)))
    places = table[table.remedy == "place experts"]
    assert list(places.setting) == ["2 ranks", "4 ranks", "8 ranks"]
    assert list(places.before) == pytest.approx([1.5, 2.4, 2.4])
    # by training counts 80 10 10 10 | 40 20 20 10: the ids 0 3 5 6 | 1 2 7 4
    assert places.after.iloc[0] == pytest.approx((60 + 20 + 10 + 10) / 100)
    assert set(table.complexity) == {"low", "medium", "high"}
    assert table.how.str.startswith("computed from test choices").all()


def test_replicas_are_halves_then_thirds() -> None:
    """16 experts, one with half of the choices: two replicas cut it to a third."""
    train = [150, *[10] * 15]
    table = remedies_of(train, train).query("remedy == 'replicate experts'")
    assert list(table.setting) == ["1 per layer", "2 per layer"]
    assert list(table.after) == pytest.approx([75 / (300 / 17), 50 / (300 / 18)])


def test_balanced_placement_of_training_counts_is_never_worse() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts_LE = rng.integers(0, 1000, (3, 16))
        table = remedies(counts_LE, counts_LE, card_of(3, 16, 1), None)
        places = table[table.remedy == "place experts"]
        assert (places.after <= places.before + 1e-12).all()
        assert (places.after >= 1).all()


def test_remedies_leave_out_what_is_missing() -> None:
    empty = remedies_of([1, 2, 3], [0, 0, 0])
    assert empty.empty and list(empty) == list(remedies_of([1], [1]))
    assert "place experts" not in set(remedies_of([1, 2, 3], [1, 2, 3]).remedy)  # 3 do not divide
    ids_T = np.repeat(np.tile(np.arange(16), 4), 4)
    trace = trace_of(card_of(1, 16, 1), ids_T[:, None, None])
    none = np.zeros((1, 16), int)
    nobody = remedies(none, none, trace.card, windows_of(trace, 4))
    assert nobody.empty  # in every window one of 16 takes all: no factor is enough
    (row,) = remedies(none, none, trace.card, windows_of(trace, 8)).itertuples()
    assert (row.remedy, row.setting, row.before, row.after) == (
        "raise capacity",
        "factor 8",
        0.75,
        0,
    )
    assert "the same that the factor is chosen on" in row.how


def test_counts_without_a_trace() -> None:
    card = card_of(2, 4, 2)
    counts_LE = np.array([[50, 50, 60, 40], [150, 20, 20, 10]])
    counts = ExpertCounts(card, counts_LE, Provenance("synthetic", "test"))
    assert len(expert_load(counts)) == 8
    table = balance(counts)
    assert list(table.tokens) == [100, 100] and table.fano_max.isna().all()
    assert list(table.max_over_mean) == [1.2, 3]


@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (255, 1), (256, 8), (300, 8)])
def test_one_token(n_experts: int, top_k: int) -> None:
    trace = trace_of(card_of(1, n_experts, top_k), np.arange(n_experts)[None, None, -top_k:])
    row = balance(trace).iloc[0]
    assert row.max_over_mean == pytest.approx(n_experts / top_k)
    assert math.isnan(row.max_violation_windows) and math.isnan(row.fano_max)
    states = expert_load(trace).state
    assert list(states)[:-top_k] == [TOO_FEW] * (n_experts - top_k)
    assert len(capacity_curve(windows_of(trace, 1))) == len(FACTORS_F)


def test_a_layer_that_no_row_uses() -> None:
    card = ModelCard("m", 4, 1, (0, 0), ("encoder", "decoder"))
    ids_TLK = np.full((400, 2, 1), -1)
    ids_TLK[:, 0, 0] = np.arange(400) % 4
    trace = trace_of(card, ids_TLK)
    table = balance(trace, tokens=40)
    assert list(table["stack"]) == ["encoder", "decoder"] and list(table.tokens) == [400, 0]
    assert (
        table.iloc[1].drop(["layer", "stack"])[["max_over_mean", "gini", "fano_max"]].isna().all()
    )
    windows, rows = windows_of(trace, 40), expert_load(trace)
    assert set(capacity_curve(windows)["stack"]) == {"encoder"}
    assert list(rows.state) == ["balanced"] * 4 + [TOO_FEW] * 4
    assert hotspots(rows, windows, card).empty and "stack" in rows


def test_real_balance(real_data: Path) -> None:
    arrays = np.load(real_data / "traces/esft-deepseek-v2-lite/esft_deepseek_v2_lite_law.npz")
    card = plain_card("v2-lite", n_experts=64, top_k=6, layer_numbers=tuple(range(1, 27)))
    trace = trace_of(card, arrays["expert_ids"], request_T=arrays["seq_id"])
    table = balance(trace)
    assert (table.max_over_mean > table.noise_floor).all()
    assert not table.is_collapsed.any() and not table.dead_experts.any()
    assert (table.max_violation_windows > table.max_violation).mean() > 0.5
    assert (table.fano_max > 1).all()
    assert (table.normalized_entropy * 6).mean() == pytest.approx(5.76, abs=0.005)  # its README
