"""Guesses of a set recall, and the recall from which on they pay."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.sim import evaluate
from prefetch.sim.engines.run import timed_replay
from prefetch.sim.policies.lru import Lru
from prefetch.sim.tables.excerpt import first_requests, work_of
from prefetch.sim.tables.needed import Noise, break_even, with_link
from prefetch.sim.workload import workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import DECODE, trace_of
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import machine_of, true_ids
from tests.prefetch.sim.test_costs import machine as hardware
from tests.prefetch.sim.test_evaluate import bench_of, evaluated

HARDWARE = hardware()


def sets(ids_VW):
    return [{e for e in row if e >= 0} for row in ids_VW.tolist()]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 3]), st.sampled_from(["auto", "decode"]))
def test_guesses_of_a_recall(seed, batch, phase):
    work = drawn(seed, n_tokens=40, batch=batch, phase=phase)
    noise, true = Noise(work, seed), sets(true_ids(work, work.card.n_experts))
    is_guessed = np.repeat(work.prefill_S == 0, work.card.n_layers)
    before = [set()] * len(true)
    for recall in (0.0, 0.3, 0.7, 1.0):
        guesses = noise.guesses(recall, 2)
        told = sets(guesses.ids_VW)
        for v, (own, needed) in enumerate(zip(told, true, strict=True)):
            row = guesses.ids_VW[v]
            assert (np.diff((row < 0).astype(int)) >= 0).all()  # nobody stands last
            if not is_guessed[v]:
                assert not own
                continue
            assert len(own) == (row >= 0).sum()  # nobody twice
            assert before[v] <= own & needed  # a higher recall only adds true ones
            wrong = work.card.n_experts - len(needed)
            assert len(own) >= min(len(needed), wrong) or recall > 0
            if recall in (0.0, 1.0):
                assert own & needed == (needed if recall else set())
        before = [own & needed for own, needed in zip(told, true, strict=True)]
        assert (guesses.score_VW == guesses.score_VW.flat[0]).all()


def test_the_share_that_is_true_is_the_recall():
    work = drawn(3, n_tokens=400, phase="decode")
    true = sets(true_ids(work, work.card.n_experts))
    for recall in (0.2, 0.5, 0.9):
        told = sets(Noise(work, 1).guesses(recall, 1).ids_VW)
        hit = sum(len(a & b) for a, b in zip(told, true, strict=True))
        assert hit / sum(map(len, true)) == pytest.approx(recall, abs=0.05)  # some 2,000 draws
    one, again, other = (Noise(work, seed).guesses(0.5, 1).ids_VW for seed in (1, 1, 2))
    assert (one == again).all() and (one != other).any()


def test_break_even_in_closed_form():
    recalls = [0.0, 0.5, 1.0]
    assert break_even(recalls, [14, 10, 6], 9) == pytest.approx(0.5 + 0.5 * 1 / 4)
    assert math.isnan(break_even(recalls, [14, 10, 6], 6))  # true ones are not faster
    assert math.isnan(break_even(recalls, [5, 7, 10], 6))  # few pay, all do not
    assert break_even(recalls, [8, 7, 6], 9) == 0.0
    assert math.isnan(break_even(recalls, [14, 12, 11], 9))
    assert break_even(recalls, [8, 10, 6], 9) == pytest.approx(0.5 + 0.5 * 1 / 4)  # from then on
    assert math.isnan(break_even(recalls, [9, 9, 9], 9))  # nothing is gained


def test_a_faster_link_only_moves_faster():
    twice = with_link(HARDWARE, 2.0)
    size = 10_000_000
    moving, faster = (one.link.pinned.moving_ns(size) for one in (HARDWARE, twice))
    assert abs(faster - moving / 2) <= 1 and twice.link.latency_ns == HARDWARE.link.latency_ns
    assert twice.device == HARDWARE.device and twice.host == HARDWARE.host
    assert with_link(HARDWARE, 1.0) == HARDWARE
    assert dataclasses.replace(twice, link=HARDWARE.link) == HARDWARE


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_first_steps_run_as_they_do_in_the_whole(seed, steps):
    """Without a view of the future a beginning is a beginning."""
    work = drawn(seed, n_tokens=40)
    steps = min(steps, work.n_steps)
    part, machine = work_of(work, 0, steps), machine_of(work, seed)
    cut = machine._replace(before_S=machine.before_S[:steps])
    whole = timed_replay(work, Lru(), [4] * 3, [1] * 3, machine)
    begun = timed_replay(part, Lru(), [4] * 3, [1] * 3, cut)
    assert begun.time_S.tolist() == whole.time_S[:steps].tolist()
    assert (begun.outcome_A == whole.outcome_A[: part.n_accesses]).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 30), st.sampled_from([1, 3])
)
def test_a_beginning_is_of_whole_requests_however_many_run_at_once(lengths, most, batch):
    """As many as fit; only a first one that is longer is cut."""
    card = plain_card("short", n_experts=4, top_k=1, layer_numbers=(0,))
    request_T = np.repeat(np.arange(len(lengths)), lengths)
    ids = np.zeros((len(request_T), 1, 1), np.int64)
    trace = trace_of(card, ids, request_T=request_T, phase_T=DECODE)

    def steps(n):
        return workload_of(trace.rows(request_T < n), batch=batch).n_steps

    part = first_requests(trace, most, lambda rows: workload_of(rows, batch=batch))
    n = len(np.unique(part.request_T))
    if lengths[0] > most:
        assert part.request_T.tolist() == [0] * most
        return
    assert part.request_T.tolist() == request_T[request_T < n].tolist()
    assert steps(n) <= most and (n == len(lengths) or steps(n + 1) > most)


def test_required_recall_at_batch_3_is_of_whole_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "MOST_STEPS", 30)
    words = ("evaluate.required_recall=true", "simulator.batch=3", "source.new_tokens=15")
    evaluated(tmp_path, "predictor=none", "source.n_requests=40", "source.prompt_tokens=2", *words)
    one = pd.read_parquet(tmp_path / "run0" / "required_recall.parquet").iloc[0]
    bench = bench_of(tmp_path, *words, "source.n_requests=40", "source.prompt_tokens=2")
    part = bench.beginning(30)
    assert one.steps == part.work.n_steps <= 30 < one.of_steps == bench.work.n_steps
    assert one.requests == len(np.unique(part.trace.request_T)) >= 3
    for request in np.unique(part.trace.request_T):
        whole = (bench.trace.request_T == request).sum()
        assert (part.trace.request_T == request).sum() == whole == 17
