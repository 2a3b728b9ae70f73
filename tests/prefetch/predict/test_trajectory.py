"""Trajectories equal a slow definition, with weights and without, and know nothing of what comes later."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from routing_traces import odd_traces, random_trace

from prefetch.errors import ConfigError, MissingData
from prefetch.predict.part import Part, whole
from prefetch.predict.past import Past
from prefetch.predict.predictor import cheats, restore, save
from prefetch.predict.trajectory import TAIL, Trajectory
from prefetch.trace.routing import RoutingTrace

ODD = odd_traces()


def weighty_trace(seed: int = 0, n_requests: int = 6, tokens: int = 8) -> RoutingTrace:
    weights_TLK = np.random.default_rng(seed).random((n_requests * tokens, 4, 3))
    return random_trace(seed, n_requests=n_requests, tokens=tokens, weights_TLK=weights_TLK)


def maps(trace: RoutingTrace, weighted: bool) -> NDArray[np.float64]:
    """[T, L, E]"""
    out_TLE = np.zeros((trace.n_tokens, trace.card.n_layers, trace.card.n_experts))
    for t, layer, k in np.ndindex(trace.ids_TLK.shape):
        if trace.ids_TLK[t, layer, k] < trace.card.n_experts:
            weight = trace.weights_TLK[t, layer, k] if weighted else 1 / trace.card.top_k
            out_TLE[t, layer, trace.ids_TLK[t, layer, k]] = weight
    return out_TLE


def shifted(maps_TLE: NDArray, request_T: NDArray) -> NDArray:
    """Of the token before; nothing where a request begins."""
    out_TLE = np.zeros_like(maps_TLE)
    same_T = request_T[1:] == request_T[:-1]
    out_TLE[1:][same_T] = maps_TLE[:-1][same_T]
    return out_TLE


def averaged(query_LE: NDArray, stored_NLE: NDArray, rows_NE: NDArray, nearest: int) -> NDArray:
    """The rows of the nearest, by similarity; the first of equals. Zeros where nothing is shared."""
    dot_N = (stored_NLE * query_LE).sum(axis=(1, 2))
    lengths_N = np.linalg.norm(query_LE) * np.sqrt((stored_NLE**2).sum(axis=(1, 2)))
    similar_N = np.where(dot_N > 0, dot_N / np.where(dot_N > 0, lengths_N, 1), 0)
    best_M = np.argsort(-np.round(similar_N, 8), kind="stable")[:nearest]
    weight_M = similar_N[best_M]
    return (weight_M[:, None] * rows_NE[best_M]).sum(axis=0) / (weight_M.sum() or 1)


def slow(
    train: RoutingTrace, asked: RoutingTrace, horizon: int, nearest: int, weighted: bool
) -> NDArray[np.float64]:
    """All training tokens are stored, in order."""
    stored, running = maps(train, weighted), maps(asked, weighted)
    stored_before, before = shifted(stored, train.request_T), shifted(running, asked.request_T)
    share_LE = maps(train, False).sum(axis=0)
    share_LE = share_LE / share_LE.sum(axis=1, keepdims=True)
    out_TLE = np.zeros_like(running)
    for t, layer in np.ndindex(out_TLE.shape[:2]):
        if layer >= horizon:
            known = slice(0, layer - horizon + 1)
            query, compared = running[t, known], stored[:, known]
        else:
            query, compared = before[t], stored_before
        out_TLE[t, layer] = averaged(query, compared, stored[:, layer], nearest)
    return out_TLE + TAIL * share_LE


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("nearest", [1, 5])
@pytest.mark.parametrize("horizon", [1, 3, 9])
def test_scores_equal_a_slow_definition(horizon: int, nearest: int, weighted: bool) -> None:
    train, asked = weighty_trace(), weighty_trace(3, 3, 7)
    predictor = Trajectory((horizon,), nearest=nearest, weighted=weighted)
    predictor.fit(whole(train), whole(train))
    expected = slow(train, asked, horizon, nearest, weighted)
    np.testing.assert_allclose(predictor.scores(Past(asked, horizon)), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["no expert", "two stacks", "one layer", "one token", "wide ids"])
def test_odd_traces_too(name: str) -> None:
    trace = ODD[name]
    of_both_stacks = (trace.request_T < 4) | (trace.request_T > 26)
    trace = trace.rows(of_both_stacks & (np.arange(trace.n_tokens) % 40 < 4))
    predictor = Trajectory((1, 2), nearest=2).fit(whole(trace), whole(trace))
    for horizon in (1, 2):
        expected = slow(trace, trace, horizon, 2, False)
        np.testing.assert_allclose(predictor.scores(Past(trace, horizon)), expected, atol=1e-6)


def test_the_store_is_drawn_from_rows_that_count() -> None:
    trace = random_trace(n_requests=4, tokens=20)
    part = Part(trace, np.array([1, 3]), first=25, stop=70)
    fitted = Trajectory(store=9, seed=1).fit(part, part)
    rows = [t for t in range(25, 70) if trace.request_T[t] in (1, 3)]
    places = [
        [t for t in rows if np.array_equal(trace.ids_TLK[t], ids_LK)]
        for ids_LK in fitted.ids_2NLK_[0]
    ]
    assert len(places) == 9 and all(places) and sorted(places) == places
    for (t, *_), before_LK in zip(places, fitted.ids_2NLK_[1], strict=True):
        expected = trace.ids_TLK[t - 1] if t % 20 else np.full((4, 3), 255)
        np.testing.assert_array_equal(before_LK, expected)
    again, other = (Trajectory(store=9, seed=s).fit(part, part).ids_2NLK_ for s in (1, 2))
    np.testing.assert_array_equal(again, fitted.ids_2NLK_)
    assert not np.array_equal(other, fitted.ids_2NLK_)


@pytest.mark.parametrize("weighted", [False, True])
def test_what_comes_later_changes_nothing(weighted: bool) -> None:
    trace, other = weighty_trace(), weighty_trace(9)
    predictor = Trajectory((1, 2), weighted=weighted).fit(whole(other), whole(other))
    for horizon in (1, 2):
        plain = predictor.scores(Past(trace, horizon))
        for row, layer in ((0, 0), (5, 2), (9, 3), (31, 1)):
            arrays, known = {}, max(0, layer - horizon + 1)
            for name in ("ids_TLK", "weights_TLK"):
                arrays[name] = getattr(trace, name).copy()
                arrays[name][row, known:] = getattr(other, name)[row, known:]
                arrays[name][row + 1 :] = getattr(other, name)[row + 1 :]
            scores = predictor.scores(Past(dataclasses.replace(trace, **arrays), horizon))
            np.testing.assert_array_equal(scores[:row], plain[:row])
            np.testing.assert_array_equal(scores[row, : layer + 1], plain[row, : layer + 1])


def test_requests_are_strangers() -> None:
    trace = weighty_trace()
    predictor = Trajectory(nearest=3).fit(whole(trace), whole(trace))
    alone = predictor.scores(Past(trace.rows(slice(16, 24)), 1))
    np.testing.assert_array_equal(alone, predictor.scores(Past(trace, 1))[16:24])


def test_a_stored_token_is_found_again() -> None:
    """The last layer of a token that is in the store is told by its layers before."""
    trace = random_trace(n_requests=6, tokens=8, n_layers=6, n_experts=40)
    predictor = Trajectory().fit(whole(trace), whole(trace))
    guessed = np.argsort(-predictor.scores(Past(trace, 1))[:, -1], axis=1)[:, :3]
    np.testing.assert_array_equal(np.sort(guessed), np.sort(trace.ids_TLK[:, -1]))


def test_weights_are_asked_for_only_where_they_are_used() -> None:
    assert Trajectory().needs == () and Trajectory(weighted=True).needs == ("weights",)
    assert (
        not cheats(Trajectory()) and Trajectory(weighted=True).sees == "routing history + weights"
    )
    trace = random_trace(n_requests=4, tokens=5)
    with pytest.raises(MissingData, match="weights"):
        Trajectory(weighted=True).fit(whole(trace), whole(trace))


@pytest.mark.parametrize("weighted", [False, True])
def test_restored_scores_are_the_same(tmp_path: Path, weighted: bool) -> None:
    trace = weighty_trace()
    fitted = Trajectory((1, 2), weighted=weighted).fit(whole(trace), whole(trace))
    save(fitted, tmp_path, {}, 0.0)
    again = Trajectory((1, 2), weighted=weighted)
    restore(again, tmp_path)
    np.testing.assert_array_equal(again.scores(Past(trace, 2)), fitted.scores(Past(trace, 2)))


@pytest.mark.parametrize("name, least", [("store", 1), ("nearest", 1), ("seed", 0)])
def test_settings_are_checked(name: str, least: int) -> None:
    with pytest.raises(ConfigError, match=f"{name}: must be at least {least}"):
        Trajectory(**{name: least - 1})
