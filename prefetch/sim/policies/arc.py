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

from prefetch.sim.policies.rings import (
    LENGTH,
    NEWER,
    NOWHERE,
    QUEUE,
    SLOT,
    drop,
    empty,
    join,
    node_of,
    settle,
)
from prefetch.sim.policy import STAYS, Rules, Seen, State, StateRules

T1, T2, B1, B2 = 0, 3, 6, 9  # queues, see `rings`
ROOM, TARGET, NODES, WIDE = 12, 13, 14, 4
FROM_B1, FROM_B2 = -2, -3  # instead of a queue: came back just now
UNIT = 2_329_089_562_800  # of the target, per slot: divided by anything up to 30 it is whole


def state_size(n_slots: int, n_entries: int) -> int:
    return NODES + WIDE * n_entries + n_slots


def start(state: State, capacity: int) -> None:
    empty(state, 4, NODES, WIDE)
    state[ROOM] = capacity


def filled(state: State, n_slots: int, slot: int, seen: Seen) -> None:
    node = node_of(state, n_slots, seen.entry, NODES, WIDE)
    settle(state, n_slots, slot, node, NODES)
    _adapt(state, node)
    join(state, T1 if state[node + QUEUE] == NOWHERE else T2, node)


def used(state: State, n_slots: int, slot: int, is_new: bool, seen: Seen) -> None:
    if not is_new:
        node = node_of(state, n_slots, seen.entry, NODES, WIDE)
        drop(state, node)
        join(state, T2, node)


def victim(state: State, n_slots: int, busy_N: NDArray[np.int64], seen: Seen) -> int:
    came_from = np.int64(NOWHERE)
    if seen.now > 0:
        node = node_of(state, n_slots, seen.entry, NODES, WIDE)
        _adapt(state, node)
        came_from = state[node + QUEUE]
    is_remembered = True
    if came_from == NOWHERE:
        is_remembered = _forget_one(state)
    n_once = UNIT * state[T1 + LENGTH]
    if n_once > state[TARGET] or (n_once == state[TARGET] and came_from == FROM_B2):
        return _evict(state, T1, T2, busy_N, is_remembered)
    return _evict(state, T2, T1, busy_N, is_remembered)


@njit(cache=True)
def _adapt(state, node):  # type: ignore[no-untyped-def]
    """Who comes back moves the target towards the list that should have kept it, once."""
    n_once, n_often = state[B1 + LENGTH], state[B2 + LENGTH]
    if state[node + QUEUE] == B1:
        state[TARGET] = min(UNIT * state[ROOM], state[TARGET] + max(UNIT, _ratio(n_often, n_once)))
        drop(state, node)
        state[node + QUEUE] = FROM_B1
    elif state[node + QUEUE] == B2:
        state[TARGET] = max(0, state[TARGET] - max(UNIT, _ratio(n_once, n_often)))
        drop(state, node)
        state[node + QUEUE] = FROM_B2


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
        drop(state, state[B1 + NEWER])
    elif n_once + state[T2 + LENGTH] + state[B2 + LENGTH] >= 2 * state[ROOM] and state[B2 + LENGTH]:
        drop(state, state[B2 + NEWER])
    return True


@njit(cache=True)
def _evict(state, ring, other, busy_N, is_remembered):  # type: ignore[no-untyped-def]
    for _ in range(2):
        node = state[ring + NEWER]
        while node != ring:
            if busy_N[state[node + SLOT]] == 0:
                drop(state, node)
                if is_remembered:
                    join(state, B1 if ring == T1 else B2, node)
                return state[node + SLOT]
            node = state[node + NEWER]
        ring, other = other, ring
    return STAYS


@dataclass(frozen=True)
class Arc:
    needs: ClassVar[tuple[str, ...]] = ()
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = StateRules(state_size, start, filled, used, victim)
