"""Families: planted chains come back whole, links equal those found by hand, chance links nobody."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from routing_traces import odd_traces, random_trace
from scipy import stats

from analysis.routing.batch import accumulate, plan_of
from analysis.routing.families import expert_families, families
from analysis.routing.transitions import Transitions
from prefetch.errors import MissingData
from prefetch.trace.card import plain_card
from prefetch.trace.routing import RoutingTrace, trace_of

N_EXPERTS = 8
COLUMNS = ["family", "layer", "expert", "lift_to_next", "share", "length"]


def walk(
    n_tokens: int = 4000, n_layers: int = 6, loyal: float = 0.8, seed: int = 0
) -> RoutingTrace:
    """k = 1: expert e is followed by e + 1 with chance `loyal`, up to the last layer but one; then by anyone."""
    rng = np.random.default_rng(seed)
    ids_TL = rng.integers(0, N_EXPERTS, (n_tokens, n_layers))
    for layer in range(1, n_layers - 1):
        keeps_T = rng.random(n_tokens) < loyal
        ids_TL[keeps_T, layer] = (ids_TL[keeps_T, layer - 1] + 1) % N_EXPERTS
    numbers = tuple(range(10, 10 + n_layers))
    card = plain_card("walk", n_experts=N_EXPERTS, top_k=1, layer_numbers=numbers)
    return trace_of(card, ids_TL[:, :, None], request_T=np.arange(n_tokens) // 20)


def test_planted_chains_come_back_whole() -> None:
    rows = expert_families(walk())
    assert list(rows) == COLUMNS
    assert rows.family.nunique() == N_EXPERTS and (rows.length == 5).all()
    for _, family in rows.groupby("family"):
        assert family.layer.tolist() == [10, 11, 12, 13, 14]
        assert ((family.expert.diff().iloc[1:] % N_EXPERTS) == 1).all()
        assert family.lift_to_next.iloc[:-1].between(5, 8).all()
        assert np.isnan(family.lift_to_next.iloc[-1])
    # every layer's families hold all of its experts here, so their shares are the whole
    np.testing.assert_allclose(rows.groupby("layer").share.sum(), 1)


def test_chance_makes_no_family() -> None:
    assert expert_families(random_trace(n_requests=100)).empty


def test_a_higher_bar_leaves_fewer() -> None:
    trace = walk(loyal=0.5)
    lengths = [len(expert_families(trace, min_lift=lift)) for lift in (2.0, 4.2, 9.0)]
    assert lengths[0] >= lengths[1] >= lengths[2] == 0 and lengths[0] > 0


def in_runs(trace: RoutingTrace, per_request: int, stays: float, *, together: bool) -> RoutingTrace:
    """A token repeats the experts of the one before with chance `stays`: in all layers at once, or in each apart."""
    n_tokens, n_layers, _ = trace.ids_TLK.shape
    rng = np.random.default_rng(1)
    keeps_TL = rng.random((n_tokens, 1 if together else n_layers)) < stays
    keeps_TL[::per_request] = False
    source_TL = np.where(keeps_TL, 0, np.arange(n_tokens)[:, None])
    ids = trace.ids_TLK[np.maximum.accumulate(source_TL, axis=0), np.arange(n_layers)]
    return trace_of(
        trace.card, ids.astype(int), request_T=np.arange(n_tokens) // per_request, phase_T=1
    )


@pytest.mark.parametrize("top_k", [1, 4])
def test_runs_of_like_tokens_make_no_family(top_k: int) -> None:
    """Independent layers; taken as independent tokens, they would show about fifteen chains."""
    shape = {"n_layers": 6, "n_experts": 32, "top_k": top_k, "skew": 0.0}
    trace = random_trace(0, n_requests=10, tokens=300, **shape)
    assert expert_families(in_runs(trace, 300, 0.97, together=False)).empty


def test_among_runs_real_chains_stay() -> None:
    rows = expert_families(in_runs(walk(12_000), 200, 0.9, together=True))
    assert rows.family.nunique() == N_EXPERTS and (rows.length == 5).all()
    for _, family in rows.groupby("family"):
        assert ((family.expert.diff().iloc[1:] % N_EXPERTS) == 1).all()


def test_few_requests_tell_no_family() -> None:
    with pytest.raises(MissingData, match="fewer than 10 requests"):
        expert_families(in_runs(walk(4000), 500, 0.0, together=True))


def slow_links(
    joint_EE: NDArray[Any], here_E: NDArray[Any], there_E: NDArray[Any], n: int,
    effect_EE: NDArray[Any], requests: float,
) -> set[tuple[int, int]]:  # fmt: skip
    """Mutual best partners of one layer pair, in plain Python."""
    lift, p = {}, {}
    for a in range(len(here_E)):
        for b in range(len(there_E)):
            expected = here_E[a] * there_E[b] / n
            if expected / effect_EE[a, b] >= 5:
                spread = expected * (1 - here_E[a] / n) * (1 - there_E[b] / n)
                lift[a, b] = joint_EE[a, b] / expected
                z = (joint_EE[a, b] - expected) / spread**0.5 if spread > 1e-9 else 0.0
                p[a, b] = stats.t.sf(z / effect_EE[a, b] ** 0.5, requests - 1)
    if not lift:
        return set()
    q = dict(zip(p, stats.false_discovery_control(list(p.values())), strict=True))
    best_next = {
        a: max((key for key in lift if key[0] == a), key=lift.__getitem__) for a, _ in lift
    }
    best_back = {
        b: max((key for key in lift if key[1] == b), key=lift.__getitem__) for _, b in lift
    }
    return {
        key
        for key in lift
        if best_next[key[0]] == best_back[key[1]] == key and lift[key] >= 2 and q[key] < 0.01
    }


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_links_are_those_found_by_hand(seed: int, in_requests: bool) -> None:
    """Of tokens that are independent, or that come in runs, in as few requests as tell anything."""
    trace = walk(600, loyal=np.random.default_rng(seed).choice([0.2, 0.4, 0.6]), seed=seed)
    trace = in_runs(trace, 50, 0.5, together=True) if in_requests else trace
    plan = plan_of(trace)
    found = Transitions(plan, (1,))
    accumulate(trace, plan, [found])
    counts = found.joint(1), found.here(1), found.there(1), found.tokens(1)
    chains: list[list[tuple[int, int]]] = []
    for layer in range(len(counts[0])):
        joint_EE, here_E, there_E, n = (array[layer] for array in counts)
        effect_EE, requests = np.ones(joint_EE.shape), np.inf
        if in_requests:
            expected_EE = here_E[:, None] * there_E / n
            effect_EE = found.spread.effects(layer, joint_EE, here_E, there_E, expected_EE, n)
            requests = float(found.spread.requests_L[layer])
        for a, b in sorted(slow_links(joint_EE, here_E, there_E, n, effect_EE, requests)):
            grown = [chain for chain in chains if chain[-1] == (layer, a)]
            (grown[0] if grown else chains.append([(layer, a)]) or chains[-1]).append(
                (layer + 1, b)
            )
    expected = sorted((c for c in chains if len(c) >= 3), key=lambda c: (-len(c), c))
    rows = families(*counts, plan.card, spread=found.spread if in_requests else None)
    told = [
        list(zip(rows.layer - 10, rows.expert, strict=True)) for _, rows in rows.groupby("family")
    ]
    assert told == expected


def test_shares_and_lifts_are_of_the_counts_given() -> None:
    joint_LEE = np.array([[[60, 10], [10, 120]], [[50, 20], [5, 125]]])
    here_LE, there_LE = joint_LEE.sum(axis=2), joint_LEE.sum(axis=1)
    card = plain_card("c", n_experts=2, top_k=1, layer_numbers=(0, 1, 2))
    rows = families(joint_LEE, here_LE, there_LE, np.array([200, 200]), card)
    one = rows[rows.family == 0]
    assert (
        one.expert.tolist() == [0, 0, 0] and rows.family.nunique() == 1
    )  # 1 -> 1 has a lift of 1.42
    np.testing.assert_allclose(one.lift_to_next.iloc[:2], [60 * 200 / 70**2, 50 * 200 / (70 * 55)])
    np.testing.assert_allclose(one.share, [70 / 200, 70 / 200, 55 / 200])


def test_bars_that_are_just_met_are_met() -> None:
    """Five pairs expected, ten found: a lift of two."""
    joint_LEE = np.tile([[10, 0], [90, 100]], (2, 1, 1))
    card = plain_card("c", n_experts=2, top_k=1, layer_numbers=(0, 1, 2))
    here_LE, there_LE = joint_LEE.sum(axis=2), joint_LEE.sum(axis=1)
    rows = families(joint_LEE, here_LE, there_LE, np.array([200, 200]), card)
    assert rows.expert.tolist() == [0, 0, 0] and rows.lift_to_next.tolist()[:2] == [2, 2]


@pytest.mark.parametrize("name", odd_traces())
def test_odd_traces_work(name: str) -> None:
    trace = odd_traces()[name]
    if trace.card.n_layers == 1 or len(trace.starts_R) == 1:
        with pytest.raises(MissingData):
            expert_families(trace)
        return
    rows = expert_families(trace)
    assert ("stack" in rows) == (name == "two stacks")
    assert isinstance(rows, pd.DataFrame)


def test_two_layers_make_no_family() -> None:
    with pytest.raises(MissingData, match="spans 3 layers"):
        expert_families(random_trace(n_layers=2))
