"""What waits for the link, what is on it, and what lies beside the cache: the compiled timed engine's queue of copies.

It knows no policy: who leaves a cache is decided in `timed`. Small functions are put into their callers by LLVM
(`INLINED`): tuples of arrays cost more to hand over than most of them do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

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
    LAST_RANK,
    LAYER,
    LAYER_IN_USE,
    LINK,
    MOVED,
    N_BESIDE,
    QUEUED,
    RANK,
    SCORE,
    TARGET,
    THERE_NS,
    UNUSED,
    WASTED,
)
from prefetch.sim.engines.pool import EMPTY
from prefetch.sim.policy import BUSY, UNCOUNTED
from prefetch.sim.workload import NEVER

# What is divided by is never 0: no check. Wrappers that nobody calls take long to compile. numba hides these options.
ENTERED: dict[str, Any] = {"error_model": "numpy", "no_cfunc_wrapper": True, **UNCOUNTED}
CALLED: dict[str, Any] = {"no_cpython_wrapper": True, **ENTERED}
INLINED: dict[str, Any] = {"forceinline": True, **CALLED}


def _leave(pool, run, machine, group, slot):  # type: ignore[no-untyped-def]
    g, s, n_experts = np.uint64(group), np.uint64(slot), pool.slot_LE.shape[1]
    entry = pool.entry_GN[g, s]
    layer = entry // n_experts
    if run.ahead_GN[g, s]:
        run.ahead_GN[g, s] = 0
        run.counts[UNUSED] += 1
        run.counts[WASTED] += machine.bytes_L[layer]
    pool.slot_LE.reshape(-1)[np.uint64(entry)] = EMPTY
    pool.entry_GN[g, s] = EMPTY
    pool.busy_GN[g, s] = BUSY
    pool.left_G[g] += pool.size_L[layer]
    pool.free_GN[g, np.uint64(pool.n_free_G[g])] = slot
    pool.n_free_G[g] += 1


leave, leave_seldom = njit(**INLINED)(_leave), njit(**CALLED)(_leave)


@njit(**INLINED)
def enter(pool, group, layer, expert):  # type: ignore[no-untyped-def]
    g, entry = np.uint64(group), layer * pool.slot_LE.shape[1] + expert
    pool.n_free_G[g] -= 1
    slot = np.int64(pool.free_GN[g, np.uint64(pool.n_free_G[g])])
    pool.slot_LE.reshape(-1)[np.uint64(entry)] = slot
    pool.entry_GN[g, np.uint64(slot)] = entry
    pool.busy_GN[g, np.uint64(slot)] = BUSY
    pool.left_G[g] -= pool.size_L[layer]
    return slot


@njit(**INLINED)
def join(link, queue, layer, expert, target, issued, score, rank):  # type: ignore[no-untyped-def]
    """Behind the others. There is room: twice as long as what may wait, the queue is moved to its beginning in time."""
    if link[HEAD] + link[QUEUED] == len(queue):
        for i in range(link[QUEUED]):
            for field in range(RANK + 1):
                queue[i, field] = queue[link[HEAD] + i, field]
        link[HEAD] = 0
    at = np.uint64(link[HEAD] + link[QUEUED])
    queue[at, LAYER], queue[at, EXPERT], queue[at, TARGET] = layer, expert, target
    queue[at, ISSUED], queue[at, DONE] = issued, 0
    queue[at, SCORE], queue[at, RANK] = score, rank
    link[QUEUED] += 1


@njit(**INLINED)
def pop(run):  # type: ignore[no-untyped-def]
    """The head leaves the queue."""
    link, queue = run.link, run.queue
    head = np.uint64(link[HEAD])
    run.queued_LE[np.uint64(queue[head, LAYER]), np.uint64(queue[head, EXPERT])] = 0
    link[QUEUED] -= 1
    link[HEAD] = link[HEAD] + 1 if link[QUEUED] else 0


@njit(**CALLED)
def choose(link, queue, is_full):  # type: ignore[no-untyped-def]
    """Brings to the head who is next: who has begun, else the best of those that may begin first; False: nobody may.

    `is_full`: there is no place left beside the cache, where guesses wait for one.
    """
    first, end = link[HEAD], link[HEAD] + link[QUEUED]
    if first == end or queue[first, DONE]:
        return first < end
    earliest, best = NEVER, EMPTY
    for q in range(first, end):
        if not (is_full and queue[q, TARGET] < NEVER):
            earliest = min(earliest, queue[q, ISSUED])
    earliest = max(earliest, link[FREE_NS])
    for q in range(first, end):
        may = queue[q, ISSUED] <= earliest and not (is_full and queue[q, TARGET] < NEVER)
        if may and (best == EMPTY or queue[q, RANK] > queue[best, RANK]):
            best = q
    if best == EMPTY:
        return False
    for field in range(RANK + 1):
        chosen = queue[best, field]
        for q in range(best, first, -1):
            queue[q, field] = queue[q - 1, field]
        queue[first, field] = chosen
    return True


@njit(**INLINED)
def move(until, begin, layer, run, machine):  # type: ignore[no-untyped-def]
    """Chunks of the head, the first at `begin`, the others as long as they begin before `until`; whether it is over."""
    head, x = np.uint64(run.link[HEAD]), np.uint64(layer)
    done, n_chunks, free = run.queue[head, DONE], machine.n_chunks_L[x], begin
    while True:
        free += machine.chunk_ns_LX[x, np.uint64(done)]
        done += 1
        if done == n_chunks or free >= until:
            break
    run.queue[head, DONE] = done
    run.link[FREE_NS] = free
    run.counts[LINK] += free - begin
    return done == n_chunks


@njit(**INLINED)
def lands(layer, run):  # type: ignore[no-untyped-def]
    """The expert of this layer whose last chunk is on the link, or EMPTY."""
    link = run.link
    is_it = link[LANDING_NS] < NEVER and link[LANDING_LAYER] == layer
    return link[LANDING_EXPERT] if is_it else np.int64(EMPTY)


@njit(**INLINED)
def has_begun(layer, run):  # type: ignore[no-untyped-def]
    """The expert of this layer of which chunks are copied and chunks are missing, or EMPTY: the head of the queue."""
    head = np.uint64(run.link[HEAD])
    is_it = run.link[QUEUED] > 0 and run.queue[head, DONE] > 0 and run.queue[head, LAYER] == layer
    return run.queue[head, EXPERT] if is_it else np.int64(EMPTY)


@njit(**INLINED)
def promote(now, layer, slot, pool, run, machine):  # type: ignore[no-untyped-def]
    """A copy under way is needed: what is left of it goes before all others. When it will be there."""
    link, queue, group = run.link, run.queue, pool.group_L[layer]
    place, head = BESIDE - slot, link[HEAD]
    arrives = run.ready_GN[group, slot] if slot >= 0 else run.beside[place, ARRIVES]
    if arrives < NEVER:  # its last chunk is on the link
        link[LANDING_NS] = NEVER
        return arrives
    took = np.int64(0)
    for x in range(queue[head, DONE], machine.n_chunks_L[layer]):
        took += machine.chunk_ns_LX[layer, x]
    link[FREE_NS] = max(now, link[FREE_NS]) + took
    run.counts[LINK] += took
    run.counts[MOVED] += machine.bytes_L[layer]
    if slot >= 0:
        run.ready_GN[group, slot] = link[FREE_NS]
    else:
        run.beside[place, ARRIVES] = link[FREE_NS]
    pop(run)
    return link[FREE_NS]


@njit(**CALLED)
def take_aside(place, pool, run):  # type: ignore[no-untyped-def]
    """Whoever lies in this place beside the cache is there no more; the last takes the place. When it arrives."""
    beside, link = run.beside, run.link
    arrives = beside[place, ARRIVES]
    pool.slot_LE[beside[place, LAYER], beside[place, EXPERT]] = EMPTY
    link[N_BESIDE] -= 1
    if place < link[N_BESIDE]:
        for field in range(ARRIVES + 1):
            beside[place, field] = beside[link[N_BESIDE], field]
        pool.slot_LE[beside[place, LAYER], beside[place, EXPERT]] = BESIDE - place
    return arrives


@njit(**CALLED)
def discard(place, pool, run, machine):  # type: ignore[no-untyped-def]
    """Copied beside the cache for nothing."""
    layer = run.beside[place, LAYER]
    take_aside(place, pool, run)
    run.counts[UNUSED] += 1
    run.counts[WASTED] += machine.bytes_L[layer]


@njit(**CALLED)
def drop_beside(event, pool, run, machine):  # type: ignore[no-untyped-def]
    """What lies beside the cache and was meant for an event that did not ask for it; unless it is still copied."""
    place = run.link[N_BESIDE] - 1
    while place >= 0:
        if run.beside[place, TARGET] <= event and run.beside[place, ARRIVES] < NEVER:
            discard(place, pool, run, machine)
        place -= 1


@njit(**CALLED)
def give_up(at, pool, run, machine):  # type: ignore[no-untyped-def]
    """Chunks of it were copied for nothing, and it leaves the place that it had taken."""
    layer, expert = run.queue[at, LAYER], run.queue[at, EXPERT]
    moved = min(machine.bytes_L[layer], run.queue[at, DONE] * machine.chunk_bytes)
    run.counts[MOVED] += moved
    run.counts[WASTED] += moved - machine.bytes_L[layer]  # all of it is counted below
    slot = np.int64(pool.slot_LE[layer, expert])
    if slot >= 0:
        leave_seldom(pool, run, machine, pool.group_L[layer], slot)
    else:
        discard(BESIDE - slot, pool, run, machine)


@njit(**CALLED)
def drop_stale(event, pool, run, machine):  # type: ignore[no-untyped-def]
    """The routing of this event is known: what is queued for it is not needed, or is wanted at once."""
    link, queue = run.link, run.queue
    first, end = link[HEAD], link[HEAD] + link[QUEUED]
    kept = first
    for q in range(first, end):
        layer, expert = queue[q, LAYER], queue[q, EXPERT]
        if queue[q, TARGET] > event:
            if kept < q:
                for field in range(RANK + 1):
                    queue[kept, field] = queue[q, field]
            kept += 1
            continue
        run.queued_LE[layer, expert] = 0
        if queue[q, DONE] == 0:
            run.counts[DROPPED] += 1
            continue
        give_up(q, pool, run, machine)
    link[QUEUED] = kept - first
    if kept == first:
        link[HEAD] = 0


@njit(**CALLED)
def on_host(begin, work_ns, run, machine):  # type: ignore[no-untyped-def]
    """When the host has computed so much; copies that run meanwhile take their share of its memory."""
    copying = max(np.int64(0), run.link[FREE_NS] - begin)
    for q in range(run.link[HEAD], run.link[HEAD] + run.link[QUEUED]):
        for x in range(run.queue[q, DONE], machine.n_chunks_L[run.queue[q, LAYER]]):
            copying += machine.chunk_ns_LX[run.queue[q, LAYER], x]
    meanwhile = copying * machine.shared_per_1000 // 1000
    if work_ns <= meanwhile:
        return begin + -(-work_ns * 1000 // max(1, machine.shared_per_1000))
    return begin + copying + work_ns - meanwhile


@njit(**INLINED)
def hold(row, layer, pool, run, guesses):  # type: ignore[no-untyped-def]
    """Who is guessed for the same event and there is not pushed out by a guess: how many, in `held_W`."""
    g, x, n_held = np.uint64(pool.group_L[layer]), np.uint64(layer), 0
    for i in range(guesses.ids_VW.shape[1]):
        expert = guesses.ids_VW[np.uint64(row), np.uint64(i)]
        slot = pool.slot_LE[x, np.uint64(expert)] if expert != EMPTY else EMPTY
        if slot >= 0 and pool.busy_GN[g, np.uint64(slot)] == 0:
            pool.busy_GN[g, np.uint64(slot)] = BUSY
            run.held_W[n_held] = slot
            n_held += 1
    return n_held


@njit(**CALLED)
def upload(layer, expert, host, there_ns, run, machine):  # type: ignore[no-untyped-def]
    """An expert that the host computes is copied behind everything else, for its next use."""
    link, n_waiting = run.link, run.link[QUEUED] + run.disk[QUEUED]
    if n_waiting >= min(machine.uploads, len(run.queue) // 2) or run.queued_LE[layer, expert]:
        return host
    host += machine.issue_ns
    join(link, run.queue, layer, expert, NEVER, max(host, there_ns), 0, LAST_RANK)
    run.queued_LE[layer, expert] = 1
    return host


@njit(**INLINED)
def is_in_memory(layer, expert, run, machine):  # type: ignore[no-untyped-def]
    """Of the host, or will be when the chunk that is read has arrived."""
    entry = layer * run.queued_LE.shape[1] + expert
    return machine.disk.room_bytes == NEVER or run.memory[THERE_NS, entry] < NEVER


def _enqueue(target, host, first_event, guesses, pool, run, machine):  # type: ignore[no-untyped-def]
    """Guesses about an event join the queue, where they are neither there nor queued; the host's time after that."""
    host, row = host + machine.predict_ns, target - first_event
    layer = target % len(pool.group_L)
    if row < len(guesses.ids_VW):
        r, x = np.uint64(row), np.uint64(layer)
        places = len(run.queue) // 2 - run.link[QUEUED] - run.disk[QUEUED]
        for i in range(guesses.ids_VW.shape[1]):
            expert = np.int64(guesses.ids_VW[r, np.uint64(i)])
            if expert == EMPTY or places == 0:
                break
            e = np.uint64(expert)
            if pool.slot_LE[x, e] == EMPTY and run.queued_LE[x, e] == 0:
                host, places = host + machine.issue_ns, places - 1
                score = guesses.score_VW[r, np.uint64(i)]
                rank = score if machine.by_score else -target
                if is_in_memory(layer, expert, run, machine):
                    may = host
                    if machine.disk.room_bytes < NEVER:  # its last chunk may still be read
                        may = max(may, run.memory[THERE_NS, layer * len(run.brought_E) + expert])
                    join(run.link, run.queue, layer, expert, target, may, score, rank)
                else:
                    join(run.disk, run.reads, layer, expert, target, host, score, rank)
                run.queued_LE[x, e] = 1
    return host


def _mark(event, layer, first, stop, ids_A, pool, run):  # type: ignore[no-untyped-def]
    """Experts of an event are not pushed out as long as it runs."""
    run.link[LAYER_IN_USE], run.link[EVENT_IN_USE] = layer, event
    g, x = np.uint64(pool.group_L[np.uint64(layer)]), np.uint64(layer)
    for access in range(first, stop):
        expert = np.uint64(ids_A[np.uint64(access)])
        slot = np.int64(pool.slot_LE[x, expert])
        run.in_use_E[expert] = event
        if slot >= 0:
            pool.busy_GN[g, np.uint64(slot)] = BUSY


# where they are called in every event, and where they seldom are
mark, mark_seldom = njit(**INLINED)(_mark), njit(**CALLED)(_mark)
enqueue, enqueue_seldom = njit(**INLINED)(_enqueue), njit(**CALLED)(_enqueue)
