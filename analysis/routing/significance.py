"""What is beyond chance: standard scores, false discovery rates, and what it costs that tokens come in requests.

It knows no table. E experts, M moments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

FEWEST_REQUESTS = 10  # fewer do not tell how much requests differ, and nothing is tested
ENOUGH = 5.0  # independent pairs expected by chance: with fewer the normal law does not hold


def z_values(
    count: NDArray[Any], expected: NDArray[Any], variance: NDArray[Any]
) -> NDArray[np.float64]:
    """0 where the margins leave no choice."""
    free = variance > 1e-9
    return np.divide(count - expected, np.sqrt(variance), out=np.zeros(expected.shape), where=free)


def q_values(p_LN: NDArray[Any]) -> NDArray[np.float64]:
    """False discovery rates within every row (Benjamini and Hochberg 1995); NaN was not tested and stays NaN."""
    order_LN = np.argsort(p_LN, axis=1, kind="stable")  # NaN last
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
    count_EE, here_E, there_E, expected_EE, tokens = counts
    per_here = _quotient(expected_EE, here_E[:, None])
    per_there = _quotient(expected_EE, there_E[None, :])
    rest = (2 * expected_EE - count_EE) / tokens  # so that u sums to 0
    nn, na, nb, nt, ab = pair_MEE
    aa, at, bb, bt = margin_ME[0][:, None], margin_ME[1][:, None], margin_ME[2], margin_ME[3]
    requests, tt = total_M
    spread = nn + per_here**2 * aa + per_there**2 * bb + rest**2 * tt
    spread = spread + 2 * (rest * nt - per_here * na - per_there * nb + per_here * per_there * ab)
    spread = spread - 2 * rest * (per_here * at + per_there * bt)
    alone = _variance(counts, per_here, per_there, rest)
    ratio = _quotient(spread * requests, alone * max(1, requests - 1))
    return np.maximum(1.0, ratio)


Counts = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], int]  # pairs .. tokens


def _variance(counts: Counts, per_here: Any, per_there: Any, rest: Any) -> NDArray[np.float64]:
    """Of the sum of u over independent tokens: those that chose both, one, the other, neither."""
    both, here_E, there_E, _, tokens = counts
    here, there = here_E[:, None] - both, there_E[None, :] - both
    neither = tokens - both - here - there
    told = both * (1 - per_here - per_there + rest) ** 2 + neither * rest**2
    variance: NDArray[np.float64] = (
        told + here * (rest - per_here) ** 2 + there * (rest - per_there) ** 2
    )
    return variance


def _quotient(above: Any, below: Any) -> NDArray[np.float64]:
    """0 where there is nothing below, or only what rounding leaves."""
    above, below = np.broadcast_arrays(above, below)
    return np.divide(above, below, out=np.zeros(above.shape), where=below > 1e-9)


def tail(z: NDArray[Any], requests: Any) -> NDArray[np.float64]:
    """Chance of a larger z: Student's law, because the spread itself is estimated from so many requests."""
    chance: NDArray[np.float64] = stdtr(np.maximum(requests - 1, 1), -z)
    return chance
