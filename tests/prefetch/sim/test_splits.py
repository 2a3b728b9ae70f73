"""A fitted split is the best of all splits, and given numbers are taken at their word or refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.errors import ConfigError
from prefetch.sim import splits
from prefetch.sim.engines.pool import MISS
from prefetch.sim.engines.run import replay
from prefetch.sim.policies.belady_forced import BeladyForced
from prefetch.sim.policies.lru import Lru
from prefetch.sim.tables.others import misses_of, most_used_of_each, uses_of
from tests.prefetch.sim.test_score_textbook import E, K, L, traced


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([[1, 1, 1, 1], [3, 3, 3, 3], [2, 3, 2, 3], [5, 2, 3, 7]]),
    st.integers(0, 4),
)
def test_fitted_is_the_best_of_all(seed, sizes, slots):
    """Curves of any falling shape, convex or not, against every split that fits."""
    rng = np.random.default_rng(seed)
    misses = np.sort(rng.integers(0, 60, (4, 6)), axis=1)[:, ::-1]
    equal = [slots * size for size in sizes]
    rooms = splits.fitted(misses, equal, sizes)
    found = [room // size for room, size in zip(rooms, sizes, strict=True)]
    assert sum(rooms) <= sum(equal) and all(
        room % s == 0 for room, s in zip(rooms, sizes, strict=True)
    )
    least = min(
        sum(int(misses[layer, c]) for layer, c in enumerate(one))
        for one in itertools.product(range(6), repeat=4)
        if sum(c * size for c, size in zip(one, sizes, strict=True)) <= sum(equal)
    )
    assert sum(int(misses[layer, c]) for layer, c in enumerate(found)) == least
    left = sum(equal) - sum(rooms)  # nothing is left that somebody could have
    assert all(c == 5 or size > left for c, size in zip(found, sizes, strict=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["lru", "optimum"]))
def test_curves_are_those_of_the_engine(seed, by):
    trace, work = traced(seed)
    misses = misses_of(trace, by)
    policy = Lru() if by == "lru" else BeladyForced()
    layer_A = np.repeat(np.arange(len(work.start_V) - 1) % L, np.diff(work.start_V))
    for room in range(K, E + 1):
        is_miss = replay(work, policy, [room] * L, [1] * L) == MISS
        assert np.bincount(layer_A[is_miss], minlength=L).tolist() == misses[:, room].tolist()
    assert (misses[:, 0] == np.bincount(layer_A, minlength=L)).all()


def test_a_fitted_split_loads_no_more_where_it_was_fitted():
    trace, work = traced(7)
    equal = [3] * L
    rooms = splits.fitted(misses_of(trace), equal, [1] * L)
    assert sum(rooms) == 9
    assert (replay(work, Lru(), rooms, [1] * L) == MISS).sum() <= (
        replay(work, Lru(), equal, [1] * L) == MISS
    ).sum()


def test_uses_and_the_most_used():
    trace, work = traced(1)
    uses = uses_of(trace)
    assert uses.sum() == work.tokens_A.sum()
    for layer, entries in enumerate(np.split(np.sort(most_used_of_each(uses, 2)), L)):
        best = sorted(range(E), key=lambda e: (-uses[layer, e], e))[:2]
        assert sorted(layer * E + e for e in best) == entries.tolist()


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ([4, 4], "2 numbers for 3 layers"),
        ([4, 4, 9], "from 0 to 8"),
        ([4, 4, 4.0], "whole number"),
        ([4, 4, 5], "together 13 experts, and the cache has 12"),
        ([4, 4, 3], "together 11 experts, and the cache has 12"),
    ],
)
def test_numbers_that_do_not_fit(slots, said):
    assert splits.given([2, 4, 6], [4] * 3, [1] * 3, 8) == (2, 4, 6)
    assert splits.given([2, 4, 3], [8, 12, 8], [2, 3, 2], 8) == (4, 12, 6)  # bytes may be left
    with pytest.raises(ConfigError, match=said):
        splits.given(slots, [4] * 3, [1] * 3, 8)
