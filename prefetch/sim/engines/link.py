"""The link, chunk by chunk: whose copy begins, in whose place, when it is there. Compiled per policy, for `timed`.

It knows no events: who is needed, and when, is told by `timed`. As it stands here it is LRU's.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from prefetch.sim.engines.keyed import filled, released, victim
from prefetch.sim.engines.machine import (
    ARRIVES,
    BESIDE,
    DONE,
    DROPPED,
    EVENT_IN_USE,
    EXPERT,
    FREE_NS,
    HEAD,
    ISSUED,
    LANDING_EXPERT,
    LANDING_LAYER,
    LANDING_NS,
    LAYER,
    LAYER_IN_USE,
    MOVED,
    N_BESIDE,
    PREFETCHED,
    QUEUED,
    SCORE,
    SPENT,
    TARGET,
    THERE_NS,
)
from prefetch.sim.engines.pool import EMPTY
from prefetch.sim.engines.storage import read_ahead, remember
from prefetch.sim.engines.transfers import CALLED, INLINED, choose, enter, hold, leave, move, pop
from prefetch.sim.policy import Seen
from prefetch.sim.workload import NEVER

# the engine: from here on


@njit(**INLINED)
def free(pool, group, slot):  # type: ignore[no-untyped-def]
    g, s = np.uint64(group), np.uint64(slot)
    pool.busy_GN[g, s] = pool.idle_GN[g, s]
    released(pool, group, slot)


@njit(**CALLED)
def shrink(pool, run, machine, group):  # type: ignore[no-untyped-def]
    """Until the cache holds no more than its room."""
    nobody = Seen(np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0))
    while pool.left_G[group] < 0:
        slot = victim(pool, group, nobody)
        if slot < 0:
            break
        leave(pool, run, machine, group, slot)


@njit(**INLINED)
def settle(pool, run, machine, group, layer, expert, seen):  # type: ignore[no-untyped-def]
    """Where it now stands, in the place of others; STAYS where nobody may leave for it."""
    while pool.left_G[group] < pool.size_L[np.uint64(layer)]:
        slot = np.int64(victim(pool, group, seen))
        if slot < 0:
            return slot
        leave(pool, run, machine, group, slot)
    slot = enter(pool, group, layer, expert)
    filled(pool, group, slot, seen)
    return slot


@njit(**INLINED)
def land(pool, run, until):  # type: ignore[no-untyped-def]
    """The copy whose last chunk is on its way has arrived by then; who is in use stays so until the event is over."""
    if run.link[LANDING_NS] <= until:
        run.link[LANDING_NS] = NEVER
        layer, expert = run.link[LANDING_LAYER], np.uint64(run.link[LANDING_EXPERT])
        slot = np.int64(pool.slot_LE[np.uint64(layer), expert])
        is_in_use = layer == run.link[LAYER_IN_USE]
        if slot >= 0 and not (is_in_use and run.in_use_E[expert] == run.link[EVENT_IN_USE]):
            free(pool, pool.group_L[np.uint64(layer)], slot)


@njit(**CALLED)
def start(pool, run, machine, guesses, first_event, step):  # type: ignore[no-untyped-def]
    """The head of the queue takes its place: in the cache, or beside it. False: it is not to be copied."""
    link, queue, n_layers = run.link, run.queue, len(pool.group_L)
    head = np.uint64(link[HEAD])
    layer, expert, target = queue[head, LAYER], queue[head, EXPERT], queue[head, TARGET]
    x, is_guess, size = np.uint64(layer), target < NEVER, machine.bytes_L[np.uint64(layer)]
    if pool.slot_LE[x, np.uint64(expert)] != EMPTY:  # came on demand meanwhile
        return False
    if is_guess and link[SPENT] + size > machine.budget_bytes:
        return False
    entry, is_limited = layer * pool.slot_LE.shape[1] + expert, machine.disk.room_bytes < NEVER
    if is_limited and run.memory[THERE_NS, entry] == NEVER:  # the host has forgotten it
        return False
    if is_guess and machine.landing > 0:
        place = link[N_BESIDE]
        run.beside[place, LAYER], run.beside[place, EXPERT] = layer, expert
        run.beside[place, TARGET], run.beside[place, ARRIVES] = target, NEVER
        pool.slot_LE[layer, expert] = BESIDE - place
        link[N_BESIDE] += 1
    else:
        group = pool.group_L[x]
        pool.clock[0] += 1
        meant_for = min(step + 1, target // n_layers)
        uses, coming = pool.uses_LE[layer, expert], run.coming_LE[layer, expert]
        seen = Seen(pool.clock[0], meant_for, entry, uses, coming, queue[head, SCORE])
        row, n_held = target - first_event, 0
        protects = machine.protects and 0 <= row < len(guesses.ids_VW)
        if protects and pool.left_G[group] < pool.size_L[x]:
            n_held = hold(row, layer, pool, run, guesses)
        slot = settle(pool, run, machine, group, layer, expert, seen)
        for i in range(n_held):
            free(pool, group, run.held_W[i])
        if slot < 0:
            return False
        run.ready_GN[group, slot], run.ahead_GN[group, slot] = NEVER, 1
    if is_limited:
        remember(entry, np.int64(0), run, machine)
    link[SPENT] += size if is_guess else 0
    run.counts[PREFETCHED] += 1
    return True


def _run_link(until, pool, run, machine, guesses, first_event, step, is_sorted):  # type: ignore[no-untyped-def]
    """Moves chunks of queued copies, as long as they begin before `until`. `is_sorted`: the head is always next."""
    link, queue, n_places = run.link, run.queue, machine.landing
    while True:
        begin, is_full = NEVER, n_places > 0 and link[N_BESIDE] == n_places
        if link[QUEUED] and ((is_sorted and not is_full) or choose(link, queue, is_full)):
            begin = max(link[FREE_NS], queue[np.uint64(link[HEAD]), ISSUED])
        if run.disk[QUEUED] and read_ahead(min(begin, until), run, machine):
            continue
        if begin >= until:
            break
        head = np.uint64(link[HEAD])
        layer, expert = queue[head, LAYER], queue[head, EXPERT]
        if queue[head, DONE] == 0:
            land(pool, run, begin)
            if not start(pool, run, machine, guesses, first_event, step):
                run.counts[DROPPED] += 1
                pop(run)
                continue
        if move(until, begin, layer, run, machine):
            group, slot = pool.group_L[layer], np.int64(pool.slot_LE[layer, expert])
            if slot >= 0:
                run.ready_GN[group, slot] = link[FREE_NS]
            else:
                run.beside[BESIDE - slot, ARRIVES] = link[FREE_NS]
            link[LANDING_NS], link[LANDING_LAYER] = link[FREE_NS], layer
            link[LANDING_EXPERT] = expert
            run.counts[MOVED] += machine.bytes_L[layer]
            pop(run)


def _unmark(now, layer, first, stop, ids_A, pool, run):  # type: ignore[no-untyped-def]
    """It is over; an upload that has just begun stays."""
    run.link[LAYER_IN_USE] = -1
    g, x = np.uint64(pool.group_L[np.uint64(layer)]), np.uint64(layer)
    for access in range(first, stop):
        slot = np.int64(pool.slot_LE[x, np.uint64(ids_A[np.uint64(access)])])
        if slot >= 0 and run.ready_GN[g, np.uint64(slot)] <= now:
            free(pool, np.int64(g), slot)


# where they are called in every event, and where they seldom are
run_link, run_link_seldom = njit(**INLINED)(_run_link), njit(**CALLED)(_run_link)
unmark, unmark_seldom = njit(**INLINED)(_unmark), njit(**CALLED)(_unmark)
