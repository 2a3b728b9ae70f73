"""What is beyond chance: standard scores, false discovery rates, and what it costs that tokens come in requests.

It knows no table. E experts, M moments.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.special import betaln, stdtr

FEWEST_REQUESTS = 10  # fewer do not tell how much requests differ, and nothing is tested
FAR, STEPS = 30, 64  # up to which z, and in which steps, tails are kept
ENOUGH = 5.0  # independent pairs expected by chance: with fewer the normal law does not hold


def z_values(
    count: NDArray[Any], expected: NDArray[Any], variance: NDArray[Any]
) -> NDArray[np.float64]:
    """0 where the margins leave no choice."""
    free = variance > 1e-9
    return np.divide(count - expected, np.sqrt(variance), out=np.zeros(expected.shape), where=free)


def q_values(p_LN: NDArray[Any]) -> NDArray[np.float64]:
    """False discovery rates within every row (Benjamini and Hochberg 1995); NaN was not tested and stays NaN."""
    order_LN = np.argsort(p_LN, axis=1)  # NaN last; the order of equal ones changes no rate
    sorted_LN = np.take_along_axis(p_LN, order_LN, 1)
    tests_L = (~np.isnan(p_LN)).sum(axis=1, keepdims=True)
    rates_LN = sorted_LN * tests_L / np.arange(1, p_LN.shape[1] + 1)
    least_LN = np.fmin.accumulate(rates_LN[:, ::-1], axis=1)[:, ::-1]
    q_LN = np.empty(p_LN.shape)
    np.put_along_axis(q_LN, order_LN, np.minimum(least_LN, 1), 1)
    return np.where(np.isnan(p_LN), np.nan, q_LN)


def design_effects(
    counts: Counts, pair_MEE: NDArray[Any], margin_ME: NDArray[Any], total_M: NDArray[Any]
) -> NDArray[np.float64]:
    """By how much the excess of every pair over chance varies more than if tokens were independent; 1 at least.

    Tokens of one request are not (Kish 1965): the excess n - e of a pair is, to first order, a sum over tokens of
    u = 1[a and b] - (e/A) 1[a] - (e/B) 1[b] + const, because the expected e moves with both margins. The effect is the
    spread of the sums of u over requests divided by that of u over tokens. The moments are those of `pairs.Spread`.
    """
    effect_EE = np.empty(counts[3].shape)
    _spread_of_excess(counts, pair_MEE, margin_ME, total_M, effect_EE)
    return effect_EE


Counts = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], int]  # pairs .. tokens


@njit(cache=True, nogil=True)
def _spread_of_excess(counts, pair_MEE, margin_ME, total_M, effect_EE):  # type: ignore[no-untyped-def]
    count_EE, here_E, there_E, expected_EE, tokens = counts
    requests, tt = total_M
    for a in range(len(here_E)):
        for b in range(len(there_E)):
            both, expected, here, there = count_EE[a, b], expected_EE[a, b], here_E[a], there_E[b]
            per_here = expected / here if here else 0.0
            per_there = expected / there if there else 0.0
            rest = (2 * expected - both) / tokens  # so that u sums to 0
            spread = pair_MEE[0, a, b] + rest**2 * tt
            spread += per_here**2 * margin_ME[0, a] + per_there**2 * margin_ME[2, b]
            crossed = rest * pair_MEE[3, a, b] + per_here * per_there * pair_MEE[4, a, b]
            crossed -= per_here * pair_MEE[1, a, b] + per_there * pair_MEE[2, a, b]
            crossed -= rest * (per_here * margin_ME[1, a] + per_there * margin_ME[3, b])
            # over independent tokens: those that chose both, neither, one, the other
            alone = both * (1 - per_here - per_there + rest) ** 2
            alone += (tokens - here - there + both) * rest**2
            alone += (here - both) * (rest - per_here) ** 2
            alone += (there - both) * (rest - per_there) ** 2
            alone *= max(1, requests - 1)
            ratio = (spread + 2 * crossed) * requests / alone if alone > 1e-9 else 0.0
            effect_EE[a, b] = max(1.0, ratio)


def tail(z: NDArray[Any], requests: Any) -> NDArray[np.float64]:
    """Chance of a larger z: Student's law, because the spread itself is estimated from so many requests."""
    chance = np.empty(z.shape)
    _look_up(z.ravel(), *_log_tails(max(float(requests) - 1, 1.0)), chance.ravel())
    far = np.abs(z) >= FAR
    chance[far] = stdtr(max(requests - 1, 1), -z[far])
    return chance


@cache
def _log_tails(freedom: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logarithms of the tail and their slopes, `STEPS` for every unit of z, the slope for a step."""
    z = np.arange(FAR * STEPS + 1) / STEPS
    tail = stdtr(freedom, -z)
    if np.isinf(freedom):
        log_density = -(z**2) / 2 - np.log(2 * np.pi) / 2
    else:
        log_density = -(freedom + 1) / 2 * np.log1p(z**2 / freedom)
        log_density -= betaln(freedom / 2, 0.5) + np.log(freedom) / 2
    return np.log(tail), -np.exp(log_density - np.log(tail)) / STEPS


@njit(cache=True, nogil=True)
def _look_up(z_N, log_Z, slope_Z, chance_N):  # type: ignore[no-untyped-def]
    """Cubic between two values and their slopes: nine digits, in a twentieth of the time of the function itself."""
    for i in range(len(z_N)):
        at = abs(z_N[i]) * STEPS
        low = int(at) if at < len(log_Z) - 1 else len(log_Z) - 2
        t = at - low
        rise = log_Z[low + 1] - log_Z[low]
        one, other = slope_Z[low] - rise, rise - slope_Z[low + 1]
        log = log_Z[low] + t * rise + t * (1 - t) * ((1 - t) * one + t * other)
        chance_N[i] = np.exp(log) if z_N[i] >= 0 else 1 - np.exp(log)
