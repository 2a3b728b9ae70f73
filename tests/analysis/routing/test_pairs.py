"""Counts of pairs are as wide as the trace may need: twice all rows fit, and nothing else changes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from routing_traces import random_trace

from analysis.routing.batch import Plan, accumulate, plan_of
from analysis.routing.coactivation import CoActivation
from analysis.routing.domains import Domains
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
