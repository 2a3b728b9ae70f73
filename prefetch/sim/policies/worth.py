"""Evicts whoever is worth least, in policies that keep a worth per expert of their own; ties like LRU.

It does not know what worth is: a policy's `told` says so, event by event, also of experts that are not here. A state
is some numbers, then per slot who is in it and when it was last used, then tables of a number per expert.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.sim.policy import STAYS, Seen, State

TABLES, SHARE, HEAD = 0, 1, 10  # tables of a number per expert, the first is the worth; settings
MILLION = 1_000_000


def filled(state: State, n_slots: int, slot: int, seen: Seen) -> None:
    state[HEAD + slot], state[HEAD + n_slots + slot] = seen.entry, seen.now


def used(state: State, n_slots: int, slot: int, is_new: bool, seen: Seen) -> None:
    state[HEAD + n_slots + slot] = seen.now


def victim(state: State, n_slots: int, busy_N: NDArray[np.int64], seen: Seen) -> int:
    n_entries, worth = n_entries_of(state, n_slots), HEAD + 2 * n_slots
    lowest, least, oldest = STAYS, np.int64(0), np.int64(0)
    for slot in range(n_slots):
        if busy_N[slot] == 0:
            value = state[worth + state[HEAD + slot] % n_entries]
            since = state[HEAD + n_slots + slot]
            if lowest == STAYS or value < least or (value == least and since < oldest):
                lowest, least, oldest = slot, value, since
    return lowest


@njit(cache=True)
def n_entries_of(state, n_slots):  # type: ignore[no-untyped-def]
    return (len(state) - HEAD - 2 * n_slots) // state[TABLES]


@njit(cache=True)
def table_of(state, n_slots, number, layer, n_experts):  # type: ignore[no-untyped-def]
    """Where the numbers of a layer's experts begin: a cache of one layer has one layer's."""
    n_entries = n_entries_of(state, n_slots)
    return HEAD + 2 * n_slots + number * n_entries + layer * n_experts % n_entries


@njit(cache=True)
def move_towards(state, n_slots, layer, row_E):  # type: ignore[no-untyped-def]
    """Every worth of the layer becomes SHARE of the row's, in millionths, and the rest of what it was."""
    at = table_of(state, n_slots, 0, layer, len(row_E))
    for expert in range(len(row_E)):
        was, now = state[at + expert], np.int64(row_E[expert]) * MILLION
        state[at + expert] = (state[SHARE] * now + (MILLION - state[SHARE]) * was) // MILLION
