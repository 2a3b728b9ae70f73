"""Rules of a policy that keeps a state of its own, as the engines call them. Compiled beside it (see `compiled`)."""

from __future__ import annotations

import numpy as np
from numba import njit

from prefetch.sim.engines.pool import FIRST, UNTOLD
from prefetch.sim.policies import sieve


@njit(inline="always")
def own_filled(kind, state, n_slots, slot, seen):  # type: ignore[no-untyped-def]
    sieve.filled(state, n_slots, slot, seen)


@njit(inline="always")
def own_used(kind, state, n_slots, slot, is_new, seen):  # type: ignore[no-untyped-def]
    sieve.used(state, n_slots, slot, is_new, seen)


@njit(inline="always")
def own_victim(kind, state, n_slots, busy, seen):  # type: ignore[no-untyped-def]
    return sieve.victim(state, n_slots, busy, seen)


@njit(inline="always")
def own_told(kind, state, n_slots, step, layer, row, is_first):  # type: ignore[no-untyped-def]
    pass


# rules of the policy: from here on


@njit(inline="always")
def filled(pool, group, slot, seen):  # type: ignore[no-untyped-def]
    own_filled(pool.kind, pool.state_GM[group], pool.busy_GN.shape[1], slot, seen)


@njit(inline="always")
def used(pool, group, slot, is_new, seen):  # type: ignore[no-untyped-def]
    own_used(pool.kind, pool.state_GM[group], pool.busy_GN.shape[1], slot, is_new, seen)


@njit(inline="always")
def released(pool, group, slot):  # type: ignore[no-untyped-def]
    pass


@njit(inline="always")
def victim(pool, group, seen):  # type: ignore[no-untyped-def]
    n_slots = pool.busy_GN.shape[1]
    return own_victim(pool.kind, pool.state_GM[group], n_slots, pool.busy_GN[group], seen)


@njit(inline="always")
def tell(told, pool, v, event):  # type: ignore[no-untyped-def]
    """What is known with this event's routing: of a later layer, in the first layer also of those before that."""
    if len(told.kind_V):
        n_layers, n_slots = len(pool.group_L), pool.busy_GN.shape[1]
        step = event // n_layers
        layer = event - step * n_layers
        begin = 0 if layer == 0 else told.ahead
        for later in range(begin, min(told.ahead + 1, n_layers - layer)):
            kind = told.kind_V[v + later]
            if kind != UNTOLD:
                state = pool.state_GM[np.uint64(pool.group_L[layer + later])]
                row_E = told.row_VE[v + later]
                own_told(pool.kind, state, n_slots, step, layer + later, row_E, kind == FIRST)
