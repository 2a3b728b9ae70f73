"""Sums that are rounded once, in whatever parts they were added, and ratios that are nothing where nothing was."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.routing.sums import Sums, added, ratio, share_of

# large ones that cancel: added in floats the small ones would be lost
numbers = st.lists(st.sampled_from([1e16, -1e16, 1.0, 0.125, -3.0, np.nan]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(numbers, st.integers(0, 30))
def test_sums_are_rounded_once_wherever_they_are_cut(values, cut):
    group_T = np.arange(len(values)) % 3
    values_TN = np.array(values)[:, None] * [1.0, 2.0]
    first, later = Sums(4, 2, 2), Sums(4, 2, 2)  # groups, layers, numbers
    for part, rows in ((first, slice(0, cut)), (later, slice(cut, None))):
        part.add(1, values_TN[rows], group_T[rows])
    first.merge(later)
    for groups in (slice(0, 4), slice(1, 3), slice(3, 4)):
        kept = [v for v, g in zip(values, group_T, strict=True) if g in range(4)[groups]]
        kept = [v for v in kept if not math.isnan(v)]
        assert first.counts(groups).tolist() == [[0, 0], [len(kept)] * 2]
        assert first.sums(groups).tolist() == [[0, 0], [math.fsum(kept), 2 * math.fsum(kept)]]
        means = first.means(groups)
        assert np.isnan(means[0]).all() and np.isnan(means[1]).all() == (not kept)
        if kept:
            assert means[1, 0] == math.fsum(kept) / len(kept)


def test_what_a_sum_rounds_away_is_kept():
    assert [float(part) for part in added(1e16, 1.0)] == [1e16, 1.0]
    assert [float(part) for part in added(1.0, 1e16)] == [1e16, 1.0]


def test_a_ratio_and_a_share():
    np.testing.assert_array_equal(ratio([3.0, 1.0, 2.0], [2, 0, 1]), [1.5, np.nan, 2.0])
    np.testing.assert_array_equal(ratio(np.ones((2, 2)), 4), np.full((2, 2), 0.25))
    shares_LE = share_of(np.array([[1, 3], [0, 0], [0, 1]]))
    np.testing.assert_array_equal(shares_LE, [[0.25, 0.75], [np.nan] * 2, [0.0, 1.0]])
