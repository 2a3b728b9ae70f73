"""Stack kernels against simulators of one capacity that can be checked by eye, and the laws of Mattson and Belady."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.sim.limits.stacks import NEVER, LruStacks, OptimalStacks, first_uses, fit_eight

NOBODY = 65535
Events = NDArray[Any]  # [T, K]


def members(row_K: NDArray[Any]) -> list[int]:
    return [int(expert) for expert in row_K if expert != NOBODY]


def lru_hits(ids_TK: Events, capacity: int) -> list[int]:
    """Per event, one cache: a list with the most recent first."""
    cache: list[int] = []
    hits = []
    for row_K in ids_TK:
        event = members(row_K)
        hits.append(len(set(event) & set(cache)))
        for expert in event:
            cache = [expert, *(other for other in cache if other != expert)]
        cache = cache[:capacity]
    return hits


def belady_hits(ids_TK: Events, capacity: int) -> list[int]:
    """Per event, one cache that evicts whoever is needed last, members of the event excepted."""
    events = [set(members(row_K)) for row_K in ids_TK]
    cache: set[int] = set()
    hits = []
    for t, event in enumerate(events):
        hits.append(len(event & cache))
        cache |= event
        while len(cache) > capacity:
            cache.remove(max(cache - event, key=lambda x: next_use(events, t, x)))
    return hits


def next_use(events: list[set[int]], t: int, expert: int) -> int:
    return next(
        (later for later in range(t + 1, len(events)) if expert in events[later]), len(events)
    )


def most_hits(ids_TK: Events, capacity: int) -> int:
    """The optimum by trying every eviction: best hits for every possible content."""
    contents: dict[frozenset[int], int] = {frozenset(): 0}
    for row_K in ids_TK:
        event = frozenset(members(row_K))
        after: dict[frozenset[int], int] = {}
        for content, hits in contents.items():
            pool = content | event
            for leaving in combinations(sorted(pool - event), max(0, len(pool) - capacity)):
                kept = pool - set(leaving)
                after[kept] = max(after.get(kept, 0), hits + len(content & event))
        contents = after
    return max(contents.values())


@st.composite
def event_lists(
    draw: st.DrawFn, most_experts: int = 9, most_events: int = 40
) -> tuple[Events, int]:
    """Events of distinct experts in any order, some smaller than K or empty; and E."""
    n_experts = draw(st.integers(1, most_experts))
    top_k = draw(st.integers(1, n_experts))
    n_events = draw(st.integers(0, most_events))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    missing = draw(st.sampled_from([0.0, 0.3]))
    weights_E = rng.dirichlet(np.full(n_experts, draw(st.sampled_from([0.3, 5.0])))) + 1e-6
    rows = [
        rng.choice(n_experts, top_k, replace=False, p=weights_E / weights_E.sum())
        for _ in range(n_events)
    ]
    ids_TK = np.array(rows, np.uint16).reshape(n_events, top_k)
    ids_TK[rng.random(ids_TK.shape) < missing] = NOBODY
    return ids_TK, n_experts


def classes(ids_TK: Events) -> NDArray[np.uint8]:
    return (np.arange(len(ids_TK)) % 3 == 0).astype(np.uint8)


def cut(ids_TK: Events, cuts: Sequence[int]) -> list[slice]:
    at = sorted({0, len(ids_TK), *(c % (len(ids_TK) + 1) for c in cuts)})
    return [slice(a, b) for a, b in pairwise(at)]


def lru(ids_TK: Events, n_experts: int, cuts: Sequence[int] = ()) -> NDArray[np.int64]:
    stacks = LruStacks(1, n_experts, ids_TK.shape[1])
    for part in cut(ids_TK, cuts):
        stacks.replay(0, ids_TK[part], classes(ids_TK)[part], NOBODY)
    return stacks.hist_LCD[0]


def optimal(ids_TK: Events, n_experts: int, cuts: Sequence[int] = ()) -> NDArray[np.int64]:
    parts = cut(ids_TK, cuts)
    coming = [np.full(n_experts, NEVER, np.int32)]
    for part in reversed(parts):
        first_E = first_uses(ids_TK[part], n_experts, NOBODY)
        coming.append(np.where(first_E == NEVER, coming[-1], first_E + part.start))
    stacks = OptimalStacks(coming[-1][None])
    for b, part in enumerate(parts, start=1):
        where = {"first_event": part.start, "coming_E": coming[len(parts) - b]}
        stacks.replay(0, ids_TK[part], classes(ids_TK)[part], NOBODY, **where)
    return stacks.hist_LCD[0]


def optimal_of_layers(
    ids_LTK: Events, n_experts: int, cuts: Sequence[int], eights: Sequence[bool]
) -> NDArray[np.int64]:
    """Every part either eight layers at a time or one by one, in turn."""
    parts = cut(ids_LTK[0], cuts)
    coming = [np.full((len(ids_LTK), n_experts), NEVER, np.int32)]
    for part in reversed(parts):
        first_LE = np.stack([first_uses(ids_TK[part], n_experts, NOBODY) for ids_TK in ids_LTK])
        coming.append(np.where(first_LE == NEVER, coming[-1], first_LE + part.start))
    stacks = OptimalStacks(coming[-1])
    for b, part in enumerate(parts):
        ids, class_T, after_LE = ids_LTK[:, part], classes(ids_LTK[0])[part], coming[-2 - b]
        told = class_T, NOBODY
        if eights[b % len(eights)] and fit_eight(ids, NOBODY):
            stacks.replay_eight(0, ids, *told, first_event=part.start, coming_LE=after_LE)
            continue
        for layer in range(len(ids_LTK)):
            where = {"first_event": part.start, "coming_E": after_LE[layer]}
            stacks.replay(layer, ids[layer], *told, **where)
    return stacks.hist_LCD


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_eight_layers_at_a_time_are_as_one_by_one(
    seed: int, n_layers: int, k: int, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    n_experts, n_events = int(rng.integers(k, 3 * k + 4)), int(rng.integers(0, 60))
    sets = [rng.permutation(n_experts)[:k] for _ in range(n_layers * n_events)]
    ids_LTK = np.array(sets, np.uint16).reshape(n_layers, n_events, k)
    if rng.random() < 0.2:
        ids_LTK[rng.random(ids_LTK.shape) < 0.1] = NOBODY
    cuts = data.draw(st.lists(st.integers(0, 60), max_size=3))
    one_by_one = optimal_of_layers(ids_LTK, n_experts, cuts, [False])
    for eights in ([True], [True, False], [False, True]):
        np.testing.assert_array_equal(
            optimal_of_layers(ids_LTK, n_experts, cuts, eights), one_by_one
        )


def hits_at(hist_CD: NDArray[np.int64], capacity: int) -> list[int]:
    """Per class."""
    return hist_CD[:, :capacity].sum(axis=1).tolist()


def by_class(hits_T: list[int], ids_TK: Events) -> list[int]:
    return [int(np.array(hits_T, int)[classes(ids_TK) == c].sum()) for c in (0, 1)]


@settings(deadline=None)
@given(event_lists())
def test_every_capacity_equals_a_cache_of_that_capacity(given_events: tuple[Events, int]) -> None:
    ids_TK, n_experts = given_events
    lru_CD, optimal_CD = lru(ids_TK, n_experts), optimal(ids_TK, n_experts)
    for capacity in range(ids_TK.shape[1], n_experts + 1):
        assert hits_at(lru_CD, capacity) == by_class(lru_hits(ids_TK, capacity), ids_TK)
        assert hits_at(optimal_CD, capacity) == by_class(belady_hits(ids_TK, capacity), ids_TK)


@settings(deadline=None)
@given(event_lists(most_experts=5, most_events=8))
def test_nothing_hits_more_than_the_optimum(given_events: tuple[Events, int]) -> None:
    ids_TK, n_experts = given_events
    hist_CD = optimal(ids_TK, n_experts)
    for capacity in range(ids_TK.shape[1], n_experts + 1):
        assert sum(hits_at(hist_CD, capacity)) == most_hits(ids_TK, capacity)


@settings(deadline=None)
@given(event_lists())
def test_laws_of_the_curves(given_events: tuple[Events, int]) -> None:
    """The optimum is never under LRU; with room for all, only first uses miss; every access is counted once."""
    ids_TK, n_experts = given_events
    accesses, distinct = int((ids_TK != NOBODY).sum()), len(set(members(ids_TK.ravel())))
    lru_D, optimal_D = (f(ids_TK, n_experts).sum(axis=0) for f in (lru, optimal))
    for hist_D in (lru_D, optimal_D):
        assert (hist_D >= 0).all()
        assert hist_D.sum() == accesses
        assert hist_D[n_experts] == distinct
    least = ids_TK.shape[1]
    assert (optimal_D.cumsum() >= lru_D.cumsum())[least - 1 :].all()


@settings(deadline=None)
@given(event_lists(), st.lists(st.integers(0, 40), max_size=6), st.integers(0, 99))
def test_neither_cuts_nor_names_matter(
    given_events: tuple[Events, int], cuts: list[int], seed: int
) -> None:
    ids_TK, n_experts = given_events
    names = np.append(np.random.default_rng(seed).permutation(n_experts), NOBODY).astype(np.uint16)
    renamed_TK = names[np.minimum(ids_TK, n_experts)]
    for curve in (lru, optimal):
        expected_CD = curve(ids_TK, n_experts)
        assert np.array_equal(curve(ids_TK, n_experts, cuts), expected_CD)
        assert np.array_equal(curve(renamed_TK, n_experts), expected_CD)


@settings(deadline=None)
@given(event_lists(), st.lists(st.integers(0, 40), min_size=2, max_size=4), st.booleans())
def test_merged_parts_equal_the_whole(
    given_events: tuple[Events, int], cuts: list[int], from_the_right: bool
) -> None:
    """Distances, and what a part that comes after the merge will find."""
    ids_TK, n_experts = given_events
    class_T = classes(ids_TK)
    parts = []
    for part in cut(ids_TK, cuts):
        stacks = LruStacks(1, n_experts, ids_TK.shape[1])
        stacks.replay(0, ids_TK[part], class_T[part], NOBODY)
        parts.append(stacks)
    while len(parts) > 1:
        at = len(parts) - 2 if from_the_right else 0
        parts[at].merge(parts.pop(at + 1))
    merged = parts[0] if parts else LruStacks(1, n_experts, ids_TK.shape[1])
    assert np.array_equal(merged.hist_LCD[0], lru(ids_TK, n_experts))
    merged.replay(0, ids_TK[::-1].copy(), class_T, NOBODY)
    whole = LruStacks(1, n_experts, ids_TK.shape[1])
    for events_TK in (ids_TK, ids_TK[::-1].copy()):
        whole.replay(0, events_TK, class_T, NOBODY)
    assert np.array_equal(merged.hist_LCD, whole.hist_LCD)


@pytest.mark.parametrize(
    ("n_experts", "top_k"), [(20, 8), (24, 9), (40, 17), (64, 1), (255, 4), (257, 6), (300, 8)]
)
def test_twins_where_vectors_end(n_experts: int, top_k: int) -> None:
    """One member over a sweep, one expert over a line of ranks, the last of one byte."""
    rng = np.random.default_rng(n_experts)
    rows = [rng.choice(n_experts, top_k, replace=False) for _ in range(1500 // top_k)]
    ids_TK = np.array(rows, np.uint16)
    lru_CD, optimal_CD = lru(ids_TK, n_experts), optimal(ids_TK, n_experts, [7, 70])
    for capacity in {top_k, top_k + 1, n_experts // 2, n_experts - 1, n_experts}:
        if capacity >= top_k:
            assert hits_at(lru_CD, capacity) == by_class(lru_hits(ids_TK, capacity), ids_TK)
            assert hits_at(optimal_CD, capacity) == by_class(belady_hits(ids_TK, capacity), ids_TK)


def test_many_experts() -> None:
    """The largest model that a card can name."""
    ids_TK = np.array([[0, 65533, 9], [65534, 1, 65533], [9, 0, 2]], np.uint16)
    for curve in (lru, optimal):
        hist_D = curve(ids_TK, 65535).sum(axis=0)
        assert hist_D[:5].sum() == 3
        assert hist_D[-1] == 6


def test_disjoint_groups_never_hit_a_cache_of_one_group() -> None:
    ids_TK = np.tile(np.arange(12, dtype=np.uint16).reshape(3, 4), (50, 1))
    assert hits_at(lru(ids_TK, 12), 8) == [0, 0]
    assert hits_at(optimal(ids_TK, 12), 4) == [0, 0]
    # of 12 experts in turn, 8 slots keep one group of 4 for the next round, every second time
    assert sum(hits_at(optimal(ids_TK, 12), 8)) == sum(belady_hits(ids_TK, 8)) > 0


def test_sticky_uniform_chain_in_closed_form() -> None:
    """A group that stays with probability p, else is drawn anew: LRU hits p + (1 - p) C / E."""
    n_experts, top_k, stay, rng = 16, 4, 0.4, np.random.default_rng(5)
    stays_T = rng.random(40_000) < stay
    groups_TK = rng.permuted(np.tile(np.arange(n_experts), (len(stays_T), 1)), axis=1)[:, :top_k]
    drawn_T = np.maximum.accumulate(np.where(stays_T, 0, np.arange(len(stays_T))))
    ids_TK = groups_TK[drawn_T].astype(np.uint16)
    rates_D = lru(ids_TK, n_experts).sum(axis=0).cumsum() / ids_TK.size
    for capacity in range(top_k, n_experts + 1):
        # 40,000 groups: four standard errors of a share are .01
        expected = stay + (1 - stay) * capacity / n_experts
        assert rates_D[capacity - 1] == pytest.approx(expected, abs=0.01)


def test_an_expert_named_twice_is_refused() -> None:
    for row in ([3, 3, 1], [0, 5, 0]):
        ids_TK = np.array([[0, 1, 2], row], np.uint16)
        for curve in (lru, optimal):
            with pytest.raises(FormatError, match="distinct"):
                curve(ids_TK, 6)
    wide_TK = np.array([[*range(12), 0]], np.uint16)  # its two places lie in different sweeps
    with pytest.raises(FormatError, match="distinct"):
        lru(wide_TK, 13)


def test_events_that_the_first_pass_has_not_seen_are_refused() -> None:
    """Else members would be looked for in vain, and the stack would outgrow its array."""
    ids_TK, never_E = np.array([[0, 1], [2, 3]], np.uint16), np.full(6, NEVER, np.int32)
    stacks = OptimalStacks(np.array([[0, 0, 1, 1, NEVER, NEVER]], np.int32))
    for other_TK in (ids_TK[::-1].copy(), ids_TK[:1], ids_TK + 1):
        with pytest.raises(ValueError, match="first pass"):
            stacks.replay(0, other_TK, classes(other_TK), NOBODY, first_event=0, coming_E=never_E)
    stacks.replay(0, ids_TK, classes(ids_TK), NOBODY, first_event=0, coming_E=never_E)
    with pytest.raises(ValueError, match="first pass"):
        stacks.replay(0, ids_TK, classes(ids_TK), NOBODY, first_event=2, coming_E=never_E)
    assert stacks.hist_LCD.sum() == 4
