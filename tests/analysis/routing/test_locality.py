"""Working sets, gaps and drift: equal to plain Python, the same from any batches, and what independent draws give."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.routing.batch import ByPhase, accumulate, batches, plan_of
from analysis.routing.locality import (
    ENOUGH_GAPS,
    Drift,
    Gaps,
    WorkingSets,
    burstiness,
    drift,
    working_sets,
)
from prefetch.trace.card import ModelCard, plain_card
from prefetch.trace.routing import DECODE, PREFILL, RoutingTrace, trace_of

WINDOWS = (1, 2, 3, 5, 8, 40)


def card_of(n_layers: int, n_experts: int, top_k: int) -> ModelCard:
    numbers = tuple(range(1, n_layers + 1))
    return plain_card("m", n_experts=n_experts, top_k=top_k, layer_numbers=numbers)


def drawn(
    n_tokens: int, n_layers: int = 2, n_experts: int = 12, top_k: int = 3, seed: int = 0, **of: Any
) -> RoutingTrace:
    """Independent tokens with a Zipf popularity; requests of 1 to 9 rows; some choices and some rows are missing."""
    rng = np.random.default_rng(seed)
    of = {
        "request_T": np.repeat(np.arange(n_tokens), rng.integers(1, 10, n_tokens))[:n_tokens],
        "executed_T": rng.random(n_tokens) < 0.9,
        "missing": 0.2,
        **of,
    }
    of["executed_T"] |= not np.any(of["executed_T"])
    weight_E = np.arange(1, n_experts + 1) ** -0.7
    scores_TLE = rng.random((n_tokens, n_layers, n_experts)) ** (1 / weight_E)
    ids_TLK = np.argsort(-scores_TLE, axis=2)[:, :, :top_k].astype(np.int64)
    ids_TLK[rng.random(ids_TLK.shape) < of.pop("missing")] = -1
    return trace_of(card_of(n_layers, n_experts, top_k), ids_TLK, **of)


def independent(n_tokens: int, n_experts: int, top_k: int, seed: int = 0) -> RoutingTrace:
    """One request, one layer, all rows."""
    whole = {"request_T": 0, "executed_T": True, "missing": 0.0}
    return drawn(n_tokens, 1, n_experts, top_k, seed, **whole)


def runs_of(trace: RoutingTrace, layer: int) -> list[list[set[int]]]:
    """The sets of experts of every run of executed rows, without rows that have none at the layer."""
    runs: list[list[set[int]]] = []
    before = None
    for request, position, row_K, executed in zip(
        trace.request_T.tolist(),
        trace.position_T.tolist(),
        trace.ids_TLK[:, layer].tolist(),
        trace.executed_T,
        strict=True,
    ):
        if not executed:
            continue
        if before != (request, position - 1):
            runs.append([])
        before = request, position
        if experts := {expert for expert in row_K if expert < trace.card.n_experts}:
            runs[-1].append(experts)
    return [run for run in runs if run]


def slow_working_set(rows: list[list[set[int]]], window: int) -> list[int]:
    return [
        len(set().union(*run[start : start + window]))
        for run in rows
        for start in range(len(run) - window + 1)
    ]


def missed(uses: int, tokens: int, window: int) -> float:
    """Chance that so many different tokens, picked at random, all miss an expert."""
    return math.comb(tokens - uses, window) / math.comb(tokens, window)


def slow_gaps(rows: list[list[set[int]]]) -> dict[int, list[int]]:
    gaps: dict[int, list[int]] = {}
    for run in rows:
        last: dict[int, int] = {}
        for now, experts in enumerate(run):
            for expert in experts:
                if expert in last:
                    gaps.setdefault(expert, []).append(now - last[expert])
                last[expert] = now
    return gaps


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 90), st.integers(0, 99), st.integers(1, 12))
def test_working_sets_equal_sets(n_tokens: int, seed: int, top_k: int) -> None:
    trace = drawn(n_tokens, top_k=top_k, seed=seed)
    table = working_sets(trace, WINDOWS)
    expected = []
    for layer in range(2):
        rows = runs_of(trace, layer)
        uses, tokens = Counter(e for r in rows for t in r for e in t), sum(map(len, rows))
        for window in WINDOWS:
            sizes = slow_working_set(rows, window)
            if sizes:
                even = sum(1 - missed(n, tokens, window) for n in uses.values())
                expected.append((layer + 1, window, len(sizes), sum(sizes) / len(sizes), even))
    assert len(table) == len(expected)
    for row, (layer, window, windows, mean, even) in zip(table.itertuples(), expected, strict=True):
        assert (row.layer, row.window, row.windows) == (layer, window, windows)
        assert row.mean_experts == pytest.approx(mean, rel=1e-12)
        assert row.share == pytest.approx(mean / 12, rel=1e-12)
        assert row.independent_experts == pytest.approx(even, rel=1e-9)
        assert row.ratio == pytest.approx(mean / even, rel=1e-9)


def test_working_sets_of_independent_tokens() -> None:
    table = working_sets(independent(20_000, 32, 4))
    assert list(table.window) == [1, 4, 16, 64, 256, 1024]
    assert table.mean_experts.iloc[0] == 4
    assert table.independent_experts.iloc[0] == pytest.approx(4, rel=1e-12)
    assert table.ratio.to_numpy() == pytest.approx(np.ones(6), abs=0.02)
    assert (np.diff(table.mean_experts) >= 0).all() and table.share.max() <= 1


@pytest.mark.parametrize(("n_tokens", "n_experts", "top_k"), [(12, 64, 2), (40, 64, 2), (90, 9, 3)])
def test_unrelated_tokens_of_a_short_trace(n_tokens: int, n_experts: int, top_k: int) -> None:
    """Tokens that are unrelated, few of them: what they use and repeat is what unrelated tokens would."""
    traces = [independent(n_tokens, n_experts, top_k, seed) for seed in range(150)]
    sets = pd.concat([working_sets(trace, (4, 10)) for trace in traces])
    means = sets.groupby("window")[["mean_experts", "independent_experts"]].mean()
    assert means.mean_experts.to_numpy() == pytest.approx(means.independent_experts, rel=0.01)
    repeats = []
    for trace in traces:
        rows = trace.ids_TLK[:, 0].tolist()
        same = [len(set(a) & set(b)) for a, b in pairwise(rows)]
        repeats.append(np.mean(same) / top_k - burstiness(trace).expected_repeat.iloc[0])
    error = np.std(repeats) / math.sqrt(len(repeats))
    assert abs(np.mean(repeats)) < 3.5 * error and error < 0.006


def test_turns_are_not_one_text() -> None:
    """Prompt and answer take turns of four rows: no window of an answer holds eight rows in a row."""
    rng = np.random.default_rng(0)
    ids_TLK = rng.integers(0, 16, (400, 1, 1))
    turns = np.tile(np.repeat([PREFILL, DECODE], 4), 50)
    trace = trace_of(card_of(1, 16, 1), ids_TLK, request_T=np.arange(400) // 80, phase_T=turns)
    sets = by_phase(trace, lambda plan: WorkingSets(plan, (1, 2, 4, 5)))
    found = {phase: list(table.windows) for phase, table in sets.items()}
    half = [200, 150, 50]  # five rows in a row: never
    assert found == {"all": [400, 395, 385, 380], "prefill": half, "decode": half}
    gaps = by_phase(trace, Gaps)
    assert all(table.mean_gap.iloc[0] < 3 for name, table in gaps.items() if name != "all")
    assert gaps["all"].mean_gap.iloc[0] > 8


def by_phase(trace: RoutingTrace, make: Any) -> dict[str, pd.DataFrame]:
    plan = plan_of(trace)
    counted: ByPhase[Any] = ByPhase(plan, lambda: make(plan))
    accumulate(trace, plan, [counted])
    return {phase: part.table() for phase, part in counted.parts.items()}


def test_working_sets_of_repeating_tokens_are_small() -> None:
    """Ten rows each of the same expert: a window of ten rows holds almost two."""
    ids_TLK = np.repeat(np.random.default_rng(0).permutation(100), 10)[:, None, None]
    row = working_sets(trace_of(card_of(1, 100, 1), ids_TLK), (10,)).iloc[0]
    assert row.mean_experts == pytest.approx(1.9, abs=0.01)
    assert row.ratio < 0.25


def test_windows_must_hold_a_row() -> None:
    plan = plan_of(drawn(10))
    for windows in ((), (0, 4)):
        with pytest.raises(ValueError, match="at least one row"):
            WorkingSets(plan, windows)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.integers(0, 99), st.integers(1, 5))
def test_gaps_equal_a_list_of_gaps(n_tokens: int, seed: int, top_k: int) -> None:
    trace = drawn(n_tokens, n_experts=5, top_k=top_k, seed=seed)
    counted = Gaps(plan_of(trace))
    accumulate(trace, counted.plan, [counted])
    table, bins = counted.table(), counted.histogram()
    for layer in range(2):
        rows = runs_of(trace, layer)
        by_expert = slow_gaps(rows)
        gaps = [gap for each in by_expert.values() for gap in each]
        found = table[table.layer == layer + 1]
        assert len(found) == bool(rows)
        for row in found.itertuples():
            assert row.gaps == len(gaps)
            assert row.mean_gap == pytest.approx(np.mean(gaps) if gaps else np.nan, nan_ok=True)
            expected = slow_burstiness(by_expert)
            assert (row.burstiness, row.geometric_burstiness) == pytest.approx(
                expected, nan_ok=True
            )
            uses = Counter(e for r in rows for t in r for e in t)
            others = sum(map(len, rows)) - 1
            pairs = sum(n * (n - 1) for n in uses.values())
            repeat = pairs / others / sum(uses.values()) if others else math.nan
            assert row.expected_repeat == pytest.approx(repeat, nan_ok=True)
        binned = Counter(gap.bit_length() - 1 for gap in gaps)
        here = bins[bins.layer == layer + 1]
        assert list(here.gap_from) == [1 << b for b in sorted(binned)]
        assert list(here.gap_to) == [2 * low - 1 for low in here.gap_from]
        assert list(here["count"]) == [binned[b] for b in sorted(binned)]


def slow_burstiness(by_expert: dict[int, list[int]]) -> tuple[float, float]:
    total, own, even = 0, 0.0, 0.0
    for gaps in by_expert.values():
        if len(gaps) >= ENOUGH_GAPS:
            mean, spread = float(np.mean(gaps)), float(np.std(gaps))
            random = mean * math.sqrt(1 - 1 / mean)
            own += len(gaps) * (spread - mean) / (spread + mean)
            even += len(gaps) * (random - mean) / (random + mean)
            total += len(gaps)
    return (own / total, even / total) if total else (math.nan, math.nan)


def test_burstiness_of_known_sequences() -> None:
    """Independent tokens are geometric, a cycle is regular, runs with long pauses are bursts."""
    row = burstiness(independent(50_000, 16, 2)).iloc[0]
    assert row.burstiness == pytest.approx(row.geometric_burstiness, abs=0.01)
    assert row.burstiness < 0  # rows are discrete: 0 is for continuous time

    def of(ids_T: Any) -> pd.Series[Any]:
        trace = trace_of(card_of(1, 20, 1), np.asarray(ids_T)[:, None, None])
        return burstiness(trace).iloc[0]

    cycle = of(np.arange(2000) % 20)
    assert cycle.burstiness == pytest.approx(-1)
    assert cycle.mean_gap == 20
    bursts = of(np.repeat(np.random.default_rng(0).integers(0, 20, 200), 50))
    assert bursts.burstiness > 0.5 > bursts.geometric_burstiness


def test_a_gap_longer_than_the_table_of_logarithms() -> None:
    ids_T = np.zeros(20_000, np.int64)
    ids_T[[0, 9000, 9001, 19_000]] = 1
    trace = trace_of(card_of(1, 2, 1), ids_T[:, None, None])
    counted = Gaps(plan_of(trace))
    accumulate(trace, counted.plan, [counted])
    assert list(counted.histogram().gap_from) == [1, 2, 8192]
    assert list(counted.histogram()["count"]) == [19_993 + 1, 2, 2]
    assert counted.moments_LEM[0, 1].tolist() == [4, 3, 19_000, 9000**2 + 1 + 9999**2]


def slow_divergence(one: np.ndarray, other: np.ndarray) -> float:
    p, q = one / one.sum(), other / other.sum()
    pairs = [(a, (a + b) / 2) for a, b in [*zip(p, q, strict=True), *zip(q, p, strict=True)]]
    return float(sum(a * math.log2(a / m) for a, m in pairs if a > 0) / 2)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 200), st.integers(0, 99), st.integers(1, 9))
def test_drift_equals_the_definition(n_tokens: int, seed: int, slices: int) -> None:
    trace = drawn(n_tokens, seed=seed)
    counted = Drift(plan_of(trace), slices)
    accumulate(trace, counted.plan, [counted])
    expected = np.zeros((slices, 2, 12), int)
    tokens = np.zeros((slices, 2), int)
    for t in np.flatnonzero(trace.executed_T):
        for layer in range(2):
            experts = [e for e in trace.ids_TLK[t, layer].tolist() if e < 12]
            tokens[t * slices // n_tokens, layer] += bool(experts)
            for expert in experts:
                expected[t * slices // n_tokens, layer, expert] += 1
    assert (counted.counts_SLE == expected).all()
    for row in counted.table().itertuples():
        counts_SE = expected[:, row.layer - 1]
        assert row.tokens == tokens[row.slice, row.layer - 1] > 0
        rest = counts_SE.sum(axis=0) - counts_SE[row.slice]
        known = slow_divergence(counts_SE[row.slice], rest) if rest.any() else math.nan
        assert row.divergence == pytest.approx(known, abs=1e-12, nan_ok=True)
        assert not row.divergence_even > 1
    timeline = counted.timeline()
    cells = timeline[["slice", "layer", "expert"]].to_numpy().T - np.array([[0], [1], [0]])
    assert (expected[tuple(cells)] == timeline["count"]).all()
    assert len(timeline) == np.count_nonzero(expected)


@pytest.mark.parametrize("top_k", [1, 4, 14])
def test_without_drift_slices_differ_as_much_as_the_control(top_k: int) -> None:
    """Over 20 traces, because one slice varies by a quarter; the control knows that a token's choices differ."""
    frames = [drift(independent(3200, 16, top_k, seed), 16) for seed in range(20)]
    table = pd.concat(frames)
    ratio = table.divergence.mean() / table.divergence_even.mean()
    assert ratio == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "top_k"), [(32, 64, 6), (64, 64, 6), (32, 16, 1)]
)
def test_drift_of_a_short_trace_is_its_control(n_tokens: int, n_experts: int, top_k: int) -> None:
    """Slices of one or two tokens without drift."""
    frames = [drift(independent(n_tokens, n_experts, top_k, seed)) for seed in range(40)]
    table = pd.concat(frames)
    assert table.divergence.mean() == pytest.approx(table.divergence_even.mean(), rel=0.01)


