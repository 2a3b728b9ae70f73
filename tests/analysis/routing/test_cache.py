"""Cache curves: the same from any batches and merged parts, equal to a cache kept by hand, NaN where nothing is."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from analysis.routing.batch import Batch, Plan, accumulate, batches, plan_of
from analysis.routing.cache import (
    FIRST_USE,
    FirstUses,
    OptimalCurve,
    ReuseDistances,
    cache_curve,
    cache_curves,
    capacity_for,
    reuse_distances,
)
from prefetch.errors import MissingData
from prefetch.trace.card import ModelCard, plain_card
from prefetch.trace.routing import DECODE, RoutingTrace, trace_of


def card_of(n_layers: int, n_experts: int, top_k: int, **known: Any) -> ModelCard:
    numbers = tuple(range(1, n_layers + 1))
    return plain_card("m", n_experts=n_experts, top_k=top_k, layer_numbers=numbers, **known)


def drawn(
    n_tokens: int, n_layers: int = 2, n_experts: int = 12, top_k: int = 3, seed: int = 0, **of: Any
) -> RoutingTrace:
    """Requests of 1 to 9 tokens; the last third of each is decode; some choices are missing."""
    rng = np.random.default_rng(seed)
    weight_E = np.arange(1, n_experts + 1) ** -0.7
    scores_TLE = rng.random((n_tokens, n_layers, n_experts)) ** (1 / weight_E)
    ids_TLK = np.argsort(-scores_TLE, axis=2)[:, :, :top_k].astype(np.int64)
    ids_TLK[rng.random(ids_TLK.shape) < 0.05] = -1
    request_T = np.repeat(np.arange(n_tokens), rng.integers(1, 10, n_tokens))[:n_tokens]
    of = {"request_T": request_T, "phase_T": rng.random(n_tokens) < 0.4, **of}
    return trace_of(card_of(n_layers, n_experts, top_k), ids_TLK, **of)


def counted(parts: list[list[Batch]], plan: Plan) -> list[ReuseDistances]:
    found = []
    for part in parts:
        found.append(ReuseDistances(plan))
        for batch in part:
            found[-1].add(batch)
    return found


def slow_curve(
    trace: RoutingTrace, layer: int, capacity: int, phases: tuple[int, ...]
) -> list[int]:
    """Accesses, cold ones and hits of one LRU cache that is kept by hand."""
    cache: OrderedDict[int, None] = OrderedDict()
    met: set[int] = set()
    totals = [0, 0, 0]
    for row_K, phase, executed in zip(
        trace.ids_TLK[:, layer], trace.phase_T, trace.executed_T, strict=True
    ):
        event = [int(x) for x in row_K if x < trace.card.n_experts] if executed else []
        if phase in phases:
            totals[0] += len(event)
            totals[1] += len(set(event) - met)
            totals[2] += sum(x in cache for x in event)
        met |= set(event)
        for x in event:
            cache[x] = None
            cache.move_to_end(x)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return totals


PHASES = {"all": (0, 1), "prefill": (0,), "decode": (1,)}


def test_a_cache_kept_by_hand() -> None:
    trace = drawn(300, executed_T=np.random.default_rng(1).random(300) < 0.8)
    curves = cache_curve(trace, max_rows=50)
    assert list(curves.phase.unique()) == ["all", "prefill", "decode"]
    assert list(curves.layer.unique()) == [1, 2]
    assert sorted(curves.capacity.unique()) == list(range(3, 13))
    for row in curves.itertuples():
        expected = slow_curve(trace, row.layer - 1, row.capacity, PHASES[row.phase])
        assert [row.accesses, row.cold, row.lru_hits] == expected
        assert row.lru_hit_rate == row.lru_hits / row.accesses
        assert row.share == row.capacity / 12
        assert row.lru_hits <= row.optimal_hits <= row.accesses - row.cold


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_batches_change_nothing(n_tokens: int, max_rows: int, seed: int) -> None:
    trace = drawn(n_tokens, n_experts=8, top_k=2, seed=seed)
    pd.testing.assert_frame_equal(
        cache_curve(trace, max_rows=max_rows), cache_curve(trace, max_rows=n_tokens)
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.lists(st.integers(0, 30), min_size=3, max_size=3))
def test_merging_parts_in_any_order(seed: int, cuts: list[int]) -> None:
    """Four parts, some without a batch, from the left, from the right and as a tree."""
    trace = drawn(90, n_experts=30, seed=seed)
    plan = plan_of(trace)
    every = list(batches(trace, plan, max_rows=3))
    at = [0, *sorted(cuts), len(every)]
    parts = [every[a:b] for a, b in pairwise(at)]
    (whole,) = counted([every], plan)
    for order in ([0, 0, 0], [2, 1, 0], [2, 0, 0]):
        found = counted(parts, plan)
        for left in order:
            found[left].merge(found.pop(left + 1))
        pd.testing.assert_frame_equal(cache_curves(found[0]), cache_curves(whole))
        pd.testing.assert_frame_equal(reuse_distances(found[0]), reuse_distances(whole))


def test_first_uses_of_parts_are_put_one_after_the_other() -> None:
    trace = drawn(200)
    plan = plan_of(trace)
    every = list(batches(trace, plan, max_rows=20))
    whole, left, right = FirstUses(plan), FirstUses(plan), FirstUses(plan)
    for b, batch in enumerate(every):
        whole.add(batch)
        (left if b < 4 else right).add(batch)
    left.merge(right)
    assert np.array_equal(left.coming(), whole.coming())


def test_the_optimum_refuses_what_it_did_not_see_before() -> None:
    trace, other = drawn(200), drawn(200, seed=1)
    plan = plan_of(trace)
    first = FirstUses(plan)
    accumulate(trace, plan, [first], max_rows=40)
    with pytest.raises(ValueError, match="first pass"):
        accumulate(trace, plan, [OptimalCurve(plan, first)], max_rows=60)
    same_rows = RoutingTrace(**{**vars(trace), "ids_TLK": other.ids_TLK})
    with pytest.raises(ValueError, match="not the events"):
        accumulate(same_rows, plan, [OptimalCurve(plan, first)], max_rows=40)
    with pytest.raises(ValueError, match="in order"):
        OptimalCurve(plan, first).merge(OptimalCurve(plan, first))
    with pytest.raises(ValueError, match="the same rows"):
        cache_curves(*counted([[]], plan), optimal_of(trace, plan))


def test_the_optimum_of_some_layers_is_theirs() -> None:
    """Also where eight layers go together, and where the last ones are fewer."""
    trace = drawn(120, n_layers=11, n_experts=16)
    plan = plan_of(trace)
    first, whole = FirstUses(plan), optimal_of(trace, plan)
    accumulate(trace, plan, [first])
    together = OptimalCurve(plan, first)
    for layers in (range(0, 9), range(9, 11)):
        part = OptimalCurve(plan, first).of_layers(layers)
        accumulate(trace, plan, [part])
        together.take(layers, part.stacks.hist_LCD)
    np.testing.assert_array_equal(together.stacks.hist_LCD, whole.stacks.hist_LCD)


def test_more_rows_than_the_optimum_can_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = drawn(50)
    plan = plan_of(trace)
    first = FirstUses(plan)
    accumulate(trace, plan, [first])
    monkeypatch.setattr("analysis.routing.cache.MOST_EVENTS", 51)
    OptimalCurve(plan, first)
    monkeypatch.setattr("analysis.routing.cache.MOST_EVENTS", 50)
    with pytest.raises(MissingData, match="up to 50"):
        OptimalCurve(plan, first)


def optimal_of(trace: RoutingTrace, plan: Plan) -> OptimalCurve:
    first = FirstUses(plan)
    accumulate(trace, plan, [first])
    optimal = OptimalCurve(plan, first)
    accumulate(trace, plan, [optimal])
    return optimal


def test_distances_tell_the_curve() -> None:
    trace = drawn(300)
    plan = plan_of(trace)
    (reuse,) = counted([list(batches(trace, plan))], plan)
    table, curves = reuse_distances(reuse), cache_curves(reuse)
    assert "optimal_hits" not in curves
    assert (table["count"] > 0).all()
    for (phase, layer), rows in table.groupby(["phase", "layer"]):
        curve = curves[(curves.phase == phase) & (curves.layer == layer)]
        assert rows["count"].sum() == curve.accesses.iloc[0]
        assert rows["count"][rows.distance == FIRST_USE].sum() == curve.cold.iloc[0]
        for capacity, hits in zip(curve.capacity, curve.lru_hits, strict=True):
            met = (rows.distance != FIRST_USE) & (rows.distance < capacity)
            assert rows["count"][met].sum() == hits


def test_the_capacity_that_holds_a_share() -> None:
    """Two experts in turn, 100 times, then two others: four of 204 accesses are first uses."""
    ids = np.array([0, 1] * 100 + [2, 3] * 2).reshape(-1, 1, 1)
    curves = cache_curve(trace_of(card_of(1, 5, 1), ids))
    (row,) = capacity_for(curves, 0.9).itertuples()
    assert (row.phase, row.layer, row.hit_rate) == ("all", 1, 0.9)
    assert (row.lru_capacity, row.optimal_capacity) == (2, 2)
    assert row.lru_share == 0.4
    (row,) = capacity_for(curves, 200 / 204).itertuples()
    assert row.lru_capacity == row.optimal_capacity == 2
    (row,) = capacity_for(curves, 0.99).itertuples()
    assert np.isnan(row.lru_capacity) and np.isnan(row.optimal_share)
    assert "optimal_capacity" not in capacity_for(curves.drop(columns=["optimal_hits"]))


def test_two_stacks_where_rows_skip_the_other() -> None:
    """Layer 1 stands in both stacks; every row has experts in one of them only."""
    stacks = ("encoder", "encoder", "decoder", "decoder")
    card = ModelCard("t5", 6, 2, (1, 3, 1, 3), stacks)
    rng, is_decoder = np.random.default_rng(0), np.arange(60) % 20 >= 12
    ids_TLK = rng.permuted(np.tile(np.arange(6), (60, 4, 1)), axis=2)[:, :, :2]
    ids_TLK[is_decoder, :2] = -1
    ids_TLK[~is_decoder, 2:] = -1
    trace = trace_of(card, ids_TLK, request_T=np.arange(60) // 20, phase_T=is_decoder)
    curves = cache_curve(trace)
    sides = {"encoder": (~is_decoder, [0, 1], "prefill"), "decoder": (is_decoder, [2, 3], "decode")}
    for side, (rows, layers, phase) in sides.items():
        small = ModelCard("t5", 6, 2, (1, 3), (side, side))
        alone = cache_curve(trace_of(small, ids_TLK[rows][:, layers]))
        both = curves[(curves["stack"] == side) & (curves.phase == "all")]
        assert both.optimal_hits.tolist() == alone.optimal_hits.tolist()
        assert both.lru_hits.tolist() == alone.lru_hits.tolist()
        idle = curves[(curves["stack"] == side) & ~curves.phase.isin(["all", phase])]
        assert (idle.accesses == 0).all() and idle.lru_hit_rate.isna().all()
        assert idle.optimal_hit_rate.isna().all()
    found = capacity_for(curves)
    assert len(found) == 3 * 4
    assert found.lru_capacity.isna()[
        (found.phase == "prefill") & (found["stack"] == "decoder")
    ].all()


@pytest.mark.parametrize(
    ("n_tokens", "n_layers", "n_experts", "top_k"),
    [(1, 1, 1, 1), (1, 1, 4, 1), (9, 1, 4, 4), (40, 3, 255, 2), (40, 2, 256, 2), (40, 2, 300, 9)],
)
def test_small_and_wide_traces(n_tokens: int, n_layers: int, n_experts: int, top_k: int) -> None:
    trace = drawn(n_tokens, n_layers, n_experts, top_k, request_T=0, phase_T=DECODE)
    curves = cache_curve(trace)
    assert list(curves.phase.unique()) == ["all"]
    assert len(curves) == n_layers * (n_experts - top_k + 1)
    full = curves[curves.capacity == n_experts]
    assert (full.lru_hits == full.accesses - full.cold).all()
    assert (full.optimal_hits == full.lru_hits).all()


def test_a_trace_recorded_from_a_model(real_data: Path) -> None:
    """gpt-oss-20b: the curve of two layers against a cache kept by hand, for the sizes people use."""
    file = real_data / "traces" / "gpt-oss-20b" / "gptoss20b_mmlu_dev.npz"
    with np.load(file) as arrays:
        ids_TLK: NDArray[Any] = arrays["expert_ids"][:3000, :2]
        request_T = arrays["seq_id"][:3000]
    trace = trace_of(card_of(2, 32, 4), ids_TLK, request_T=request_T, phase_T=DECODE)
    curves = cache_curve(trace, max_rows=700)
    for capacity in (4, 8, 16, 24):
        rows = curves[curves.capacity == capacity]
        for layer, row in enumerate(rows.itertuples()):
            expected = slow_curve(trace, layer, capacity, (DECODE,))
            assert [row.accesses, row.cold, row.lru_hits] == expected
    rates = (
        curves[curves.capacity == 8].optimal_hit_rate - curves[curves.capacity == 8].lru_hit_rate
    )
    assert (rates > 0.02).all()
