"""Route memory equals a slow definition of itself; its incremental face gives the same answers."""

from __future__ import annotations

import numpy as np
import pytest
from routing_traces import random_trace

from prefetch.errors import ConfigError
from prefetch.predict.alike import PRIOR
from prefetch.predict.part import Part, whole
from prefetch.predict.past import Past
from prefetch.predict.route_memory import RouteMemory
from prefetch.trace.routing import RoutingTrace


def fitted(
    trace: RoutingTrace, horizons: tuple[int, ...] = (1, 3), **settings: object
) -> RouteMemory:
    half = Part(trace, np.arange(4))
    return RouteMemory(horizons, nearest=7, **settings).fit(half, Part(trace, np.arange(4, 6)))


def overlap(one_K: np.ndarray, other_K: np.ndarray) -> int:
    return len(set(one_K.tolist()) & set(other_K.tolist()) - {255})


def alike(
    token_LK: np.ndarray, others: np.ndarray, passed: np.ndarray, known: int, decay: float
) -> np.ndarray:
    """Similarity to every other token once `known` layers are there; `passed` came from the tokens before."""
    total = passed.copy()
    for layer in range(known):
        total = total * (decay if layer else 1.0)
        total += [overlap(token_LK[layer], other[layer]) for other in others]
    return total


def votes(near: np.ndarray, others_K: np.ndarray, sharp: float) -> np.ndarray:
    weights = np.exp(sharp * (near - near.max()))
    guess = np.zeros(256)
    for share, ids in zip(weights / weights.sum(), others_K, strict=True):
        guess[ids] += share
    return guess[:16]


def slow(memory: RouteMemory, ids_TLK: np.ndarray, horizon: int) -> np.ndarray:
    """Every similarity by sets, from the layers that are known."""
    inside, outside, weight = memory.mix_H3_[memory.horizons.index(horizon)]
    stored, n_layers = memory.ids_MLK_, ids_TLK.shape[1]
    out = np.zeros((len(ids_TLK), n_layers, 16))
    passed_m, passed_s = np.zeros(len(stored)), np.zeros(0)
    for t, token in enumerate(ids_TLK):
        for layer in range(n_layers):
            known = max(0, layer - horizon + 1)
            guess, total = PRIOR * memory.chance_LE_[layer].astype(float), PRIOR
            if t:
                near = alike(token, ids_TLK[:t], passed_s, known, memory.decay)
                guess, total = guess + votes(near, ids_TLK[:t, layer], inside), total + 1
            if len(stored):
                near = alike(token, stored, passed_m, known, memory.decay)
                guess, total = (
                    guess + weight * votes(near, stored[:, layer], outside),
                    total + weight,
                )
            out[t, layer] = guess / total
        before_m = memory.carry * alike(token, stored, passed_m, n_layers, memory.decay)
        before_s = memory.carry * alike(token, ids_TLK[:t], passed_s, n_layers, memory.decay)
        passed_m[1:] = np.where(memory.goes_on_M_[1:], before_m[:-1], 0)
        passed_s = np.concatenate([[0.0], before_s])
    return out


@pytest.mark.parametrize("memory_tokens", [0, 45])
@pytest.mark.parametrize("horizon", [1, 3])
def test_scores_equal_a_slow_definition(horizon: int, memory_tokens: int) -> None:
    """Many similarities are equal and who of them is nearest is arbitrary: so all of memory is asked."""
    trace = random_trace(n_requests=8, tokens=12)
    trace.ids_TLK[::5, 1, 2] = 255
    memory = fitted(trace, memory_tokens=memory_tokens, carry=0.3)
    memory.nearest = 45
    ids_TLK = trace.rows(slice(84, 96)).ids_TLK
    scores = memory.scores(Past(trace.rows(slice(84, 96)), horizon))
    np.testing.assert_allclose(scores, slow(memory, ids_TLK, horizon), atol=2e-5)


@pytest.mark.parametrize("horizon", [1, 3])
def test_both_faces_agree(horizon: int) -> None:
    trace = random_trace(n_requests=8, tokens=12)
    memory = fitted(trace, window=5)
    part = trace.rows(slice(60, 96))
    expected = memory.scores(Past(part, horizon))
    online = memory.online(horizon)
    for t in range(part.n_tokens):
        if t % 12 == 0:
            online.start()
        for layer in range(min(horizon, 4)):
            np.testing.assert_array_equal(online.guess(layer), expected[t, layer])
        for layer in range(4):
            online.observe(layer, part.ids_TLK[t, layer])
            if layer + horizon < 4:
                np.testing.assert_array_equal(
                    online.guess(layer + horizon), expected[t, layer + horizon]
                )


def test_a_window_forgets_what_is_long_ago() -> None:
    """With room for two tokens, the first of four changes nothing at the fourth."""
    trace = random_trace(n_requests=7, tokens=4)
    memory = fitted(trace, window=2, memory_tokens=0, carry=0.0)
    one = trace.rows(slice(24, 28))
    scores = memory.scores(Past(one, 1))
    one.ids_TLK[0] = (one.ids_TLK[0] + 3) % 16
    np.testing.assert_array_equal(memory.scores(Past(one, 1))[3], scores[3])


def test_memory_is_whole_requests_and_no_more_than_asked() -> None:
    trace = random_trace(n_requests=8, tokens=12)
    memory = RouteMemory(memory_tokens=30).fit(whole(trace), whole(trace))
    assert len(memory.ids_MLK_) == 30
    assert np.flatnonzero(~memory.goes_on_M_).tolist() == [0, 12, 24]
    again = RouteMemory(memory_tokens=30).fit(whole(trace), whole(trace))
    np.testing.assert_array_equal(memory.ids_MLK_, again.ids_MLK_)
    other = RouteMemory(memory_tokens=30, seed=1).fit(whole(trace), whole(trace))
    assert not np.array_equal(memory.ids_MLK_, other.ids_MLK_)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="decay=0: must be above 0"):
        RouteMemory(decay=0)


def test_a_decay_that_no_number_of_32_bits_can_follow_is_refused_with_one_that_can() -> None:
    deep = random_trace(n_requests=6, tokens=5, n_layers=48)
    with pytest.raises(ConfigError, match=r"decay=0\.1: too small for 48 layers.*decay=0\.19 or"):
        fitted(deep, (1,), decay=0.1)
    scores_TLE = fitted(deep, (1,), decay=0.19).scores(Past(deep, 1))
    assert np.isfinite(scores_TLE).all()
