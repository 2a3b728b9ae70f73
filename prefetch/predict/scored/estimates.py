"""One estimate of a rate, and its interval: mean over layers, then over folds; units are drawn within their fold.

A unit is a request, or all turns of a conversation. F folds, U units, L layers, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
LEVEL = 0.95
ENOUGH_UNITS = 10  # fewer give an interval that is far too narrow


class Sums(NamedTuple):
    """Of one fold: what was hit, and what there was, [U, L]."""

    above_UL: NDArray[Any]
    below_UL: NDArray[Any]


class Interval(NamedTuple):
    low: float
    high: float
    error: float  # standard error
    chance: float  # of a value so far from zero where it is zero; of a difference


UNKNOWN = Interval(math.nan, math.nan, math.nan, math.nan)


def mean(values: Sequence[float]) -> float:
    """Over what is known."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def ratio(above_L: NDArray[Any], below_L: NDArray[Any]) -> float:
    """Mean over the layers that have something below."""
    seen = below_L > 0
    return float((above_L[seen] / below_L[seen]).mean()) if seen.any() else math.nan


def rate(folds: Sequence[Sums]) -> float:
    return mean([ratio(fold.above_UL.sum(axis=0), fold.below_UL.sum(axis=0)) for fold in folds])


def interval(folds: Sequence[Sums], seed: int) -> Interval:
    """Of `rate`."""
    drawn = _drawn(folds, seed)
    return UNKNOWN if drawn is None else _interval(drawn)


def interval_of_gain(ours: Sequence[Sums], theirs: Sequence[Sums], seed: int) -> Interval:
    """Of the difference of two rates about the same rows: the same units are drawn for both."""
    one, other = _drawn(ours, seed), _drawn(theirs, seed)
    return UNKNOWN if one is None or other is None else _interval(one - other)


def _interval(drawn_D: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(drawn_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    error, middle = float(drawn_D.std()), float(drawn_D.mean())
    beyond = 2 * min(float((drawn_D <= 0).mean()), float((drawn_D >= 0).mean()))
    # what few draws cannot count is as a normal tail says
    normal = 2 * NormalDist().cdf(-abs(middle) / error) if error > 0 else 0.0
    return Interval(float(low), float(high), error, min(1.0, max(beyond, normal)))


def _drawn(folds: Sequence[Sums], seed: int) -> NDArray[np.float64] | None:
    """[D] the rate of drawn units; None where there are too few of them to say how far it varies."""
    told = [fold.below_UL.any(axis=1) for fold in folds]
    n_units = [int(told_U.sum()) for told_U in told if told_U.any()]
    if sum(n_units) < ENOUGH_UNITS or min(n_units) < 2:
        return None
    of_folds = []
    for number, (fold, told_U) in enumerate(zip(folds, told, strict=True)):
        if not told_U.any():
            continue
        weight_DU = _weights(int(told_U.sum()), seed, number)
        above_DL = weight_DU @ fold.above_UL[told_U].astype(float)
        below_DL = weight_DU @ fold.below_UL[told_U].astype(float)
        share_DL = np.divide(above_DL, below_DL, out=np.zeros_like(above_DL), where=below_DL > 0)
        of_folds.append(share_DL.sum(axis=1) / (below_DL > 0).sum(axis=1))
    return np.mean(of_folds, axis=0)


@lru_cache(maxsize=8)
def _weights(n: int, seed: int, fold: int) -> NDArray[np.float64]:
    """[D, U] how often each unit is drawn: one fewer than there are, which makes the spread of few units right
    (Rao and Wu 1988)."""
    drawn_DU = np.random.default_rng([seed, fold]).integers(0, n, (DRAWS, n - 1))
    places = drawn_DU + n * np.arange(DRAWS)[:, None]
    return np.bincount(places.ravel(), minlength=DRAWS * n).reshape(DRAWS, n).astype(float)


def holm(chances: Sequence[float]) -> list[float]:
    """The same for all comparisons of a table together (Holm 1979)."""
    told = [i for i, chance in enumerate(chances) if not math.isnan(chance)]
    adjusted, worst = [math.nan] * len(chances), 0.0
    for rank, i in enumerate(sorted(told, key=lambda i: chances[i])):
        worst = max(worst, min(1.0, (len(told) - rank) * chances[i]))
        adjusted[i] = worst
    return adjusted