@pytest.mark.parametrize(("missing", "near"), [(0.0, 0.02), (0.3, 0.06)])
def test_control_of_drift_is_the_mean_over_orders(missing: float, near: float) -> None:
    """Exact where every token has k choices; the slices are unequal here."""
    trace = drawn(60, 1, 12, 3, request_T=0, executed_T=True, missing=missing)
    rng = np.random.default_rng(0)

    def orders() -> Iterator[pd.DataFrame]:
        for _ in range(300):
            yield drift(trace_of(trace.card, trace.ids_TLK[rng.permutation(60)]), 7)

    permuted = pd.concat(orders()).groupby("slice").divergence.mean()
    assert drift(trace, 7).divergence_even.to_numpy() == pytest.approx(permuted, rel=0.08)
    even = drift(trace, 7).divergence_even.mean()
    assert even == pytest.approx(permuted.mean(), rel=near)


def test_every_expert_every_time_cannot_drift() -> None:
    table = drift(independent(64, 4, 4), 4)
    assert (table.divergence == 0).all() and (table.divergence_even == 0).all()


def test_drift_is_found() -> None:
    """The last quarter uses other experts."""
    rng = np.random.default_rng(0)
    ids_T = np.concatenate([rng.integers(0, 8, 3000), rng.integers(8, 16, 1000)])
    table = drift(trace_of(card_of(1, 16, 1), ids_T[:, None, None]), 4)
    assert table.divergence.iloc[3] == pytest.approx(1)
    assert table.divergence.iloc[0] > 20 * table.divergence_even.iloc[0]


