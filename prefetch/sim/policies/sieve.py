"""Evicts the first that was not used again, by a hand that goes from old to new and stays where it evicts.

SIEVE (Zhang, Yang, Yue, Vigfusson and Rashmi, NSDI 2024). Nobody moves: who is used is marked, whom the hand passes is
not marked any more. The hand passes slots that are busy, and leaves their mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.sim.policies.rings import NEWER, OLDER, put, take
from prefetch.sim.policy import STAYS, Rules, Seen, State, StateRules

RING, HAND, NODES = (
    0,
    2,
    3,
)  # the ring of slots; the node to look at next, or the ring for the oldest
MARK, WIDE = 2, 3  # of a node: behind its two neighbours; numbers per slot


def state_size(n_slots: int, n_entries: int) -> int:
    return NODES + WIDE * n_slots


def start(state: State, capacity: int) -> None:
    """Zeros are an empty ring, and a hand at the oldest."""


def filled(state: State, n_slots: int, slot: int, seen: Seen) -> None:
    node = NODES + WIDE * slot
    if state[state[node + OLDER] + NEWER] == node:  # emptied by somebody else
        _leave(state, node)
    put(state, RING, node)
    state[node + MARK] = 0


def used(state: State, n_slots: int, slot: int, is_new: bool, seen: Seen) -> None:
    if not is_new:
        state[NODES + WIDE * slot + MARK] = 1


def victim(state: State, n_slots: int, busy_N: NDArray[np.int64], seen: Seen) -> int:
    node, rounds = state[HAND], 0
    while rounds < 3:  # the first clears marks from where the hand stands, the second those before
        if node == RING:
            rounds += 1
        else:
            slot = (node - NODES) // WIDE
            if busy_N[slot] == 0:
                if state[node + MARK] == 0:
                    state[HAND] = node
                    _leave(state, node)
                    return slot
                state[node + MARK] = 0
        node = state[node + NEWER]
    return STAYS


@njit(cache=True)
def _leave(state, node):  # type: ignore[no-untyped-def]
    if state[HAND] == node:
        state[HAND] = state[node + NEWER]
    take(state, node)


@dataclass(frozen=True)
class Sieve:
    needs: ClassVar[tuple[str, ...]] = ()
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = StateRules(state_size, start, filled, used, victim)
