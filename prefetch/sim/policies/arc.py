"""Shares the cache between those used once and those used again, and learns the share from whom it evicted too early.

ARC (Megiddo and Modha, FAST 2003), names as there: T1 and T2 are here, used once and more than once; B1 and B2 were
evicted from them; the target is T1's share, a fraction, held in small units of one slot. Slots that are busy are passed
over; where a list has no other, the other list gives one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.sim.policies.rings import NEWER, OLDER, put, take
from prefetch.sim.policy import STAYS, Rules, Seen, State, StateRules

# Lists, each a ring followed by its length; then two numbers; then a node per expert; then the node in every slot.
T1, T2, B1, B2, LENGTH = 0, 3, 6, 9, 2
ROOM, TARGET, NODES = 12, 13, 14
LIST, SLOT, WIDE = 2, 3, 4  # of a node, behind its neighbours
NOWHERE, FROM_B1, FROM_B2 = -1, -2, -3  # instead of a list; from: came back just now
UNIT = 2_329_089_562_800  # of the target, per slot: divided by anything up to 30 it is whole


def state_size(n_slots: int, n_entries: int) -> int:
    return NODES + WIDE * n_entries + n_slots


def start(state: State, capacity: int) -> None:
    for ring in (T1, T2, B1, B2):
        state[ring + OLDER], state[ring + NEWER] = ring, ring
    state[ROOM] = capacity
    state[NODES + LIST :: WIDE] = NOWHERE  # also of slots: below any node


def filled(state: State, n_slots: int, slot: int, seen: Seen) -> None:
    node = _node(state, n_slots, seen)
    before = state[len(state) - n_slots + slot]
    if before >= NODES and state[before + SLOT] == slot and _is_here(state, before):
        _drop(state, before)  # emptied by somebody else
    if _is_here(state, node):
        _drop(state, node)
    _adapt(state, node)
    _join(state, T1 if state[node + LIST] == NOWHERE else T2, node)
    state[node + SLOT], state[len(state) - n_slots + slot] = slot, node


def used(state: State, n_slots: int, slot: int, is_new: bool, seen: Seen) -> None:
    if not is_new:
        node = _node(state, n_slots, seen)
        _drop(state, node)
        _join(state, T2, node)


def victim(state: State, n_slots: int, busy_N: NDArray[np.int64], seen: Seen) -> int:
    came_from = np.int64(NOWHERE)
    if seen.now > 0:
        node = _node(state, n_slots, seen)
        _adapt(state, node)
        came_from = state[node + LIST]
    is_remembered = True
    if came_from == NOWHERE:
        is_remembered = _forget_one(state)
    n_once = UNIT * state[T1 + LENGTH]
    if n_once > state[TARGET] or (n_once == state[TARGET] and came_from == FROM_B2):
        return _evict(state, T1, T2, busy_N, is_remembered)
    return _evict(state, T2, T1, busy_N, is_remembered)


@njit(cache=True)
def _node(state, n_slots, seen):  # type: ignore[no-untyped-def]
    n_entries = (len(state) - n_slots - NODES) // WIDE
    return NODES + WIDE * (seen.entry % n_entries)


@njit(cache=True)
def _is_here(state, node):  # type: ignore[no-untyped-def]
    return state[node + LIST] == T1 or state[node + LIST] == T2


@njit(cache=True)
def _join(state, ring, node):  # type: ignore[no-untyped-def]
    put(state, ring, node)
    state[node + LIST] = ring
    state[ring + LENGTH] += 1


@njit(cache=True)
def _drop(state, node):  # type: ignore[no-untyped-def]
    take(state, node)
    state[state[node + LIST] + LENGTH] -= 1
    state[node + LIST] = NOWHERE


@njit(cache=True)
def _adapt(state, node):  # type: ignore[no-untyped-def]
    """Who comes back moves the target towards the list that should have kept it, once."""
    n_once, n_often = state[B1 + LENGTH], state[B2 + LENGTH]
    if state[node + LIST] == B1:
        state[TARGET] = min(UNIT * state[ROOM], state[TARGET] + max(UNIT, _ratio(n_often, n_once)))
        _drop(state, node)
        state[node + LIST] = FROM_B1
    elif state[node + LIST] == B2:
        state[TARGET] = max(0, state[TARGET] - max(UNIT, _ratio(n_once, n_often)))
        _drop(state, node)
        state[node + LIST] = FROM_B2


@njit(cache=True)
def _ratio(many, few):  # type: ignore[no-untyped-def]
    return (UNIT * many + few // 2) // few


@njit(cache=True)
def _forget_one(state):  # type: ignore[no-untyped-def]
    """A newcomer's place in the directory. False where T1 is all the cache: whom it evicts is not remembered."""
    n_once = state[T1 + LENGTH] + state[B1 + LENGTH]
    if n_once >= state[ROOM]:
        if state[B1 + LENGTH] == 0:
            return False
        _drop(state, state[B1 + NEWER])
    elif n_once + state[T2 + LENGTH] + state[B2 + LENGTH] >= 2 * state[ROOM] and state[B2 + LENGTH]:
        _drop(state, state[B2 + NEWER])
    return True


@njit(cache=True)
def _evict(state, ring, other, busy_N, is_remembered):  # type: ignore[no-untyped-def]
    for _ in range(2):
        node = state[ring + NEWER]
        while node != ring:
            if busy_N[state[node + SLOT]] == 0:
                _drop(state, node)
                if is_remembered:
                    _join(state, B1 if ring == T1 else B2, node)
                return state[node + SLOT]
            node = state[node + NEWER]
        ring, other = other, ring
    return STAYS


@dataclass(frozen=True)
class Arc:
    needs: ClassVar[tuple[str, ...]] = ()
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = StateRules(state_size, start, filled, used, victim)