ALL = (lambda plan: WorkingSets(plan, WINDOWS), Gaps, lambda plan: Drift(plan, 5))


def frames_of(counted: Any) -> list[pd.DataFrame]:
    names = ("table", "histogram", "timeline")
    return [getattr(counted, name)() for name in names if hasattr(counted, name)]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 80),
    st.integers(1, 90),
    st.integers(0, 99),
    st.lists(st.integers(0, 30), max_size=3),
)
def test_batches_and_parts_change_nothing(
    n_tokens: int, max_rows: int, seed: int, cuts: list[int]
) -> None:
    trace = drawn(n_tokens, seed=seed)
    plan = plan_of(trace)
    every = list(batches(trace, plan, max_rows=max_rows))
    for make in ALL:
        whole = make(plan)
        accumulate(trace, plan, [whole])
        parts = []
        for first, last in pairwise([0, *sorted(cuts), len(every)]):
            parts.append(make(plan))
            for batch in every[first:last]:
                parts[-1].add(batch)
        for later in parts[1:]:
            parts[0].merge(later)
        for mine, expected in zip(frames_of(parts[0]), frames_of(whole), strict=True):
            pd.testing.assert_frame_equal(mine, expected, check_exact=True)


@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (255, 1), (256, 8), (300, 8)])
def test_one_token(n_experts: int, top_k: int) -> None:
    trace = trace_of(card_of(1, n_experts, top_k), np.arange(n_experts)[None, None, -top_k:])
    sets = working_sets(trace)
    assert sets[["window", "windows", "mean_experts", "ratio"]].to_numpy().tolist() == [
        [1, 1, top_k, 1]
    ]
    gaps = burstiness(trace).iloc[0]
    assert gaps.gaps == 0 and math.isnan(gaps.burstiness) and math.isnan(gaps.mean_gap)
    row = drift(trace).iloc[0]
    assert (row["slice"], row.tokens) == (0, 1)
    assert math.isnan(row.divergence) and math.isnan(row.divergence_even)


