"""Which accesses hit: events, one after the other, through a cache with a policy. It knows no clock.

Compiled once per policy (see `compiled`); as it stands here it is LRU. `reference` says the same in plain Python.
Arrays are handed on one by one: an array that is taken out of a tuple within a loop is counted as used, each time.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from prefetch.sim.keyed import filled, released, used, victim
from prefetch.sim.policy import BUSY, Seen
from prefetch.sim.pool import AFTER_USE, ATOMIC, EMPTY, HIT, MISS, SEQUENTIAL

# the engine: from here on


@njit(cache=True, nogil=True)
def replay(events, pool, semantics, outcome_A):  # type: ignore[no-untyped-def]
    """Runs the next events; `outcome_A` says HIT or MISS of every access. The pool goes on from where it was."""
    ids_A, start_V, next_A, score_A = events.ids_A, events.start_V, events.next_A, events.score_A
    group_L, size_L, room_G, left_G = pool.group_L, pool.size_L, pool.room_G, pool.left_G
    slot_LE, entry_GN, busy_GN, state_GM = (
        pool.slot_LE,
        pool.entry_GN,
        pool.busy_GN,
        pool.state_GM,
    )
    free_GN, n_free_G, uses_LE, clock = pool.free_GN, pool.n_free_G, pool.uses_LE, pool.clock
    n_layers, n_experts = slot_LE.shape
    n_slots, order, wants_future = busy_GN.shape[1], np.empty(n_experts, np.int64), len(next_A) > 0
    wants_score, now, event = len(score_A) > 0, clock[0], clock[1]
    is_before = (
        semantics == ATOMIC or semantics == SEQUENTIAL
    )  # room is made before a load, or after the batch
    nobody = Seen(np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0))
    for v in range(len(start_V) - 1):
        first, n = start_V[v], start_V[v + 1] - start_V[v]
        step = event // n_layers
        layer = event - step * n_layers
        event += 1
        group, size = group_L[layer], size_L[layer]
        is_big, width = semantics == ATOMIC and n * size > room_G[group], max(1, n)
        if semantics == SEQUENTIAL:
            width = 1
        elif is_big:
            _hits_first(ids_A, first, n, slot_LE, layer, order)
            width = max(1, room_G[group] // size)
        for begin in range(0, n, width):
            end, n_missing = min(begin + width, n), 0
            for i in range(begin, end):
                a = order[i] if is_big else first + i
                is_here = slot_LE[layer, ids_A[a]] >= 0
                outcome_A[a] = HIT if is_here else MISS
                n_missing += not is_here
            if n_missing or not is_before:
                for i in range(begin, end):
                    slot = slot_LE[layer, ids_A[order[i] if is_big else first + i]]
                    if slot >= 0:
                        busy_GN[group, slot] = BUSY
            if n_missing:
                for i in range(begin, end):
                    a = order[i] if is_big else first + i
                    if outcome_A[a] == HIT:
                        continue
                    expert = ids_A[a]
                    coming = next_A[a] if wants_future else np.int64(0)
                    score = score_A[a] if wants_score else np.int64(0)
                    now += 1
                    entry = layer * n_experts + expert
                    seen = Seen(now, step, entry, uses_LE[layer, expert], coming, score)
                    while is_before and left_G[group] < size:
                        slot = victim(state_GM, group, n_slots, busy_GN, seen)
                        if slot < 0:
                            break
                        _leave(
                            entry_GN, slot_LE, busy_GN, left_G, size_L, free_GN, n_free_G, group, slot
                        )  # fmt: skip
                    if is_before and left_G[group] < size:
                        continue  # used and not kept
                    n_free_G[group] -= 1
                    slot = free_GN[group, n_free_G[group]]
                    slot_LE[layer, expert], entry_GN[group, slot] = slot, entry
                    busy_GN[group, slot] = BUSY
                    left_G[group] -= size
                    filled(state_GM, group, n_slots, slot, seen)
            for i in range(begin, end):
                a = order[i] if is_big else first + i
                expert = ids_A[a]
                uses_LE[layer, expert] += 1
                slot = slot_LE[layer, expert]
                if slot >= 0:
                    coming = next_A[a] if wants_future else np.int64(0)
                    score = score_A[a] if wants_score else np.int64(0)
                    now += 1
                    entry = layer * n_experts + expert
                    seen = Seen(now, step, entry, uses_LE[layer, expert], coming, score)
                    used(state_GM, group, n_slots, slot, outcome_A[a] == MISS, seen)
                    if semantics == AFTER_USE:
                        busy_GN[group, slot] = 0
                        released(state_GM, group, n_slots, slot)
            while left_G[group] < 0:
                slot = victim(state_GM, group, n_slots, busy_GN, nobody)
                if slot < 0:
                    break
                _leave(
                    entry_GN, slot_LE, busy_GN, left_G, size_L, free_GN, n_free_G, group, slot
                )  # fmt: skip
            for i in range(begin, end):
                slot = slot_LE[layer, ids_A[order[i] if is_big else first + i]]
                if slot >= 0:
                    busy_GN[group, slot] = 0
                    released(state_GM, group, n_slots, slot)
    clock[0], clock[1] = now, event


@njit(inline="always")
def _hits_first(ids_A, first, n, slot_LE, layer, order):  # type: ignore[no-untyped-def]
    """An event larger than its cache runs in waves: hits, then misses in their order, as many at a time as fit."""
    at = 0
    for wants_hit in range(1, -1, -1):
        for a in range(first, first + n):
            if (slot_LE[layer, ids_A[a]] >= 0) == (wants_hit == 1):
                order[at] = a
                at += 1


@njit(inline="always")
def _leave(entry_GN, slot_LE, busy_GN, left_G, size_L, free_GN, n_free_G, group, slot):  # type: ignore[no-untyped-def]
    n_experts = slot_LE.shape[1]
    entry = entry_GN[group, slot]
    layer = entry // n_experts
    slot_LE[layer, entry - layer * n_experts] = EMPTY
    entry_GN[group, slot] = EMPTY
    busy_GN[group, slot] = BUSY
    left_G[group] += size_L[layer]
    free_GN[group, n_free_G[group]] = slot
    n_free_G[group] += 1
