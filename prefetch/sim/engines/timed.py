"""What a replay costs in time: the same events with a clock, a link, guesses that are copied ahead, and a host.

Whole nanoseconds on one clock. A step at a layer: the GPU runs what stands before the experts; routing is known;
experts that are there are computed, missing ones copied and computed in the order of their arrival. The link moves one
chunk at a time: a demand copy waits for the chunk in hand, never for a queued guess. Compiled per policy, like
`replay`, and fast for the same reasons; `timed_reference` says the same in plain Python.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from prefetch.sim.engines.keyed import filled, tell, used, victim
from prefetch.sim.engines.link import (
    free,
    land,
    run_link,
    run_link_seldom,
    shrink,
    unmark,
    unmark_seldom,
)
from prefetch.sim.engines.machine import (
    BESIDE,
    BOTH,
    BY_HOST,
    COMPUTE,
    DEMAND,
    DISK_STALL,
    DONE,
    DROPPED,
    FREE_NS,
    HEAD,
    HOST_STALL,
    LATE_STALL,
    LINK,
    MOVED,
    NOW,
    QUEUED,
    SPENT,
    STALL,
    TARGET,
    UNUSED,
    USED,
    WAIT,
    WASTED,
)
from prefetch.sim.engines.pool import AFTER_USE, ATOMIC, EMPTY, HIT, LATE, MISS, OVERSHOOT
from prefetch.sim.engines.storage import drop_reads, fetch, read_by, take_over
from prefetch.sim.engines.transfers import (
    ENTERED,
    drop_beside,
    drop_stale,
    enqueue,
    enqueue_seldom,
    enter,
    give_up,
    has_begun,
    lands,
    leave_seldom,
    mark,
    mark_seldom,
    on_host,
    pop,
    promote,
    take_aside,
    upload,
)
from prefetch.sim.policy import BUSY, Seen
from prefetch.sim.workload import NEVER

# the engine: from here on


@njit(cache=True, nogil=True, **ENTERED)
def timed(events, pool, semantics, machine, guesses, run, time_S, outcome_A):  # type: ignore[no-untyped-def]
    """Runs the next events; `time_S` gets the nanoseconds of every step, `outcome_A` HIT, LATE or MISS of every access.

    `run` goes on from where it was, like the pool.
    """
    ids_A, start_V, next_A, score_A = events.ids_A, events.start_V, events.next_A, events.score_A
    group_L, room_G, left_G, clock = pool.group_L, pool.room_G, pool.left_G, pool.clock
    entry_GN, busy_GN = pool.entry_GN, pool.busy_GN
    slot_of, uses_of = pool.slot_LE.reshape(-1), pool.uses_LE.reshape(-1)
    link, counts, ready_GN, ahead_GN = run.link, run.counts, run.ready_GN, run.ahead_GN
    order, brought_E = run.order_I, run.brought_E
    done_at, missing, placing = run.scratch_6E[0], run.scratch_6E[1], run.scratch_6E[2]
    late, arrival, there = run.scratch_6E[3], run.scratch_6E[4], run.scratch_6E[5]
    disk, is_limited = run.disk, machine.disk.room_bytes < NEVER
    n_layers, n_experts = pool.slot_LE.shape
    is_guessing = guesses.ids_VW.shape[1] > 0
    is_active = is_guessing or machine.miss_way == BOTH
    is_sorted = not machine.by_score and machine.miss_way != BOTH and not is_limited
    has_aside = is_guessing and machine.landing > 0
    wants_future, wants_score = len(next_A) > 0, len(score_A) > 0
    is_before, is_even = semantics == ATOMIC, True
    # no guess can want the place of who is in use, where each layer has a cache and no copy for this event waits
    is_apart = len(room_G) == n_layers and guesses.ahead < n_layers and machine.cancels
    marks = is_active and not (is_apart and machine.miss_way == WAIT)
    for i in range(n_layers):
        is_even &= pool.size_L[i] == pool.size_L[0]
    loads_below = 0 if machine.miss_way == WAIT else EMPTY  # of `slot_of`: who takes a place now
    now, host = counts[NOW], counts[NOW]
    compute_ns = stall_ns = np.int64(0)
    first_event = clock[1]
    first_step = first_event // n_layers
    step, layer = first_step, first_event % n_layers - 1
    last_event = last_layer = np.int64(0)  # the event before, which may still be in use
    last_first, last_stop, is_marked = start_V[0], start_V[0], False
    for v in range(len(start_V) - 1):
        layer += 1
        step, layer = (step + 1, np.int64(0)) if layer == n_layers else (step, layer)
        first, stop, event = start_V[v], start_V[v + 1], first_event + v
        n, x, base = stop - first, np.uint64(layer), layer * n_experts
        before_ns, began = machine.before_S[np.uint64(step - first_step)], now
        g, size = np.uint64(group_L[x]), pool.size_L[x]
        group, n_late = np.int64(g), 0
        if is_active:
            for turn in range(1 + (n > 0)):  # the event before is over; this one's attention
                now += before_ns if turn else 0
                if (link[QUEUED] and link[FREE_NS] < now) or disk[QUEUED]:
                    if marks and turn == 0 and not is_marked:
                        mark(last_event, last_layer, last_first, last_stop, ids_A, pool, run)
                        is_marked = True
                    at_step = step - (turn == 0 and layer == 0)
                    run_link(now, pool, run, machine, guesses, first_event, at_step, is_sorted)
                if is_marked:
                    unmark(now, last_layer, last_first, last_stop, ids_A, pool, run)
                    is_marked = False
                if turn == 0 and layer == 0:
                    link[SPENT] = 0
                    if is_guessing:  # what the steps before tell of the first layers
                        host = max(host, now)
                        for target in range(event, event + min(guesses.ahead, n_layers)):
                            host = enqueue_seldom(
                                target, host, first_event, guesses, pool, run, machine
                            )
            land(pool, run, now)
            last_event, last_first, last_stop, last_layer = event, first, stop, layer
        else:
            now += before_ns if n else 0
        if n == 0:
            tell(events.told, pool, v, event)
            continue
        host = max(host, now)
        if is_active:
            landing, begun = lands(layer, run), has_begun(layer, run)
            if landing != EMPTY or begun != EMPTY:  # no others are under way
                for access in range(first, stop):
                    expert = np.int64(ids_A[np.uint64(access)])
                    slot = np.int64(slot_of[np.uint64(base + expert)])
                    if expert in (landing, begun) and slot != EMPTY:
                        late[n_late] = access
                        arrival[n_late] = promote(now, layer, slot, pool, run, machine)
                        n_late += 1
                if n_late == 2 and arrival[0] > arrival[1]:
                    late[0], late[1] = late[1], late[0]
                    arrival[0], arrival[1] = arrival[1], arrival[0]
            if disk[QUEUED]:
                take_over(layer, first, stop, ids_A, pool, run)
                if machine.cancels:
                    drop_reads(event, run, machine)
            if machine.cancels and not is_sorted:
                drop_stale(event, pool, run, machine)
            while (
                machine.cancels
                and link[QUEUED]
                and run.queue[np.uint64(link[HEAD]), TARGET] <= event
            ):
                if run.queue[np.uint64(link[HEAD]), DONE]:
                    give_up(np.int64(link[HEAD]), pool, run, machine)
                else:
                    counts[DROPPED] += 1
                pop(run)
        tell(events.told, pool, v, event)

        # who is there, and who takes whose place: as in `replay`
        is_big, shift, width = is_before and n * size > room_G[g], 0, n
        if is_big:
            at = n_experts
            for wants_hit in range(1, -1, -1):
                for i in range(n):
                    if (slot_of[base + ids_A[first + i]] >= 0) == (wants_hit == 1):
                        order[at] = i
                        at += 1
            shift, width = n_experts, max(1, room_G[g] // size)
        weight_ns, token_ns = machine.weight_ns_L[x], machine.token_ns_L[x]
        n_missing, n_at_once, n_done, gpu = np.int64(0), 0, 0, now
        for begin in range(0, n, width):
            end, n_placing = min(begin + width, n), 0
            for i in range(begin, end):
                a = np.uint64(first + order[np.uint64(shift + i)])
                slot = np.int64(slot_of[np.uint64(base + ids_A[a])])
                outcome_A[a] = MISS if slot == EMPTY else HIT
                missing[np.uint64(n_missing)] = a
                n_missing += slot == EMPTY
                placing[np.uint64(n_placing)] = a
                n_placing += slot < loads_below
                is_late = False
                if is_active and slot != EMPTY:
                    is_late = n_late > 0 and (
                        np.int64(a) == late[0] or (n_late == 2 and np.int64(a) == late[1])
                    )
                    if slot < EMPTY:
                        take_aside(BESIDE - slot, pool, run)
                        brought_E[ids_A[a]] = event
                        counts[USED] += 1
                    elif ahead_GN[g, np.uint64(slot)]:
                        ahead_GN[g, np.uint64(slot)] = 0
                        counts[USED] += 1
                    if is_late:
                        outcome_A[a] = LATE
                took = max(weight_ns, token_ns * np.int64(events.tokens_A[a]))
                gpu += 0 if slot == EMPTY or is_late else took
                done_at[np.uint64(n_done)] = gpu
                n_done += slot != EMPTY and not is_late
            if n_placing or semantics == OVERSHOOT:
                for i in range(begin, end):
                    a = np.uint64(first + order[np.uint64(shift + i)])
                    slot = np.int64(slot_of[np.uint64(base + ids_A[a])])
                    at = np.uint64(max(slot, 0))
                    busy_GN[g, at] = busy_GN[g, at] if slot < 0 else BUSY
            for i in range(n_placing):
                a = np.uint64(placing[np.uint64(i)])
                expert = np.int64(ids_A[a])
                e = np.uint64(base + expert)
                coming = next_A[a] if wants_future else np.int64(0)
                score = score_A[a] if wants_score else np.int64(0)
                clock[0] += 1
                seen = Seen(clock[0], step, base + expert, uses_of[e], coming, score)
                slot = np.int64(EMPTY)
                while is_before and left_G[g] < size:
                    slot = np.int64(victim(pool, group, seen))
                    if slot < 0:
                        break
                    if is_even:  # whoever comes takes the place as it is
                        s = np.uint64(slot)
                        slot_of[np.uint64(entry_GN[g, s])] = EMPTY
                        if is_active and ahead_GN[g, s]:
                            counts[UNUSED] += 1
                            counts[WASTED] += machine.bytes_L[
                                np.uint64(entry_GN[g, s] // n_experts)
                            ]
                        slot_of[e], entry_GN[g, s], busy_GN[g, s] = slot, base + expert, BUSY
                        break
                    leave_seldom(pool, run, machine, group, slot)
                    slot = np.int64(EMPTY)
                if slot < 0:
                    if is_before and left_G[g] < size:
                        continue  # through a staging slot, and not kept
                    slot = enter(pool, group, layer, expert)
                filled(pool, group, slot, seen)
                if is_active:
                    ready_GN[g, np.uint64(slot)], ahead_GN[g, np.uint64(slot)] = now, 0
                n_at_once += begin == 0 and outcome_A[a] == MISS
            for i in range(begin, end):
                a = np.uint64(first + order[np.uint64(shift + i)])
                expert = np.int64(ids_A[a])
                e = np.uint64(base + expert)
                uses_of[e] += 1
                if wants_future:
                    run.coming_LE[layer, expert] = next_A[a]
                slot = np.int64(slot_of[e])
                if slot >= 0:
                    coming = next_A[a] if wants_future else np.int64(0)
                    score = score_A[a] if wants_score else np.int64(0)
                    clock[0] += 1
                    seen = Seen(clock[0], step, base + expert, uses_of[e], coming, score)
                    is_new = outcome_A[a] == MISS or (has_aside and brought_E[expert] == event)
                    used(pool, group, slot, is_new, seen)
                    if semantics != OVERSHOOT:
                        free(pool, group, slot)
        if not is_before:
            if left_G[g] < 0:
                shrink(pool, run, machine, group)
            for i in range(n if semantics == OVERSHOOT else 0):
                slot = np.int64(slot_of[base + ids_A[first + i]])
                if slot >= 0:
                    free(pool, group, slot)
        if has_aside:
            drop_beside(event, pool, run, machine)
            # no guess that waited for a place begins before
            link[FREE_NS] = max(link[FREE_NS], now)

        # when: hits at once, copies under way as they arrive, then the others in their order
        compute_ns += before_ns + gpu - now
        for i in range(n_late):
            counts[LATE_STALL] += max(np.int64(0), arrival[i] - gpu)
            took = max(weight_ns, token_ns * np.int64(events.tokens_A[late[i]]))
            gpu = max(gpu, arrival[i]) + took
            compute_ns += took
            done_at[n_done] = gpu
            n_done += 1
        asked, work_ns = host, np.int64(0)  # when the host begins to ask for copies
        if is_limited and n_missing:
            fetch(now, asked, layer, ids_A, missing, n_missing, there, run, machine)
        if machine.miss_way == WAIT:
            host += n_missing * machine.issue_ns
        else:
            for m in range(n_missing):
                tokens_ns = machine.host_token_ns_L[x] * np.int64(events.tokens_A[missing[m]])
                work_ns += max(machine.host_weight_ns_L[x], tokens_ns)
        if machine.miss_way == BOTH:
            for m in range(n_missing):
                there_ns = there[m] if is_limited else asked
                host = upload(layer, np.int64(ids_A[missing[m]]), host, there_ns, run, machine)
        if is_guessing and layer + guesses.ahead < n_layers:
            host = enqueue(event + guesses.ahead, host, first_event, guesses, pool, run, machine)
        if machine.miss_way == WAIT and n_missing:
            if is_big or semantics == AFTER_USE:
                n_at_once = min(n_at_once, room_G[g] // size - n_done)
            n_at_once = max(0, n_at_once) + machine.staging
            whole_ns, free_ns = machine.whole_ns_L[x], link[FREE_NS]
            for m in range(n_missing):
                a = np.uint64(missing[np.uint64(m)])
                may = asked + (m + 1) * machine.issue_ns
                if m >= n_at_once and semantics != OVERSHOOT:
                    may = max(may, done_at[np.uint64(m - n_at_once)])
                there_ns = there[m] if is_limited else np.int64(0)
                may = max(may, there_ns)
                if is_active and ((link[QUEUED] and free_ns < may) or disk[QUEUED]):
                    link[FREE_NS] = free_ns
                    if marks and not is_marked:
                        mark_seldom(event, layer, first, stop, ids_A, pool, run)
                        is_marked = True
                    run_link_seldom(may, pool, run, machine, guesses, first_event, step, is_sorted)
                    free_ns = link[FREE_NS]
                free_ns = max(may, free_ns) + whole_ns
                if there_ns > gpu:
                    counts[DISK_STALL] += there_ns - gpu
                    gpu = there_ns
                stall_ns += max(np.int64(0), free_ns - gpu)
                gpu = max(gpu, free_ns)
                took = max(weight_ns, token_ns * np.int64(events.tokens_A[a]))
                gpu += took
                compute_ns += took
                done_at[np.uint64(n_done)] = gpu
                n_done += 1
            link[FREE_NS] = free_ns
            counts[LINK] += n_missing * whole_ns
            counts[MOVED] += n_missing * machine.bytes_L[x]
            counts[DEMAND] += n_missing
        elif n_missing:
            finished = on_host(asked, work_ns, run, machine)
            counts[BY_HOST] += n_missing
            counts[HOST_STALL] += max(np.int64(0), finished - gpu)
            gpu = max(gpu, finished)
            if is_limited:
                finished = read_by(
                    finished, layer, events.tokens_A, missing, n_missing, there, machine
                )
                counts[DISK_STALL] += max(np.int64(0), finished - gpu)
                gpu = max(gpu, finished)
            host = max(host, finished)
        now = gpu
        time_S[np.uint64(step - first_step)] += now - began
    if is_active:
        if marks and not is_marked:
            mark_seldom(last_event, last_layer, last_first, last_stop, ids_A, pool, run)
        run_link_seldom(now, pool, run, machine, guesses, first_event, step, is_sorted)
        if marks:
            unmark_seldom(now, last_layer, last_first, last_stop, ids_A, pool, run)
        land(pool, run, now)
    clock[1] = first_event + len(start_V) - 1
    counts[NOW] = now
    counts[COMPUTE] += compute_ns
    counts[STALL] += stall_ns
