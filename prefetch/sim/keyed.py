"""Rules of a policy that is a key: one number per slot, and whoever has the lowest leaves.

Compiled beside a policy's `on_fill` and `on_use` (see `compiled`); as it stands here it is LRU. Caches of many slots
keep, per block of slots, a number that no key in it is below: a victim is looked for only where it may be.
G caches, N slots, M = N keys and N / BLOCK bounds.
"""

from __future__ import annotations

from numba import njit

from prefetch.sim.policies import lru as policy
from prefetch.sim.policy import BLOCK, BUSY, FEW, STAYS

on_fill, on_use = njit(inline="always")(policy.on_fill), njit(inline="always")(policy.on_use)
# rules of the policy: from here on


@njit(inline="always")
def filled(state_GM, group, n_slots, slot, seen):  # type: ignore[no-untyped-def]
    state_GM[group, slot] = on_fill(seen)


@njit(inline="always")
def used(state_GM, group, n_slots, slot, is_new, seen):  # type: ignore[no-untyped-def]
    state_GM[group, slot] = on_use(state_GM[group, slot], seen)


@njit(inline="always")
def released(state_GM, group, n_slots, slot):  # type: ignore[no-untyped-def]
    """May be evicted from now on."""
    if n_slots > FEW:
        at = n_slots + slot // BLOCK
        state_GM[group, at] = min(state_GM[group, at], state_GM[group, slot])


@njit(inline="always")
def victim(state_GM, group, n_slots, busy_GN, seen):  # type: ignore[no-untyped-def]
    if n_slots > FEW:
        return _lowest_of_many(state_GM, group, n_slots, busy_GN)
    lowest = BUSY
    for slot in range(n_slots):
        lowest = min(lowest, state_GM[group, slot] | busy_GN[group, slot])
    if lowest < BUSY:
        for slot in range(n_slots):
            if (state_GM[group, slot] | busy_GN[group, slot]) == lowest:
                return slot
    return STAYS


@njit
def _lowest_of_many(state_GM, group, n_slots, busy_GN):  # type: ignore[no-untyped-def]
    n_blocks = (n_slots + BLOCK - 1) // BLOCK
    while True:
        bound = BUSY
        for at in range(n_slots, n_slots + n_blocks):
            bound = min(bound, state_GM[group, at])
        if bound == BUSY:
            return STAYS
        block = 0
        while state_GM[group, n_slots + block] != bound:
            block += 1
        lowest, first = BUSY, block * BLOCK
        for slot in range(first, min(first + BLOCK, n_slots)):
            lowest = min(lowest, state_GM[group, slot] | busy_GN[group, slot])
        state_GM[group, n_slots + block] = lowest
        if lowest == bound:  # what was promised is there
            while (state_GM[group, first] | busy_GN[group, first]) != lowest:
                first += 1
            return first
