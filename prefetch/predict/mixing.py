"""Scores of several predictors on one scale, and the weights with which they are mixed.

The scale is log-odds: a mixture is a weighted sum of them (a logarithmic opinion pool), its sigmoid a probability once
weights and bias are learnt. It knows no predictor and no trace.

M members, N events = (token, layer), T tokens, L layers, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

PROBABILITY, LOGIT, RANK = 0, 1, 2  # what a score is; RANK: nothing but its order counts
FLOOR = 1e-3  # added to a chance and to its opposite: nobody's "never" is final
FARTHEST = 30.0  # of log-odds
PRIOR = 1.0  # of weights, about all members alike: few events that agree by chance move them little
LEAST_SLOPE = 1e-3  # of a calibration: the order stays


class Told(NamedTuple):
    """What the members said about events, and what came."""

    odds_NME: NDArray[np.float32]
    ids_NK: NDArray[Any]  # E or more = nobody


class Mix(NamedTuple):
    """Log-odds of an expert = bias + the sum of weights times log-odds of members."""

    bias: float
    weight_M: NDArray[np.float64]


def log_odds(scores_TLE: NDArray[np.float32], kind: int) -> NDArray[np.float32]:
    """In the order of the scores; what is not guessed at all comes last."""
    odds_TLE = np.empty(scores_TLE.shape, np.float32)
    _log_odds(np.ascontiguousarray(scores_TLE, np.float32), kind, odds_TLE)
    return odds_TLE


def tuned(told: Told) -> Mix:
    """The weights with most hits on these events, calibrated; every member alone is among those that are tried."""
    n_members = told.odds_NME.shape[1]
    if not len(told.ids_NK):
        return Mix(0.0, np.full(n_members, 1 / n_members))
    best_M = max(_candidates(told), key=lambda weight_M: hits_of(told, weight_M))
    return _calibrated(told, best_M)


def hits_of(told: Told, weight_M: NDArray[np.float64]) -> int:
    """True choices among the best k of the mixture; ties go to the smaller id."""
    return int(_hits(told.odds_NME, told.ids_NK, weight_M))


def _candidates(told: Told) -> Iterator[NDArray[np.float64]]:
    """Of equally good ones the first is taken."""
    n_members = told.odds_NME.shape[1]
    yield from np.eye(n_members)
    if n_members > 1:
        yield np.full(n_members, 1 / n_members)
        likeliest_M = _likeliest(told, least=0.0).weight_M
        if likeliest_M.any():
            yield likeliest_M / likeliest_M.sum()


def _calibrated(told: Told, weight_M: NDArray[np.float64]) -> Mix:
    """The same order; slope and bias that make the sigmoid a probability (Platt 1999)."""
    mixed_NE = np.einsum("m,nme->ne", weight_M, told.odds_NME).astype(np.float32)
    mix = _likeliest(Told(mixed_NE[:, None], told.ids_NK), least=LEAST_SLOPE)
    return Mix(mix.bias, mix.weight_M[0] * weight_M)


def _likeliest(told: Told, *, least: float) -> Mix:
    """Ridge-penalised logistic regression of "was chosen" on members' log-odds, no weight below `least`."""
    from scipy.optimize import minimize

    n_rows, n_members, n_experts = told.odds_NME.shape
    start = np.array([0.0, *[1 / n_members] * n_members])
    prior = np.array([0.0, *[PRIOR] * n_members]) / (n_rows * n_experts)

    def loss(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        slopes = 2 * prior * (x - start)
        return _loss(told.odds_NME, told.ids_NK, x, slopes) + float(
            prior @ (x - start) ** 2
        ), slopes

    bounds = [(None, None), *[(least, None)] * n_members]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return Mix(float(found.x[0]), np.asarray(found.x[1:], np.float64))


@njit(cache=True, nogil=True)
def _log_odds(scores_TLE, kind, odds_TLE):  # type: ignore[no-untyped-def]
    n_experts = scores_TLE.shape[2]
    for t in range(scores_TLE.shape[0]):
        for layer in range(scores_TLE.shape[1]):
            if kind == RANK:
                order_E = np.argsort(-scores_TLE[t, layer], kind="mergesort")
                for rank in range(n_experts):
                    odds = np.log((n_experts - rank - 0.5) / (rank + 0.5))
                    odds_TLE[t, layer, order_E[rank]] = odds
                continue
            for expert in range(n_experts):
                score = np.float64(scores_TLE[t, layer, expert])
                if kind == LOGIT:
                    odds = min(max(score, -FARTHEST), FARTHEST)
                else:
                    chance = min(max(score, 0.0), 1.0)
                    odds = np.log((chance + FLOOR) / (1 - chance + FLOOR))
                odds_TLE[t, layer, expert] = odds


@njit(cache=True, nogil=True)
def add_odds(odds_TLE, weight_2, horizon, first, sum_TLE):  # type: ignore[no-untyped-def]
    """Weighted: the first weight is that of layers below the horizon. `first` is the number of the first layer."""
    for t in range(odds_TLE.shape[0]):
        for layer in range(odds_TLE.shape[1]):
            weight = weight_2[0 if layer + first < horizon else 1]
            for expert in range(odds_TLE.shape[2]):
                sum_TLE[t, layer, expert] += weight * odds_TLE[t, layer, expert]


@njit(cache=True, nogil=True)
def chances(sum_TLE, bias_2, horizon, first, out_TLE):  # type: ignore[no-untyped-def]
    for t in range(sum_TLE.shape[0]):
        for layer in range(sum_TLE.shape[1]):
            bias = bias_2[0 if layer + first < horizon else 1]
            for expert in range(sum_TLE.shape[2]):
                out_TLE[t, layer, expert] = 1 / (1 + np.exp(-bias - sum_TLE[t, layer, expert]))


@njit(cache=True, nogil=True)
def _hits(odds_NME, ids_NK, weight_M):  # type: ignore[no-untyped-def]
    n_members, n_experts = odds_NME.shape[1:]
    top_k, hits = ids_NK.shape[1], 0
    mixed_E = np.empty(n_experts)
    for n in range(len(ids_NK)):
        mixed_E[:] = 0
        for m in range(n_members):
            if weight_M[m]:
                for expert in range(n_experts):
                    mixed_E[expert] += weight_M[m] * odds_NME[n, m, expert]
        for k in range(top_k):
            true = ids_NK[n, k]
            if true >= n_experts:
                continue
            before = 0
            for expert in range(n_experts):
                is_tie = mixed_E[expert] == mixed_E[true] and expert < true
                before += mixed_E[expert] > mixed_E[true] or is_tie
            hits += before < top_k
    return hits


@njit(cache=True, nogil=True)
def _loss(odds_NME, ids_NK, x, slopes):  # type: ignore[no-untyped-def]
    """Mean cross entropy of bias x[0] and weights x[1:], over events and experts; its slopes are added."""
    n_rows, n_members, n_experts = odds_NME.shape
    used_E, mixed_E, total = np.empty(n_experts), np.empty(n_experts), 0.0
    share = 1 / (n_rows * n_experts)
    for n in range(n_rows):
        used_E[:], mixed_E[:] = 0, x[0]
        for k in range(ids_NK.shape[1]):
            if ids_NK[n, k] < n_experts:
                used_E[ids_NK[n, k]] = 1
        for m in range(n_members):
            for expert in range(n_experts):
                mixed_E[expert] += x[m + 1] * odds_NME[n, m, expert]
        for expert in range(n_experts):
            mixed = mixed_E[expert]
            total += max(mixed, 0.0) - used_E[expert] * mixed + np.log1p(np.exp(-abs(mixed)))
            mixed_E[expert] = 1 / (1 + np.exp(-mixed)) - used_E[expert]  # now the slope
            slopes[0] += share * mixed_E[expert]
        for m in range(n_members):
            for expert in range(n_experts):
                slopes[m + 1] += share * mixed_E[expert] * odds_NME[n, m, expert]
    return share * total
