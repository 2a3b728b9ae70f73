"""The relaxation is what a linear program finds, and no choice of whole experts, found by trying all, loads less."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from prefetch.sim.engines.pool import MISS
from prefetch.sim.engines.run import replay
from prefetch.sim.engines.start import NOBODY, groups_of
from prefetch.sim.limits.relaxed import fewest
from prefetch.sim.policies.belady import Belady
from prefetch.sim.workload import Workload
from tests.prefetch.sim.engines.test_replay import drawn

Event = tuple[bool, frozenset[int]]  # whether its loads are free, and the entries that it needs


def events_of(work: Workload, is_own_L, is_free_S) -> list[Event]:
    """Those of one cache; an entry is layer * E + expert."""
    n_layers, n_experts = work.card.n_layers, work.card.n_experts
    return [
        (
            bool(is_free_S[v // n_layers]),
            frozenset(v % n_layers * n_experts + e for e in work.ids_A[start:stop].tolist()),
        )
        for v, (start, stop) in enumerate(zip(work.start_V[:-1], work.start_V[1:], strict=True))
        if is_own_L[v % n_layers]
    ]


def by_program(events: list[Event], warm: dict[int, int], size, room: int) -> int:
    """Of every use: how much was kept since the one before. After every event no more than the room is kept."""
    since = dict.fromkeys(warm, -1)  # the event after which there is something to keep
    total, gain, spans = 0, list[int](), list[range]()
    last_free = -2
    for v, (is_free, needed) in enumerate(events):
        if is_free:
            last_free, since = v, {}
            continue
        for entry in needed:
            total += size(entry)
            after = max(since.get(entry, -2), last_free)  # whoever is wanted is there after it
            if after > -2:
                gain.append(size(entry))
                spans.append(range(after, v))
            since[entry] = v
    if not gain:
        return total
    rows = [[v + 1 for v in span] for span in spans]
    starts = np.append(0, np.cumsum([len(row) for row in rows]))
    held = csr_matrix((np.repeat(gain, np.diff(starts)), np.concatenate(rows), starts))
    found = linprog(-np.array(gain), held.T, np.full(held.shape[1], room), bounds=(0, 1))
    return total + round(found.fun)


def by_trying(events: list[Event], warm: dict[int, int], size, room: int) -> int:
    """Whole experts: the fewest units for every content that there may be, event by event."""
    everybody = sorted({entry for _, needed in events for entry in needed} | set(warm))
    contents = [
        frozenset(some)
        for n in range(len(everybody) + 1)
        for some in combinations(everybody, n)
        if sum(map(size, some)) <= room
    ]
    costs = {frozenset(warm): 0}
    for is_free, needed in events:
        if is_free:
            costs = dict.fromkeys(contents, min(costs.values()))
            continue
        after = dict[frozenset[int], int]()
        for there, cost in costs.items():
            cost += sum(size(entry) for entry in needed - there)
            for kept in contents:
                if kept <= there | needed and cost < after.get(kept, 10**9):
                    after[kept] = cost
        costs = after
    return min(costs.values())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    room=st.integers(0, 12),
    batch=st.sampled_from([1, 2]),
    is_global=st.booleans(),
    sizes=st.sampled_from([[1, 1], [2, 3], [1, 4]]),
    phase=st.sampled_from(["auto", "decode"]),
    n_warm=st.integers(0, 3),
)
def test_the_relaxation_is_the_best_that_parts_of_experts_can_do(
    seed, room, batch, is_global, sizes, phase, n_warm
):
    """Also where steps are free, with caches that start warm, and with rooms that whole experts do not fill."""
    work = drawn(seed, n_tokens=14, n_layers=2, n_experts=3, top_k=2, batch=batch, phase=phase)
    rooms, is_free_S = [room] if is_global else [room, room // 2], ~work.is_decode_S
    warm = np.random.default_rng(seed).permutation(6)[:n_warm].astype(np.int64)
    found = fewest(work, rooms, sizes, warm, is_free_S)
    group_L = groups_of(2, len(rooms))
    for group, (units, own) in enumerate(zip(found.units_G.tolist(), rooms, strict=True)):
        events = events_of(work, group_L == group, is_free_S)
        there, left = dict[int, int](), own
        for entry in warm.tolist():  # in their order, as far as there is room
            each = sizes[entry // 3]
            if group_L[entry // 3] == group and each <= left:
                there[entry], left = each, left - each
        asked = (events, there, lambda entry: sizes[entry // 3], own)
        assert units == by_program(*asked) <= by_trying(*asked)
        if len({sizes[layer] for layer in np.flatnonzero(group_L == group)}) == 1:
            assert own % sizes[group] or units == by_trying(*asked)


def test_a_long_run_of_equal_sizes_is_beladys():
    for seed, caches in ((0, 1), (1, 3), (2, 3)):
        work = drawn(seed, n_tokens=600)
        n_layers = work.card.n_layers
        rooms = [5 * n_layers // caches] * caches
        found = fewest(work, rooms, [1] * n_layers, NOBODY, np.zeros(work.n_steps, np.bool_))
        is_miss_A = replay(work, Belady(), rooms, [1] * n_layers) == MISS
        assert found.missed == found.units_G.sum() == is_miss_A.sum() > 0
