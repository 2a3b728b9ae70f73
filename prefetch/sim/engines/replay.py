"""Which accesses hit: events, one after the other, through a cache with a policy. It knows no clock.

Compiled once per policy (see `compiled`); as it stands here it is LRU. `reference` says the same in plain Python.
Three things make it fast: nothing is allocated, so that arrays need not be counted as used (`UNCOUNTED`); indices are
unsigned, since a signed one is checked for counting from the end; and an expert is found by its entry, layer * E +
expert, in flat arrays.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.sim.engines.keyed import filled, released, tell, used, victim
from prefetch.sim.engines.pool import ATOMIC, EMPTY, HIT, MISS, OVERSHOOT, SEQUENTIAL, Events, Pool
from prefetch.sim.policy import BUSY, UNCOUNTED, Seen

# the engine: from here on


def replay(events: Events, pool: Pool, semantics: int, outcome_A: NDArray[np.uint8]) -> None:
    """Runs the next events; `outcome_A` says HIT or MISS of every access. The pool goes on from where it was."""
    is_even, n_experts = bool((pool.size_L == pool.size_L[0]).all()), pool.slot_LE.shape[1]
    if semantics == SEQUENTIAL:
        one_by_one(events, pool, is_even, outcome_A)
        return
    order_I = np.arange(2 * n_experts)  # of an event's accesses: as they stand; room for hits first
    missing_I = np.empty(n_experts, np.int64)
    by_event(events, pool, semantics, is_even, outcome_A, order_I, missing_I)


@njit(cache=True, nogil=True, **UNCOUNTED)
def one_by_one(events, pool, is_even, outcome_A):  # type: ignore[no-untyped-def]
    """As if every access were an event of its own: nobody is busy when room is made."""
    ids_A, start_V, next_A, score_A = events.ids_A, events.start_V, events.next_A, events.score_A
    group_L, size_L, left_G = pool.group_L, pool.size_L, pool.left_G
    entry_GN, busy_GN = pool.entry_GN, pool.busy_GN
    free_GN, n_free_G, clock = pool.free_GN, pool.n_free_G, pool.clock
    slot_of, uses_of = pool.slot_LE.reshape(-1), pool.uses_LE.reshape(-1)
    n_layers, n_experts = pool.slot_LE.shape
    wants_future, wants_score = len(next_A) > 0, len(score_A) > 0
    now, event = clock[0], clock[1]
    step, layer = event // n_layers, event % n_layers - 1
    for v in range(len(start_V) - 1):
        layer += 1
        if layer == n_layers:
            step, layer = step + 1, np.int64(0)
        group, size = np.uint64(group_L[layer]), size_L[layer]
        tell(events.told, pool, v, step * n_layers + layer)
        for access in range(start_V[v], start_V[v + 1]):
            a = np.uint64(access)
            entry = layer * n_experts + ids_A[a]
            e = np.uint64(entry)
            coming = next_A[a] if wants_future else np.int64(0)
            score = score_A[a] if wants_score else np.int64(0)
            slot = np.int64(slot_of[e])
            is_new = slot < 0
            outcome_A[a] = MISS if is_new else HIT
            if is_new:
                now += 1
                seen = Seen(now, step, entry, uses_of[e], coming, score)
                while left_G[group] < size:
                    slot = np.int64(victim(pool, group, seen))
                    if slot < 0:
                        break
                    slot_of[entry_GN[group, np.uint64(slot)]] = EMPTY
                    if is_even:
                        break  # whoever comes takes the place as it is
                    _vacate(
                        entry_GN, busy_GN, left_G, size_L, free_GN, n_free_G, n_experts, group, slot
                    )
                    slot = np.int64(EMPTY)
                if slot < 0:
                    if left_G[group] < size:
                        uses_of[e] += 1
                        continue  # used and not kept
                    slot = _take_place(left_G, free_GN, n_free_G, group, size)
                    busy_GN[group, np.uint64(slot)] = 0
                slot_of[e], entry_GN[group, np.uint64(slot)] = slot, entry
                filled(pool, group, slot, seen)
            uses_of[e] += 1
            now += 1
            seen = Seen(now, step, entry, uses_of[e], coming, score)
            used(pool, group, slot, is_new, seen)
            released(pool, group, slot)
    clock[0], clock[1] = now, event + len(start_V) - 1


@njit(cache=True, nogil=True, **UNCOUNTED)
def by_event(events, pool, semantics, is_even, outcome_A, order_I, missing_I):  # type: ignore[no-untyped-def]
    """All of an event are looked up before any of them is loaded, and none of them leaves for another."""
    ids_A, start_V, next_A, score_A = events.ids_A, events.start_V, events.next_A, events.score_A
    group_L, size_L, room_G, left_G = pool.group_L, pool.size_L, pool.room_G, pool.left_G
    entry_GN, busy_GN = pool.entry_GN, pool.busy_GN
    free_GN, n_free_G, clock, idle_GN = pool.free_GN, pool.n_free_G, pool.clock, pool.idle_GN
    slot_of, uses_of = pool.slot_LE.reshape(-1), pool.uses_LE.reshape(-1)
    n_layers, n_experts = pool.slot_LE.shape
    wants_future, wants_score = len(next_A) > 0, len(score_A) > 0
    now, event, is_before = clock[0], clock[1], semantics == ATOMIC
    nobody = Seen(np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0))
    step, layer = event // n_layers, event % n_layers - 1
    for v in range(len(start_V) - 1):
        layer += 1
        if layer == n_layers:
            step, layer = step + 1, np.int64(0)
        first, n = start_V[v], start_V[v + 1] - start_V[v]
        group, size, base = np.uint64(group_L[layer]), size_L[layer], layer * n_experts
        tell(events.told, pool, v, step * n_layers + layer)
        shift, width = 0, max(1, n)
        if is_before and n * size > room_G[group]:
            _hits_first(ids_A, first, n, slot_of, base, order_I)
            shift, width = n_experts, max(1, room_G[group] // size)
        for begin in range(0, n, width):
            end, n_missing = min(begin + width, n), 0
            for i in range(begin, end):
                a = np.uint64(first + order_I[np.uint64(shift + i)])
                slot = np.int64(slot_of[np.uint64(base + ids_A[a])])
                outcome_A[a] = MISS if slot < 0 else HIT
                missing_I[np.uint64(n_missing)] = a
                n_missing += slot < 0
            is_pinned = n_missing > 0 or semantics == OVERSHOOT
            for i in range(begin, end if is_pinned else begin):
                a = np.uint64(first + order_I[np.uint64(shift + i)])
                slot = np.int64(slot_of[np.uint64(base + ids_A[a])])
                at = np.uint64(max(slot, 0))
                busy_GN[group, at] = busy_GN[group, at] if slot < 0 else BUSY
            for m in range(n_missing):
                a = np.uint64(missing_I[np.uint64(m)])
                entry = base + ids_A[a]
                e = np.uint64(entry)
                coming = next_A[a] if wants_future else np.int64(0)
                score = score_A[a] if wants_score else np.int64(0)
                now += 1
                seen = Seen(now, step, entry, uses_of[e], coming, score)
                slot = np.int64(EMPTY)
                while is_before and left_G[group] < size:
                    slot = np.int64(victim(pool, group, seen))
                    if slot < 0:
                        break
                    slot_of[entry_GN[group, np.uint64(slot)]] = EMPTY
                    busy_GN[group, np.uint64(slot)] = BUSY
                    if is_even:
                        break  # whoever comes takes the place as it is
                    _vacate(
                        entry_GN, busy_GN, left_G, size_L, free_GN, n_free_G, n_experts, group, slot
                    )
                    slot = np.int64(EMPTY)
                if slot < 0:
                    if is_before and left_G[group] < size:
                        continue  # used and not kept
                    slot = _take_place(left_G, free_GN, n_free_G, group, size)
                slot_of[e], entry_GN[group, np.uint64(slot)] = slot, entry
                filled(pool, group, slot, seen)
            for i in range(begin, end):
                a = np.uint64(first + order_I[np.uint64(shift + i)])
                entry = base + ids_A[a]
                e = np.uint64(entry)
                uses_of[e] += 1
                slot = np.int64(slot_of[e])
                if slot >= 0:
                    coming = next_A[a] if wants_future else np.int64(0)
                    score = score_A[a] if wants_score else np.int64(0)
                    now += 1
                    seen = Seen(now, step, entry, uses_of[e], coming, score)
                    used(pool, group, slot, outcome_A[a] == MISS, seen)
                    if semantics != OVERSHOOT:
                        busy_GN[group, np.uint64(slot)] = idle_GN[group, np.uint64(slot)]
                        released(pool, group, slot)
            while left_G[group] < 0:
                slot = np.int64(victim(pool, group, nobody))
                if slot < 0:
                    break
                slot_of[entry_GN[group, np.uint64(slot)]] = EMPTY
                _vacate(
                    entry_GN, busy_GN, left_G, size_L, free_GN, n_free_G, n_experts, group, slot
                )
            if semantics == OVERSHOOT:
                for i in range(begin, end):
                    slot = np.int64(slot_of[base + ids_A[first + order_I[shift + i]]])
                    if slot >= 0:
                        busy_GN[group, np.uint64(slot)] = idle_GN[group, np.uint64(slot)]
                        released(pool, group, slot)
    clock[0], clock[1] = now, event + len(start_V) - 1


@njit(inline="always")
def _hits_first(ids_A, first, n, slot_of, base, order_I):  # type: ignore[no-untyped-def]
    """An event larger than its cache runs in waves: hits, then misses in their order, as many at a time as fit."""
    at = len(order_I) // 2
    for wants_hit in range(1, -1, -1):
        for i in range(n):
            if (slot_of[base + ids_A[first + i]] >= 0) == (wants_hit == 1):
                order_I[at] = i
                at += 1


@njit(inline="always")
def _vacate(entry_GN, busy_GN, left_G, size_L, free_GN, n_free_G, n_experts, group, slot):  # type: ignore[no-untyped-def]
    left_G[group] += size_L[entry_GN[group, np.uint64(slot)] // n_experts]
    entry_GN[group, np.uint64(slot)] = EMPTY
    busy_GN[group, np.uint64(slot)] = BUSY
    free_GN[group, n_free_G[group]] = slot
    n_free_G[group] += 1


@njit(inline="always")
def _take_place(left_G, free_GN, n_free_G, group, size):  # type: ignore[no-untyped-def]
    left_G[group] -= size
    n_free_G[group] -= 1
    return np.int64(free_GN[group, n_free_G[group]])
