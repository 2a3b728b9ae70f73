"""A rate and its interval are of the same thing, and as wide as the spread of repeated worlds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prefetch.predict.scored.estimates import Sums, holm, interval, interval_of_gain, rate


def world(
    rng: np.random.Generator, n_units: int, n_folds: int = 5, above: float = 0.0
) -> list[Sums]:
    """Units of a rate of their own, and of very different sizes."""
    below = rng.integers(5, 400, (n_folds, n_units, 3))
    shares = np.clip(rng.beta(4, 6, (n_folds, n_units, 1)) + above, 0, 1)
    return [Sums(*pair) for pair in zip(rng.binomial(below, shares), below, strict=True)]


@pytest.mark.parametrize("n_units", [2, 3, 40])
def test_the_error_is_the_spread_of_repeated_worlds(n_units: int) -> None:
    """Also where a fold has two units: drawn as many as there are, they would say 0.7 of it."""
    rng = np.random.default_rng(0)
    worlds = [world(rng, n_units) for _ in range(400)]
    spread = np.std([rate(one) for one in worlds])
    said = [interval(one, 0).error for one in worlds[:60]]
    assert np.sqrt(np.mean(np.square(said))) == pytest.approx(spread, rel=0.15)  # 400 worlds: 4 %


def test_the_interval_holds_the_rate_of_very_unequal_units() -> None:
    """One long easy request in a fold: the mean over folds and a pooled ratio are far apart."""
    below = np.full((5, 4, 2), 10)
    below[0, 0] = 10_000
    above = np.random.default_rng(0).binomial(below, 0.2)
    above[0, 0] = 10_000
    folds = [Sums(*pair) for pair in zip(above, below, strict=True)]
    low, high, *_ = interval(folds, 0)
    assert low < rate(folds) < high
    pooled = above.sum() / below.sum()
    assert pooled > 0.9 > high


def test_differences_are_paired() -> None:
    ours = world(np.random.default_rng(0), 20)
    theirs = [Sums(fold.above_UL // 2, fold.below_UL) for fold in ours]
    low, high, error, chance = interval_of_gain(ours, theirs, 0)
    assert low < rate(ours) - rate(theirs) < high
    assert chance < 1e-6
    assert interval_of_gain(ours, ours, 0) == (0, 0, 0, 1)
    assert error < interval(ours, 0).error


@pytest.mark.parametrize(("n_folds", "n_units"), [(5, 1), (1, 9), (1, 1), (3, 3)])
def test_too_few_units_have_no_interval(n_folds: int, n_units: int) -> None:
    found = interval(world(np.random.default_rng(0), n_units, n_folds), 0)
    assert all(math.isnan(value) for value in found)


def test_layers_and_folds_without_rows_do_not_count() -> None:
    folds = world(np.random.default_rng(0), 12)
    with_holes = [*folds, Sums(np.zeros((12, 3)), np.zeros((12, 3)))]
    assert rate(with_holes) == rate(folds)
    assert interval(with_holes, 0).low == interval(folds, 0).low


def test_holm_is_the_published_example() -> None:
    """p = .01, .04, .03, .005 become .03, .06, .06, .02 (R's p.adjust)."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert math.isnan(holm([math.nan, 0.1])[0]) and holm([math.nan, 0.1])[1] == 0.1


def test_an_interval_that_holds_zero_is_no_difference() -> None:
    """One fold's long request makes the whole difference: its spread is far from normal."""
    below = np.full((5, 4, 2), 10)
    above = np.full((5, 4, 2), 5)
    theirs = [Sums(*pair) for pair in zip(above, below, strict=True)]
    ours_above = above - 1
    ours_above[0, 0], below_ours = 10_000, below.copy()
    below_ours[0, 0] = 10_000
    ours = [Sums(*pair) for pair in zip(ours_above, below_ours, strict=True)]
    low, high, _, chance = interval_of_gain(ours, theirs, 0)
    assert low < 0 < high and chance > 0.05
