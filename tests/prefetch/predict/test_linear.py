"""Ridge regression: equal to the normal equations, tuned on the validation requests, and causal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_traces import check_causal, check_restored, check_same_bytes, recall, recorded
from routing_traces import chain, odd_traces, random_trace

from prefetch.errors import ConfigError
from prefetch.predict.linear import EDGE, Linear, _within
from prefetch.predict.markov import Markov
from prefetch.predict.part import Part, parts_of, survey_of, whole
from prefetch.predict.past import Past


def multi_hot(ids_TK: np.ndarray, n_experts: int) -> np.ndarray:
    used_TE = np.zeros((len(ids_TK), n_experts))
    for t, ids_K in enumerate(ids_TK):
        used_TE[t, [int(e) for e in ids_K if e < n_experts]] = 1
    return used_TE


@pytest.mark.parametrize("horizon", [1, 2])
def test_scores_equal_the_normal_equations(horizon: int) -> None:
    trace, part = random_trace(), whole(random_trace())
    fitted = Linear((horizon,), depth=2, alphas=(5.0,)).fit(part, part)
    past = Past(trace, horizon)
    scores_TLE = fitted.scores(past)
    for layer in range(4):
        known = [past.here(0), past.here(1), past.before()]
        features_TF = np.hstack([multi_hot(ids_TLK[:, layer], 16) for ids_TLK in known])
        used_TE = multi_hot(trace.ids_TLK[:, layer], 16)
        gram_FF = features_TF.T @ features_TF + 5.0 * np.eye(48)
        mean_E = used_TE.mean(axis=0)
        rows_FE = np.linalg.solve(gram_FF, features_TF.T @ (used_TE - mean_E))
        expected_TE = (features_TF @ rows_FE + mean_E).astype(np.float32)
        np.testing.assert_allclose(scores_TLE[:, layer], _within(expected_TE), atol=1e-5)


def test_a_chain_is_guessed_as_well_as_counts_guess_it() -> None:
    matrix_EE = np.random.default_rng(0).dirichlet(np.full(6, 0.3), 6)
    trace = chain(4000, matrix_EE, n_layers=3)
    parts = parts_of(trace, survey_of(trace).folds(0)[0])
    linear, markov = (kind((1,)).fit(parts.train, parts.validation) for kind in (Linear, Markov))
    found = recall(linear.scores(Past(trace, 1)), trace, 1)
    assert found == pytest.approx(recall(markov.scores(Past(trace, 1)), trace, 1), abs=0.01)


def test_every_layer_takes_the_penalty_that_its_validation_tokens_like() -> None:
    """Few noisy rows want a large one, and a chain that repeats itself wants none."""
    sure = chain(2000, np.eye(4)[[1, 2, 3, 0]])
    fitted = Linear((1,), depth=1, alphas=(1e-3, 1e6)).fit(whole(sure), whole(sure))
    assert fitted.alpha_HL_.tolist()[0][1] in (1e-3, 1e6)
    noise = random_trace(n_requests=3, tokens=20), random_trace(1, n_requests=60)
    fitted = Linear((1,), alphas=(1e-3, 1e4)).fit(whole(noise[0]), whole(noise[1]))
    assert fitted.alpha_HL_.tolist() == [[1e4] * 4]


def test_what_every_predictor_owes(tmp_path: Path) -> None:
    trace, other = recorded(0), recorded(1)
    fitted = Linear((1, 3)).fit(whole(trace), whole(other))
    check_same_bytes(fitted, Linear((1, 3)).fit(whole(trace), whole(other)))
    check_restored(fitted, Linear((1, 3)), trace, tmp_path)
    check_causal(fitted, trace, other)


@pytest.mark.parametrize("name", odd_traces())
def test_odd_traces(name: str) -> None:
    trace = odd_traces()[name]
    part, none = whole(trace), Part(trace, np.zeros(0, np.int64))
    for validation in (part, none):
        scores_TLE = Linear((2,), alphas=(10.0,)).fit(part, validation).scores(Past(trace, 2))
        assert scores_TLE.shape == Past(trace, 2).shape and scores_TLE.dtype == np.float32
        assert ((scores_TLE >= 0) & (scores_TLE <= 1)).all()


@given(st.lists(st.floats(-3, 4, width=32), min_size=2, max_size=9))
def test_bending_keeps_the_order_and_stays_within(values: list[float]) -> None:
    given_N = np.sort(np.array(values, np.float32))
    bent_N = _within(given_N)
    assert (np.diff(bent_N) >= 0).all() and ((bent_N > 0) & (bent_N < 1)).all()
    plain_N = (given_N >= EDGE) & (given_N <= 1 - EDGE)
    np.testing.assert_array_equal(bent_N[plain_N], given_N[plain_N])


def test_the_ends_are_still_told_apart() -> None:
    bent_N = _within(np.array([-0.3, -0.2, 0.0, 0.009, 0.5, 0.995, 1.0, 1.2, 1.3], np.float32))
    assert (np.diff(bent_N) > 0).all()


@pytest.mark.parametrize("given_", [{"depth": 0}, {"alphas": ()}, {"alphas": (1.0, 0.0)}])
def test_settings_that_cannot_be(given_: dict) -> None:
    with pytest.raises(ConfigError, match=r"at least 1|above 0"):
        Linear(**given_)
