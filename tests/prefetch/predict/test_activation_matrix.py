"""Activation matrices equal a slow definition, in both variants, and know nothing of what comes later."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from routing_traces import odd_traces, random_trace

from prefetch.errors import ConfigError
from prefetch.predict.activation_matrix import ActivationMatrix
from prefetch.predict.part import Part, whole
from prefetch.predict.past import Past
from prefetch.predict.predictor import restore, save
from prefetch.trace.routing import RoutingTrace, trace_of

ODD = odd_traces()


def used(trace: RoutingTrace) -> NDArray[np.float64]:
    """[T, L, E]: how often a row names an expert."""
    experts = np.arange(trace.card.n_experts)
    return (trace.ids_TLK[:, :, :, None] == experts).sum(axis=2).astype(float)


def cosine(one_LE: NDArray, other_LE: NDArray) -> NDArray:
    """[L]: 0 where one of them is empty."""
    lengths = np.linalg.norm(one_LE, axis=1) * np.linalg.norm(other_LE, axis=1)
    return (one_LE * other_LE).sum(axis=1) / np.where(lengths > 0, lengths, 1)


def slow(
    train: RoutingTrace, kept: list[int], asked: RoutingTrace, horizon: int, variant: str
) -> NDArray[np.float64]:
    """Event by event, every matrix made anew from the tokens that it counts."""
    used_TLE, out_TLE = used(asked), np.zeros(used(asked).shape)
    share_LE = used(train).sum(axis=0)
    share_LE = share_LE / share_LE.sum(axis=1, keepdims=True)
    matrices = [used(train)[train.request_T == request].sum(axis=0) for request in kept]
    n_layers = asked.card.n_layers
    for t in range(asked.n_tokens):
        before = (asked.request_T == asked.request_T[t]) & (np.arange(asked.n_tokens) < t)
        for layer in range(n_layers):
            known = layer - horizon
            query_LE = used_TLE[before].sum(axis=0)
            query_LE[: max(known + 1, 0)] += used_TLE[t, : max(known + 1, 0)]
            best, most = None if variant == "paper" else matrices[0], 1e-9
            for matrix in matrices:
                compared_L = cosine(query_LE, matrix)
                if variant == "code" and known >= 0:
                    compared_L[: known + 1] = 0
                if compared_L.sum() > most:
                    best, most = matrix, compared_L.sum() + 1e-9
            row_E = share_LE[layer]
            if best is not None and best[layer].any():
                row_E = best[layer] / best[layer].sum()
            ahead = layer - max(known, -1)
            out_TLE[t, layer] = (row_E + 1e-8) * (1 - ahead / (n_layers + 1))
    return out_TLE


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("horizon", [1, 3, 9])
def test_scores_equal_a_slow_definition(variant: str, horizon: int) -> None:
    train, asked = random_trace(n_requests=7, tokens=9), random_trace(3, n_requests=3, tokens=8)
    predictor = ActivationMatrix((horizon,), variant).fit(whole(train), whole(train))
    expected = slow(train, list(range(7)), asked, horizon, variant)
    np.testing.assert_allclose(predictor.scores(Past(asked, horizon)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["no expert", "two stacks", "one layer", "one token", "wide ids"])
@pytest.mark.parametrize("variant", ["paper", "code"])
def test_odd_traces_too(variant: str, name: str) -> None:
    trace = ODD[name]
    of_both_stacks = (trace.request_T < 4) | (trace.request_T > 26)
    trace = trace.rows(of_both_stacks & (np.arange(trace.n_tokens) % 40 < 5))
    predictor = ActivationMatrix((1, 2), variant).fit(whole(trace), whole(trace))
    kept = np.unique(trace.request_T).tolist()
    for horizon in (1, 2):
        with np.errstate(invalid="ignore"):
            expected = slow(trace, kept, trace, horizon, variant)
        scores = predictor.scores(Past(trace, horizon))
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_variants_differ() -> None:
    trace = random_trace(n_requests=7, tokens=9)
    paper, code = (ActivationMatrix((1,), v).fit(whole(trace), whole(trace)) for v in ("paper", "code"))  # fmt: skip
    assert not np.array_equal(paper.scores(Past(trace, 1)), code.scores(Past(trace, 1)))


def test_kept_requests_are_evenly_spaced_and_have_rows() -> None:
    trace = random_trace(n_requests=12, tokens=5)
    trace.ids_TLK[10:15] = 255  # request 2 chose nobody: it would be an empty slot
    part = whole(trace)
    predictor = ActivationMatrix((1,), capacity=4).fit(part, part)
    rows = [trace.request_T == request for request in (0, 3, 6, 9)]
    expected = np.stack([used(trace)[row].sum(axis=0) for row in rows])
    np.testing.assert_array_equal(predictor.counts_NLE_, expected)
    assert len(ActivationMatrix((1,), capacity=99).fit(part, part).counts_NLE_) == 11


def test_only_rows_that_count_are_learnt() -> None:
    """A split in time: other rows of the same request belong to other parts."""
    trace = random_trace(n_requests=1, tokens=20)
    part = Part(trace, np.array([0]), first=5, stop=12)
    predictor = ActivationMatrix().fit(part, part)
    np.testing.assert_array_equal(predictor.counts_NLE_[0], used(trace)[5:12].sum(axis=0))


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_later_choices_change_nothing(variant: str) -> None:
    trace, other = random_trace(n_requests=4, tokens=8), random_trace(9, n_requests=4, tokens=8)
    predictor = ActivationMatrix((1, 2), variant).fit(whole(other), whole(other))
    for horizon in (1, 2):
        plain = predictor.scores(Past(trace, horizon))
        for row, layer in ((0, 0), (5, 2), (9, 3), (31, 1)):
            ids_TLK, known = trace.ids_TLK.copy(), max(0, layer - horizon + 1)
            ids_TLK[row, known:] = other.ids_TLK[row, known:]
            ids_TLK[row + 1 :] = other.ids_TLK[row + 1 :]
            changed = dataclasses.replace(trace, ids_TLK=ids_TLK)
            scores = predictor.scores(Past(changed, horizon))
            np.testing.assert_array_equal(scores[:row], plain[:row])
            np.testing.assert_array_equal(scores[row, : layer + 1], plain[row, : layer + 1])


def test_requests_are_strangers() -> None:
    trace = random_trace(n_requests=4, tokens=8)
    predictor = ActivationMatrix().fit(whole(trace), whole(trace))
    alone = predictor.scores(Past(trace.rows(slice(16, 24)), 1))
    np.testing.assert_array_equal(alone, predictor.scores(Past(trace, 1))[16:24])


def test_the_request_that_was_learnt_is_found_again() -> None:
    """Two kinds of requests with nothing in common: after one choice the right one is known."""
    card = random_trace(n_experts=6).card
    kinds = [[[0, 1, 2]] * 4, [[3, 4, 5]] * 4]
    trace = trace_of(card, np.array([kinds[i // 5 % 2] for i in range(20)]), request_T=np.arange(20) // 5)  # fmt: skip
    predictor = ActivationMatrix().fit(whole(trace), whole(trace))
    guessed = np.argsort(-predictor.scores(Past(trace, 1)), axis=2, kind="stable")[:, :, :3]
    np.testing.assert_array_equal(guessed[:, 1:], trace.ids_TLK[:, 1:])
    np.testing.assert_array_equal(guessed[[1, 6], 0], trace.ids_TLK[[1, 6], 0])


def test_restored_scores_are_the_same(tmp_path: Path) -> None:
    trace = random_trace(n_requests=6, tokens=8)
    fitted = ActivationMatrix((1, 2)).fit(whole(trace), whole(trace))
    save(fitted, tmp_path, {}, 0.0)
    again = ActivationMatrix((1, 2))
    restore(again, tmp_path)
    np.testing.assert_array_equal(again.scores(Past(trace, 2)), fitted.scores(Past(trace, 2)))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="variant: expected one of"):
        ActivationMatrix(variant="both")
    with pytest.raises(ConfigError, match="capacity: must be at least 1"):
        ActivationMatrix(capacity=0)
