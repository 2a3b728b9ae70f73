"""Tails are those of Student's law, and false discovery rates those of scipy."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control, t

from analysis.routing.significance import q_values, tail


@pytest.mark.parametrize("requests", [2, 10, 31, 400, 20_001, np.inf])
def test_a_tail_is_that_of_students_law(requests):
    z = np.concatenate([np.linspace(-40, 40, 4001), np.random.default_rng(0).normal(size=1000)])
    expected = t(requests - 1).sf(z)
    # beyond the last double nothing is left of either
    assert tail(z, requests) == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_equal_chances_have_equal_rates_and_what_was_not_tested_has_none():
    p = np.random.default_rng(1).integers(1, 20, 500) / 400
    p[::7] = np.nan
    rates = q_values(p[None])[0]
    assert np.isnan(rates[::7]).all()
    known = ~np.isnan(p)
    assert rates[known] == pytest.approx(false_discovery_control(p[known]))
