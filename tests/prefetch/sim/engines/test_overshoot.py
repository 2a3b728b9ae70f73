"""What is held beyond the room is what the plain replay holds."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.sim.engines.machine import WAIT
from prefetch.sim.engines.overshoot import held_beyond
from prefetch.sim.engines.pool import OVERSHOOT
from prefetch.sim.engines.reference import Cache, Caches
from prefetch.sim.engines.run import replay
from prefetch.sim.policies.lru import Lru
from prefetch.sim.tables.cell import Cell
from prefetch.sim.tables.rows import overshoot_bytes
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import machine_of
from tests.prefetch.sim.limits.test_bounds import budget_of


def watched(work, rooms, sizes) -> int:
    """The most that all caches of the plain replay hold together beyond their rooms."""
    caches, peak = Caches(work, Lru(), rooms, sizes, OVERSHOOT), 0
    fill = Cache.fill

    def looked(cache, *given):
        nonlocal peak
        fill(cache, *given)
        peak = max(peak, sum(max(0, -one.left) for one in caches.caches))

    Cache.fill = looked
    try:
        for event in range(len(work.start_V) - 1):
            step, layer = divmod(event, 3)
            accesses = range(work.start_V[event], work.start_V[event + 1])
            for wave in caches.waves(accesses, layer):
                caches.run(wave, step, layer)
    finally:
        Cache.fill = fill
    return peak


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([1, 4]), st.booleans(), st.booleans()
)
def test_it_is_what_the_plain_replay_holds(seed, room, batch, is_global, is_even):
    work = drawn(seed, batch=batch)
    sizes = [1, 1, 1] if is_even or is_global else [3, 2, 4]
    rooms = [3 * room] if is_global else [room * size for size in sizes]
    outcome_A = replay(work, Lru(), rooms, sizes, OVERSHOOT)
    every_S, empty_G = np.ones(work.n_steps, np.bool_), np.zeros(len(rooms), np.int64)
    beyond = held_beyond(work, outcome_A, rooms, sizes, empty_G, every_S)
    assert beyond == watched(work, rooms, sizes)


def test_only_who_makes_room_after_use_holds_more():
    work = drawn(3)
    cells = [
        Cell({}, Lru(), budget_of([3, 3, 3], [1, 1, 1]), machine_of(work, 3), semantics=semantics)
        for semantics in (0, OVERSHOOT)
    ]
    plain, over = (overshoot_bytes(cell, work, cell.run(work)) for cell in cells)
    largest, staging = int(cells[0].machine.bytes_L.max()), cells[0].machine.staging
    assert cells[0].machine.miss_way == WAIT and plain == 0
    assert over == max(0, watched(work, [3] * 3, [1] * 3) - staging) * largest > 0
