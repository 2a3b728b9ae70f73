"""From scores to guesses: best first, ties to the smaller id, nothing where nothing is guessed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_traces import random_trace

from prefetch.errors import FormatError
from prefetch.predict.guesses import guess_part, ranked, write_guesses
from prefetch.predict.markov import Markov
from prefetch.predict.none import Nothing
from prefetch.predict.part import whole
from prefetch.trace.predictions import PredictionsReader


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 6))
def test_ranked_is_a_stable_sort(seed: int, n_experts: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (3, 2, n_experts)).astype(np.float32)
    width = min(width, n_experts)
    ids, best = ranked(scores, width)
    expected = np.argsort(-scores, axis=2, kind="stable")[:, :, :width]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(best, np.take_along_axis(scores, expected, 2))


def test_minus_infinity_is_no_guess() -> None:
    scores = np.array([[[-np.inf, 2, -np.inf, 5]]], np.float32)
    ids, best = ranked(scores, 3)
    assert ids.tolist() == [[[3, 1, 255]]] and best.tolist() == [[[5, 2, 0]]]


def test_a_score_that_is_no_number_is_named() -> None:
    scores = np.zeros((2, 3, 4), np.float32)
    scores[1, 2, 3] = np.nan
    with pytest.raises(FormatError, match="row 1, layer slot 2, expert 3"):
        ranked(scores, 2)


def test_scores_that_no_half_can_hold_are_capped() -> None:
    _, best = ranked(np.array([[[1e9, -1e9]]], np.float32), 2)
    assert best.tolist() == [[[65504.0, -65504.0]]]


def test_guesses_are_written_in_the_order_of_the_trace(tmp_path: Path) -> None:
    part = whole(random_trace())
    markov = Markov((1, 3)).fit(part, part)
    write_guesses(
        markov, part, tmp_path, name="markov", trace="t", width=5, fitted=(0, 1), n_bytes=8
    )  # fmt: skip
    reader = PredictionsReader(tmp_path)
    assert reader.card.horizons == (1, 3) and reader.card.causality == "decode"
    read = np.concatenate([block.ids_THLP for block in reader.batches()])
    made = np.concatenate([ids for _, ids, _ in guess_part(markov, part, 5)])
    np.testing.assert_array_equal(read, made)
    assert read.shape == (1200, 2, 4, 5)


def test_of_a_request_that_is_split_in_time_the_end_is_guessed_and_no_more(tmp_path: Path) -> None:
    """What was fitted on is known to the guesses, and not among them."""
    trace = random_trace(0, n_requests=1, tokens=100)
    part = dataclasses.replace(whole(trace), first=70)
    markov = Markov((1,)).fit(dataclasses.replace(whole(trace), stop=70), part)
    write_guesses(markov, part, tmp_path, name="m", trace="t", width=2, fitted=(0,), n_bytes=8)
    (block,) = PredictionsReader(tmp_path).batches()
    assert block.position_T.tolist() == trace.position_T[70:].tolist()
    (all_of_it,) = (ids for _, ids, _ in guess_part(markov, whole(trace), 2))
    np.testing.assert_array_equal(block.ids_THLP, all_of_it[70:])


def test_nothing_is_a_guess_too(tmp_path: Path) -> None:
    part = whole(random_trace())
    for _, ids, _ in guess_part(Nothing().fit(part, part), part, 4):
        assert (ids == 255).all()
