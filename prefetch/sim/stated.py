"""Rules of a policy that keeps a state of its own, as the engines call them. Compiled beside it (see `compiled`)."""

from __future__ import annotations

import numpy as np
from numba import njit

from prefetch.sim.policies.sieve import filled as own_filled
from prefetch.sim.policies.sieve import used as own_used
from prefetch.sim.policies.sieve import victim as own_victim
from prefetch.sim.policy import ignore
from prefetch.sim.pool import FIRST, UNTOLD

own_told = njit(ignore)

# rules of the policy: from here on


@njit(inline="always")
def filled(state_GM, group, n_slots, slot, seen):  # type: ignore[no-untyped-def]
    own_filled(state_GM[group], n_slots, slot, seen)


@njit(inline="always")
def used(state_GM, group, n_slots, slot, is_new, seen):  # type: ignore[no-untyped-def]
    own_used(state_GM[group], n_slots, slot, is_new, seen)


@njit(inline="always")
def released(state_GM, group, n_slots, slot):  # type: ignore[no-untyped-def]
    pass


@njit(inline="always")
def victim(state_GM, group, n_slots, busy_GN, seen):  # type: ignore[no-untyped-def]
    return own_victim(state_GM[group], n_slots, busy_GN[group], seen)


@njit(inline="always")
def tell(told, state_GM, group_L, n_slots, v, event):  # type: ignore[no-untyped-def]
    """What is known with this event's routing: of a later layer, in the first layer also of those before that."""
    if len(told.kind_V):
        n_layers = len(group_L)
        step = event // n_layers
        layer = event - step * n_layers
        begin = 0 if layer == 0 else told.ahead
        for later in range(begin, min(told.ahead + 1, n_layers - layer)):
            kind = told.kind_V[v + later]
            if kind != UNTOLD:
                group = np.uint64(group_L[layer + later])
                row_E = told.row_VE[v + later]
                own_told(state_GM[group], n_slots, step, layer + later, row_E, kind == FIRST)
