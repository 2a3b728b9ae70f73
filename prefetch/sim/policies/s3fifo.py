"""Three queues: newcomers wait in a small one, those used again go on to the main one, those evicted are remembered.

S3-FIFO (Yang, Zhang, Qiu, Yue and Rashmi, SOSP 2023), with its authors' sizes: a tenth of the cache for newcomers,
memory of nine tenths of it, two more uses to go on. Before anybody was evicted, newcomers that the small queue has no
room for go to the main one. Slots that are busy are passed over, and keep their places.
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
    QUEUE,
    SLOT,
    drop,
    empty,
    join,
    node_of,
    put,
    settle,
    take,
)
from prefetch.sim.policy import STAYS, Rules, Seen, State, StateRules

SMALL, MAIN, GHOST = 0, 3, 6  # queues, see `rings`
SMALL_ROOM, MAIN_ROOM, GHOST_ROOM, HAS_EVICTED, NODES = 9, 10, 11, 12, 13
USES, WIDE = 4, 5  # of a node
REMEMBERED = -2  # instead of a queue: came back just now
TO_GO_ON, MOST_USES = 2, 3


def state_size(n_slots: int, n_entries: int) -> int:
    return NODES + WIDE * n_entries + n_slots


def start(state: State, capacity: int) -> None:
    empty(state, 3, NODES, WIDE)
    state[SMALL_ROOM] = max(1, capacity // 10)
    state[MAIN_ROOM] = capacity - state[SMALL_ROOM]
    state[GHOST_ROOM] = capacity * 9 // 10


def filled(state: State, n_slots: int, slot: int, seen: Seen) -> None:
    node = node_of(state, n_slots, seen.entry, NODES, WIDE)
    settle(state, n_slots, slot, node, NODES)
    _recall(state, node)
    is_full = state[SMALL + LENGTH] >= state[SMALL_ROOM]
    if state[node + QUEUE] == REMEMBERED or (is_full and state[HAS_EVICTED] == 0):
        join(state, MAIN, node)
    else:
        join(state, SMALL, node)
    state[node + USES] = 0


def used(state: State, n_slots: int, slot: int, is_new: bool, seen: Seen) -> None:
    if not is_new:
        state[node_of(state, n_slots, seen.entry, NODES, WIDE) + USES] += 1


def victim(state: State, n_slots: int, busy_N: NDArray[np.int64], seen: Seen) -> int:
    if seen.now > 0:
        _recall(state, node_of(state, n_slots, seen.entry, NODES, WIDE))
    state[HAS_EVICTED] = 1
    if state[MAIN + LENGTH] > state[MAIN_ROOM]:
        slot = _from_main(state, busy_N)
        if slot != STAYS:
            return slot
    slot = _from_small(state, busy_N)
    if slot != STAYS:
        return slot
    return _from_main(state, busy_N)


@njit(cache=True)
def _recall(state, node):  # type: ignore[no-untyped-def]
    """Who is remembered leaves the memory before anybody else joins it."""
    if state[node + QUEUE] == GHOST:
        drop(state, node)
        state[node + QUEUE] = REMEMBERED


@njit(cache=True)
def _from_small(state, busy_N):  # type: ignore[no-untyped-def]
    node = state[SMALL + NEWER]
    while node != SMALL:
        newer = state[node + NEWER]
        if busy_N[state[node + SLOT]] == 0:
            drop(state, node)
            if state[node + USES] < TO_GO_ON:
                _remember(state, node)
                return state[node + SLOT]
            join(state, MAIN, node)
            state[node + USES] = 0
        node = newer
    return STAYS


@njit(cache=True)
def _from_main(state, busy_N):  # type: ignore[no-untyped-def]
    node = state[MAIN + NEWER]
    while node != MAIN:
        newer = state[node + NEWER]
        if busy_N[state[node + SLOT]] == 0:
            if state[node + USES] == 0:
                drop(state, node)
                return state[node + SLOT]
            state[node + USES] = min(state[node + USES], MOST_USES) - 1
            take(state, node)
            put(state, MAIN, node)
            if newer == MAIN:  # it was the newest and is again
                newer = node
        node = newer
    return STAYS


@njit(cache=True)
def _remember(state, node):  # type: ignore[no-untyped-def]
    if state[GHOST_ROOM] == 0:
        return
    while state[GHOST + LENGTH] >= state[GHOST_ROOM]:
        drop(state, state[GHOST + NEWER])
    join(state, GHOST, node)


@dataclass(frozen=True)
class S3Fifo:
    needs: ClassVar[tuple[str, ...]] = ()
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = StateRules(state_size, start, filled, used, victim)
