"""What is scored in a fold: who is marked as a copy of what was learnt from, and what an interval draws together."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
from routing_traces import random_trace

from prefetch.predict.part import survey_of, whole
from prefetch.predict.scored import copies, held_out
from prefetch.predict.scored.held_out import (
    held_out_elsewhere,
    held_out_folds,
    held_out_in,
    units_of,
)
from prefetch.trace.routing import RoutingTrace, trace_of
from tests.prefetch.predict.scored.test_copies import noisy, with_copies


def conversations(n: int = 12, turns: int = 3) -> RoutingTrace:
    """Each request holds the one before it of its conversation, and goes on."""
    every = random_trace(n_requests=n, tokens=16 * turns).ids_TLK.reshape(n, 16 * turns, 4, 3)
    parts = [every[c, : 16 * (t + 1)] for c in range(n) for t in range(turns)]
    card = random_trace().card
    request_T = np.repeat(np.arange(n * turns), [len(part) for part in parts])
    return trace_of(card, np.concatenate(parts), request_T=request_T)


def test_who_copies_what_a_fold_learns_from_is_marked() -> None:
    """Request r and r + 10 hold one text: a tested one is a copy unless both are tested."""
    trace = with_copies(0.03, n_requests=10, tokens=60)
    found, folds = held_out_folds(trace, 0, 5), survey_of(trace).folds(0)
    for one, fold in zip(found, folds, strict=True):
        learnt = {*fold.train.tolist(), *fold.validation.tolist()}
        tested = one.part.requests.tolist()
        assert tested == fold.test.tolist() and one.split == "requests"
        assert one.is_copy_R.tolist() == [(q + 10) % 20 in learnt for q in tested]
        assert one.n_units == len(tested) and one.domain_U == ("unknown",) * len(tested)
    assert {True, False} == {copy for one in found for copy in one.is_copy_R.tolist()}
    assert len(held_out_folds(trace, 0, 2)) == 2


def test_a_split_in_time_has_learnt_from_every_request_that_began_before() -> None:
    """Of 120 rows the last 36 are tested: the third request, a copy of the first, began in row 80."""
    trace = random_trace(n_requests=3, tokens=40)
    trace.ids_TLK[80:] = noisy(trace.ids_TLK[:40], 0.03, 16)
    (one,) = held_out_folds(trace, 0, 1)
    assert (one.split, one.part.first, one.part.requests.tolist()) == ("time", 84, [0, 1, 2])
    assert one.is_copy_R.tolist() == [True, False, True]


def test_of_another_trace_only_what_the_first_holds_is_a_copy() -> None:
    one, other = random_trace(0, n_requests=12), random_trace(1, n_requests=4)
    other.ids_TLK[40:80] = noisy(one.ids_TLK[:40], 0.03, 16)
    found = held_out_elsewhere(one, other, whole(other))  # type: ignore[arg-type]
    assert found.split == "whole" and found.part.requests.tolist() == [0, 1, 2, 3]
    assert found.is_copy_R.tolist() == [False, True, False, False]
    assert found.unit_R.tolist() == [0, 1, 2, 3]


def test_turns_of_a_conversation_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = conversations()
    one = held_out_in(whole(trace))
    assert one.unit_R.tolist() == (np.arange(36) // 3).tolist() and one.n_units == 12
    assert one.split == "requests" and not one.is_copy_R.any()
    some = np.array([3, 5, 30])
    assert units_of(survey_of(trace), some).tolist() == [0, 0, 1]
    assert units_of(survey_of(trace), some[:0]).size == 0
    assert dataclasses.replace(one, unit_R=one.unit_R[:0]).n_units == 0
    monkeypatch.setattr(held_out, "MOST_UNITS", 12)
    assert (held_out_in(whole(trace)).unit_R == one.unit_R).all(), "no more than there may be"
    monkeypatch.setattr(held_out, "MOST_UNITS", 5)
    bundled = held_out_in(whole(trace)).unit_R
    assert (bundled == held_out_in(whole(trace)).unit_R).all(), "the same for every predictor"
    assert (bundled.reshape(12, 3) == bundled[::3, None]).all(), "a conversation stays whole"
    assert sorted(np.bincount(bundled[::3]).tolist()) == [2, 2, 2, 3, 3]
    assert bundled[::3].tolist() != (np.arange(12) % 5).tolist(), "by chance, not by place"


def test_more_requests_than_are_compared_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trace = with_copies(0.03, n_requests=10)

    def compare_at_most(most: int) -> None:
        for module in (copies, held_out):
            monkeypatch.setattr(module, "MOST_REQUESTS", most)

    with caplog.at_level(logging.WARNING):
        compare_at_most(20)
        held_out_folds(trace, 0, 1)
        assert not caplog.messages
        compare_at_most(8)
        held_out_folds(trace, 0, 1)
        assert caplog.messages == [
            "near copies are looked for among 8 requests, drawn of 20: there are more than are found"
        ]
        held_out_elsewhere(trace, trace, whole(trace))  # type: ignore[arg-type]
    assert len(caplog.messages) == 3
