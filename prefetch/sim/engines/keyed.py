"""Rules of a policy that is a key: one number per slot, and whoever has the lowest leaves.

Compiled beside a policy's `on_fill` and `on_use` (see `compiled`); as it stands here it is LRU. Caches of many slots
keep, per block of slots, a number that no key in it is below: a victim is looked for only where it may be. Indices are
unsigned, because a signed one is checked for counting from the end.
G caches, N slots, M = N keys and N / BLOCK bounds.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from prefetch.sim.policies import lru as policy
from prefetch.sim.policy import BLOCK, BUSY, FEW, STAYS, UNCOUNTED

lru_fill, lru_use = njit(inline="always")(policy.on_fill), njit(inline="always")(policy.on_use)


@njit(inline="always")
def on_fill(kind, seen):  # type: ignore[no-untyped-def]
    return lru_fill(seen)


@njit(inline="always")
def on_use(kind, key, seen):  # type: ignore[no-untyped-def]
    return lru_use(key, seen)


# rules of the policy: from here on


@njit(inline="always")
def filled(pool, group, slot, seen):  # type: ignore[no-untyped-def]
    pool.state_GM[np.uint64(group), np.uint64(slot)] = on_fill(pool.kind, seen)


@njit(inline="always")
def used(pool, group, slot, is_new, seen):  # type: ignore[no-untyped-def]
    g, s = np.uint64(group), np.uint64(slot)
    pool.state_GM[g, s] = on_use(pool.kind, pool.state_GM[g, s], seen)


@njit(inline="always")
def released(pool, group, slot):  # type: ignore[no-untyped-def]
    """May be evicted from now on."""
    state_GM, n_slots = pool.state_GM, pool.busy_GN.shape[1]
    if n_slots > FEW:
        g, s, bound = np.uint64(group), np.uint64(slot), np.uint64(n_slots + slot // BLOCK)
        state_GM[g, bound] = min(state_GM[g, bound], state_GM[g, s])


@njit(inline="always")
def victim(pool, group, seen):  # type: ignore[no-untyped-def]
    state_GM, busy_GN, n_slots = pool.state_GM, pool.busy_GN, pool.busy_GN.shape[1]
    if n_slots > FEW:
        return _lowest_of_many(state_GM, np.uint64(group), n_slots, busy_GN)
    lowest = _lowest(state_GM, busy_GN, np.uint64(group), 0, n_slots)
    if lowest == BUSY:
        return STAYS
    g = np.uint64(group)
    for slot in range(n_slots):
        if (state_GM[g, np.uint64(slot)] | busy_GN[g, np.uint64(slot)]) == lowest:
            return slot
    return STAYS


@njit(inline="always")
def tell(told, pool, v, event):  # type: ignore[no-untyped-def]
    pass  # a key is told of an expert only, when it is used


@njit(**UNCOUNTED)
def _lowest_of_many(state_GM, group, n_slots, busy_GN):  # type: ignore[no-untyped-def]
    n_blocks = (n_slots + BLOCK - 1) // BLOCK
    while True:
        bound, block = BUSY, n_blocks
        for b in range(n_blocks):
            bound = min(bound, state_GM[group, np.uint64(n_slots + b)])
        if bound == BUSY:
            return STAYS
        for b in range(n_blocks):
            is_it = state_GM[group, np.uint64(n_slots + b)] == bound
            block = min(block, b if is_it else n_blocks)
        begin, end = block * BLOCK, min(block * BLOCK + BLOCK, n_slots)
        lowest = _lowest(state_GM, busy_GN, group, begin, end)
        state_GM[group, np.uint64(n_slots + block)] = lowest
        if lowest == bound:  # what was promised is there
            return _first(state_GM, busy_GN, group, begin, end, lowest)


@njit(inline="always")
def _lowest(state_GM, busy_GN, group, begin, end):  # type: ignore[no-untyped-def]
    lowest = BUSY
    for slot in range(begin, end):
        s = np.uint64(slot)
        lowest = min(lowest, state_GM[group, s] | busy_GN[group, s])
    return lowest


@njit(inline="always")
def _first(state_GM, busy_GN, group, begin, end, lowest):  # type: ignore[no-untyped-def]
    """Looks at all: without a way out, several slots are compared in one instruction."""
    first = end
    for slot in range(begin, end):
        s = np.uint64(slot)
        is_it = (state_GM[group, s] | busy_GN[group, s]) == lowest
        first = min(first, slot if is_it else end)
    return first
