"""Rules of a policy that keeps a state of its own, as the engines call them. Compiled beside it (see `compiled`)."""

from __future__ import annotations

from numba import njit

from prefetch.sim.policies.sieve import filled as own_filled
from prefetch.sim.policies.sieve import used as own_used
from prefetch.sim.policies.sieve import victim as own_victim

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