def test_rows_of_the_other_stack_are_no_time() -> None:
    """An encoder and a decoder layer take turns: each sees its own rows only; a third layer is never used."""
    card = ModelCard("m", 4, 1, (0, 0, 1), ("encoder", "decoder", "decoder"))
    ids_TLK = np.full((40, 3, 1), -1)
    ids_TLK[::2, 0, 0], ids_TLK[1::2, 1, 0] = 0, np.arange(20) % 4
    trace = trace_of(card, ids_TLK)
    sets = working_sets(trace, (4,))
    assert list(sets["stack"]) == ["encoder", "decoder"]
    assert list(sets.mean_experts) == [1, 4] and list(sets.windows) == [17, 17]
    assert list(burstiness(trace).mean_gap) == [1, 4]
    assert set(drift(trace, 2)["stack"]) == {"encoder", "decoder"}


def test_real_repeats(real_data: Path) -> None:
    """Gaps of one row are what the README of the traces calls the same expert as the previous token."""
    for name, stated in (("intent", 0.262), ("law", 0.290), ("summary", 0.291)):
        path = real_data / f"traces/esft-deepseek-v2-lite/esft_deepseek_v2_lite_{name}.npz"
        arrays = np.load(path)
        card = plain_card("v2-lite", n_experts=64, top_k=6, layer_numbers=tuple(range(1, 27)))
        trace = trace_of(card, arrays["expert_ids"], request_T=arrays["seq_id"])
        counted = Gaps(plan_of(trace))
        accumulate(trace, counted.plan, [counted])
        bins = counted.histogram()
        repeats = bins[bins.gap_to == 1]["count"].to_numpy()
        following = 6 * (trace.n_tokens - len(trace.starts_R))
        assert (repeats / following).mean() == pytest.approx(stated, abs=0.001)
        assert (working_sets(trace, (16,)).ratio < 1).all()
        gaps = burstiness(trace)
        assert gaps.burstiness.mean() > gaps.geometric_burstiness.mean() + 0.02
