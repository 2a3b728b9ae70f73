"""Intervals are over requests, or over blocks of steps that share requests; or there are none, and the row says so."""

from __future__ import annotations

import numpy as np

from prefetch.scoring import bootstrap
from prefetch.sim.tables.intervals import FEWEST_BLOCKS, interval, units_of
from prefetch.sim.workload import workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import DECODE, trace_of
from tests.prefetch.sim.test_evaluate import evaluated

CARD = plain_card("short", n_experts=4, top_k=1, layer_numbers=(0,))


def served(lengths: list[int], batch: int):
    request_T = np.repeat(np.arange(len(lengths)), lengths)
    ids = np.zeros((len(request_T), 1, 1), np.int64)
    trace = trace_of(CARD, ids, request_T=request_T, phase_T=DECODE)
    work = workload_of(trace, batch=batch)
    return work, units_of(work, trace.request_T)


def test_one_by_one_the_units_are_requests():
    work, units = served([3, 5, 4], 1)
    assert units.name == "requests" and np.bincount(units.place_S).tolist() == [3, 5, 4]
    values_S = np.arange(work.n_steps, dtype=float)
    sums_Q = np.bincount(units.place_S, values_S)
    expected = bootstrap(sums_Q, np.array([3, 5, 4]), seed=1)
    assert interval(units, values_S, work.decode_S, 1) == expected


def test_served_together_they_are_blocks_of_steps_of_two_requests():
    work, units = served([5] * 100, 2)
    assert work.n_steps == 250 and units.name == "25 blocks of 10 steps or more"
    assert set(np.bincount(units.place_S)) == {10} and (np.diff(units.place_S) >= 0).all()
    low, high = interval(units, work.decode_S * 3.0, work.decode_S, 0)
    assert low == high == 3.0


def test_blocks_hold_the_truth_where_drawing_requests_does_not():
    """Requests of random speed, four at a time: 60 runs, of which 95 % should hold the mean of all speeds."""
    held, held_by_requests = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        work, units = served([20] * 200, 4)
        request_R = work.rows_R // 20
        step_R = np.repeat(np.arange(work.n_steps), np.diff(work.row_start_S))
        time_S = np.bincount(step_R, rng.normal(10, 2, 200)[request_R])
        low, high = interval(units, time_S, work.decode_S, 0)
        held += low <= 10 <= high
        own_Q = np.bincount(request_R, (time_S / work.decode_S)[step_R])
        low, high = bootstrap(own_Q, np.full(200, 20), seed=seed, draws=200)
        held_by_requests += low <= 10 <= high
    assert held >= 52 and held_by_requests <= 45


def test_too_few_blocks_are_no_interval_and_that_is_said():
    work, units = served([5] * 30, 3)
    assert units.name.startswith("none: steps serve several requests, and there are 5 blocks")
    assert np.isnan(interval(units, work.decode_S, work.decode_S, 0)).all() and FEWEST_BLOCKS == 10


def test_rows_say_what_their_intervals_are_over(tmp_path):
    _, table, _ = evaluated(tmp_path, "predictor=none")
    assert set(table.interval_over) == {"requests"}
    _, table, _ = evaluated(tmp_path, "predictor=none", "simulator.batch=3")
    assert table.tpot_ms_low.isna().all() and table.interval_over.str.startswith("none: ").all()
