"""What is where in a cache, as arrays: what the engines move and policies look at. It decides nothing.

L layers, E experts, G caches (one per layer, or one for all), N slots of a cache, M numbers of a policy's state.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.engines.shipped import kind_of
from prefetch.sim.policy import BLOCK, BUSY, KeyRules, Policy, settings_of

MISS, HIT, LATE = 0, 1, 2
ATOMIC, SEQUENTIAL, OVERSHOOT, AFTER_USE = 0, 1, 2, 3
UNTOLD, TOLD, FIRST = 0, 1, 2
EMPTY = -1


class Pool(NamedTuple):
    """What is where. Sizes are in units: 1 where capacity counts experts, else bytes."""

    group_L: NDArray[np.int64]  # the cache that a layer's experts go to
    size_L: NDArray[np.int64]
    room_G: NDArray[np.int64]  # units of every cache
    left_G: NDArray[np.int64]  # units that are free; below zero only while a batch overshoots
    slot_LE: NDArray[np.int32]
    entry_GN: NDArray[np.int64]  # layer * E + expert
    busy_GN: NDArray[np.int64]
    idle_GN: NDArray[np.int64]  # what a slot's `busy` goes back to: 0, or BUSY of whoever is pinned
    state_GM: NDArray[np.int64]
    free_GN: NDArray[np.int32]  # a stack of free slots, the lowest on top
    n_free_G: NDArray[np.int64]
    uses_LE: NDArray[np.int64]
    clock: NDArray[np.int64]  # [now, events so far]
    kind: int  # which of the policies that share an engine


class Told(NamedTuple):
    """What policies are told of events: a row over the experts of the layer, known `ahead` layers before the event.

    The rows of a step's first layers are known with its first one's routing. Without rows both arrays are empty.
    """

    row_VE: NDArray[np.int32]
    kind_V: NDArray[np.uint8]  # UNTOLD, TOLD, or FIRST: told, and the first of a sequence
    ahead: int


NOTHING_TOLD = Told(np.empty((0, 0), np.int32), np.empty(0, np.uint8), 0)


class Events(NamedTuple):
    """A run of whole events, where there are rows of whole steps; what the policy does not look at may be empty."""

    ids_A: NDArray[np.uint16]
    tokens_A: NDArray[np.int32]
    start_V: NDArray[np.int64]
    next_A: NDArray[np.int64]
    score_A: NDArray[np.int64]
    told: Told = NOTHING_TOLD


def pool_of(
    policy: Policy,
    room_G: NDArray[np.int64],
    size_L: NDArray[np.int64],
    n_experts: int,
    *,
    spare: int = 0,
) -> Pool:
    """Empty caches: one per layer, or one for all where `room_G` has one number. `spare`: slots for what overshoots."""
    n_layers, n_groups = len(size_L), len(room_G)
    group_L = np.arange(n_layers) if n_groups > 1 else np.zeros(n_layers, np.int64)
    smallest = np.array([size_L[group_L == g].min() for g in range(n_groups)])
    entries = np.bincount(group_L, minlength=n_groups) * n_experts
    slots_G = np.minimum(entries, room_G // smallest + spare)
    n_slots = max(1, int(slots_G.max()))
    is_slot_GN = np.arange(n_slots) < slots_G[:, None]
    rules = policy.rules
    if isinstance(rules, KeyRules):
        state_GM = np.zeros((n_groups, n_slots + n_slots // BLOCK + 1), np.int64)
        state_GM[:, n_slots:] = BUSY
    else:
        state_GM = np.zeros((n_groups, rules.state_size(n_slots, int(entries.max()))), np.int64)
        for g in range(n_groups):
            capacity = min(int(entries[g]), int(room_G[g] // smallest[g]))
            rules.start(state_GM[g], capacity, *settings_of(policy))
    free_GN = np.zeros((n_groups, n_slots), np.int32)
    for g, count in enumerate(slots_G.tolist()):
        free_GN[g, :count] = np.arange(count)[::-1]
    return Pool(
        group_L=group_L.astype(np.int64),
        size_L=size_L.astype(np.int64),
        room_G=room_G.astype(np.int64),
        left_G=room_G.astype(np.int64).copy(),
        slot_LE=np.full((n_layers, n_experts), EMPTY, np.int32),
        entry_GN=np.full((n_groups, n_slots), EMPTY, np.int64),
        busy_GN=np.full((n_groups, n_slots), BUSY, np.int64),
        idle_GN=np.zeros((n_groups, n_slots), np.int64),
        state_GM=state_GM,
        free_GN=free_GN,
        n_free_G=is_slot_GN.sum(axis=1).astype(np.int64),
        uses_LE=np.zeros((n_layers, n_experts), np.int64),
        clock=np.zeros(2, np.int64),
        kind=kind_of(rules),
    )
