"""Counts of pairs are as wide as the trace may need, twice all rows fit; their spread is that of plain sums."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from routing_traces import random_trace

from analysis.routing.batch import Plan, accumulate, plan_of
from analysis.routing.coactivation import CoActivation
from analysis.routing.domains import Domains
from analysis.routing.pairs import SKIP, Spread, shuffled
from analysis.routing.transitions import NextTokens, Transitions
from prefetch.errors import MissingData

TRACE = random_trace(n_requests=12, tokens=20)
TRACE = dataclasses.replace(
    TRACE, domains=("a", "b"), domain_T=(TRACE.request_T % 2).astype(np.int32)
)


def planned(rows: int) -> Plan:
    """As if the trace had so many rows."""
    plan = plan_of(TRACE)
    plan.survey.executed_rows = rows
    return plan


def counted(plan: Plan) -> tuple[list[np.ndarray], list[pd.DataFrame]]:
    made = Transitions(plan, (1, 2)), NextTokens(plan), CoActivation(plan), Domains(plan)
    accumulate(TRACE, plan, made)
    pairs, following, together, domains = made
    arrays = [*pairs.joint_HCLEE, pairs.shifted.joint_PLEE, following.joint_CLEE]
    arrays += [together.pairs_CLEE(), domains.pairs_DLEE]
    return arrays, [pairs.table(), following.table(), together.pairs()]


def test_more_rows_than_half_of_a_narrow_count_holds_are_counted_wide():
    few, most = (planned(rows) for rows in (2**30 - 1, 2**30))
    assert 2 * (2**30 - 1) <= np.iinfo(few.pair_type).max < 2 * 2**30
    narrow, tables = counted(few)
    wide, same = counted(most)
    assert {array.dtype for array in narrow} == {np.dtype(np.int32)}
    assert {array.dtype for array in wide} == {np.dtype(np.int64)}
    for one, other in zip(narrow, wide, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(tables, same, strict=True):
        pd.testing.assert_frame_equal(one, other, check_dtype=False)


def test_wide_counts_are_refused_where_narrow_ones_fit(monkeypatch):
    monkeypatch.setattr("analysis.routing.pairs.MOST_BYTES", 5 * 4 * TRACE.card.n_layers * 16**2)
    NextTokens(planned(2**30 - 1))
    with pytest.raises(MissingData, match="pair counts of 16 experts in 4 layers would take"):
        NextTokens(planned(2**30))


def spread_by_hand(here_TK, there_TK, request_T, class_T) -> list[np.ndarray]:
    """Sums over requests of products of their counts, as `Spread` names them."""
    here_TE, there_TE = (
        (ids_TK[:, :, None] == np.arange(12)).any(axis=1).astype(int)
        for ids_TK in (here_TK, there_TK)
    )
    counts_T = (class_T != SKIP) & here_TE.any(axis=1) & there_TE.any(axis=1)
    sums = [np.zeros(shape, int) for shape in ((5, 12, 12), (4, 12), 2)]
    for r in np.unique(request_T[counts_T]):
        here, there = (rows_TE[counts_T & (request_T == r)] for rows_TE in (here_TE, there_TE))
        n, a, b, t = here.T @ there, here.sum(axis=0), there.sum(axis=0), len(here)
        sums[0] += np.stack([n * n, n * a[:, None], n * b, n * t, a[:, None] * b])
        sums[1] += np.stack([a * a, a * t, b * b, b * t])
        sums[2] += [1, t * t]
    return sums


@pytest.mark.parametrize("is_same", [False, True])
def test_how_counts_spread_is_summed_over_requests(is_same):
    """Requests of four rows and more settle the whole table, shorter ones pair by pair; some rows do not count."""
    rng = np.random.default_rng(0)
    request_T = np.repeat(np.arange(40), rng.integers(1, 12, 40))
    ids_TLK = np.argsort(rng.random((len(request_T), 2, 12)), axis=2)[:, :, :2].astype(np.uint8)
    ids_TLK[rng.random(ids_TLK.shape) < 0.2] = 255
    here_TK, there_TK = ids_TLK[:, 0], ids_TLK[:, 1 - is_same]
    class_T = rng.choice(np.array([0, 1, SKIP], np.uint8), len(request_T))
    class_T[request_T % 7 == 3] = SKIP
    spread = Spread(2, 12)
    for low, high in ((0, 25), (25, 40)):
        rows = slice(*np.searchsorted(request_T, [low, high]))
        starts_R = np.searchsorted(request_T[rows], np.arange(low, high))
        here = here_TK[rows]
        spread.add(1, here, here if is_same else there_TK[rows], starts_R, class_T[rows], 255)
    pair_MEE, margin_ME, total_M = spread_by_hand(here_TK, there_TK, request_T, class_T)
    told_EE = np.triu(np.ones((12, 12), bool), 1) if is_same else np.ones((12, 12), bool)
    np.testing.assert_array_equal(spread.pair_LMEE[1][:, told_EE], pair_MEE[:, told_EE])
    np.testing.assert_array_equal(spread.margin_LME[1], margin_ME)
    assert spread.total_LM.tolist() == [[0, 0], total_M.tolist()]
    assert not spread.pair_LMEE[0].any() and not spread.margin_LME[0].any()


def test_rare_pairs_of_more_rows_than_numpy_draws_from():
    """A hypergeometric count's mean and variance; who is everywhere is met by everybody."""
    n, rng = 3_000_000_000, np.random.default_rng(0)
    here_E = np.array([7, 200_000, n // 2, n - 3, n, 0])
    there_E = np.array([5, 300_000, 90, n - 10, n, 1_000])
    drawn = np.stack([shuffled(here_E, there_E, n, rng) for _ in range(4000)]).astype(float)
    share_a, share_b = here_E[:, None] / n, there_E[None] / n
    mean = share_a * there_E
    variance = mean * (1 - share_a) * (1 - share_b) * n / (n - 1)
    assert (np.abs(drawn.mean(0) - mean) <= 5 * np.sqrt(variance / 4000) + 1e-9).all()
    varies = variance > 0.5
    np.testing.assert_allclose(drawn.var(0)[varies], variance[varies], rtol=0.15)
    assert (drawn[:, 4] == there_E).all() and (drawn[:, :, 4] == here_E).all()
    assert (drawn >= np.maximum(0, here_E[:, None] + there_E - n)).all()
    assert (drawn <= np.minimum(here_E[:, None], there_E)).all()
