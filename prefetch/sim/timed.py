"""What a replay costs in time: the same events with a clock, a link, guesses that are copied ahead, and a host.

Whole nanoseconds on one clock. A step at a layer: the GPU runs what stands before the experts; routing is known;
experts that are there are computed, missing ones copied and computed in the order of their arrival. The link moves one
chunk at a time: a demand copy waits for the chunk in hand, never for a queued guess. Compiled per policy, like
`replay`; `timed_reference` says the same in plain Python. Nothing here allocates, so that arrays need not be counted as
used (`UNCOUNTED`): counting took two thirds of the time.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from prefetch.sim.keyed import filled, released, used, victim
from prefetch.sim.machine import (
    BOTH,
    BY_HOST,
    COMPUTE,
    DEMAND,
    DONE,
    DROPPED,
    EVENT_IN_USE,
    EXPERT,
    FREE_NS,
    HEAD,
    HOST_STALL,
    ISSUED,
    LANDING_GROUP,
    LANDING_NS,
    LANDING_SLOT,
    LATE_STALL,
    LAYER,
    LAYER_IN_USE,
    LINK,
    MOVED,
    NOW,
    PREFETCHED,
    QUEUED,
    SCORE,
    STALL,
    TARGET,
    UNUSED,
    USED,
    WAIT,
    WASTED,
)  # fmt: skip
from prefetch.sim.policy import BUSY, UNCOUNTED, Seen
from prefetch.sim.pool import AFTER_USE, ATOMIC, EMPTY, HIT, LATE, MISS, OVERSHOOT
from prefetch.sim.workload import NEVER

# the engine: from here on


@njit(**UNCOUNTED)
def _leave(pool, run, machine, group, slot):  # type: ignore[no-untyped-def]
    n_experts = pool.slot_LE.shape[1]
    entry = pool.entry_GN[group, slot]
    layer = entry // n_experts
    if run.ahead_GN[group, slot]:
        run.ahead_GN[group, slot] = 0
        run.counts[UNUSED] += 1
        run.counts[WASTED] += machine.bytes_L[layer]
    pool.slot_LE[layer, entry - layer * n_experts] = EMPTY
    pool.entry_GN[group, slot] = EMPTY
    pool.busy_GN[group, slot] = BUSY
    pool.left_G[group] += pool.size_L[layer]
    pool.free_GN[group, pool.n_free_G[group]] = slot
    pool.n_free_G[group] += 1


@njit(**UNCOUNTED)
def _enter(pool, group, layer, expert):  # type: ignore[no-untyped-def]
    pool.n_free_G[group] -= 1
    slot = pool.free_GN[group, pool.n_free_G[group]]
    pool.slot_LE[layer, expert] = slot
    pool.entry_GN[group, slot] = layer * pool.slot_LE.shape[1] + expert
    pool.busy_GN[group, slot] = BUSY
    pool.left_G[group] -= pool.size_L[layer]
    return slot


@njit(**UNCOUNTED)
def _free(pool, group, slot):  # type: ignore[no-untyped-def]
    pool.busy_GN[group, slot] = 0
    released(pool.state_GM, group, pool.busy_GN.shape[1], slot)


@njit(**UNCOUNTED)
def _make_room(pool, run, machine, group, size, seen):  # type: ignore[no-untyped-def]
    while pool.left_G[group] < size:
        slot = victim(pool.state_GM, group, pool.busy_GN.shape[1], pool.busy_GN, seen)
        if slot < 0:
            break
        _leave(pool, run, machine, group, slot)
    return pool.left_G[group] >= size


@njit(**UNCOUNTED)
def _land(pool, run, until):  # type: ignore[no-untyped-def]
    """The copy whose last chunk is on its way has arrived by then; who is in use stays so until the event is over."""
    if run.link[LANDING_NS] <= until:
        run.link[LANDING_NS] = NEVER
        group, slot = run.link[LANDING_GROUP], run.link[LANDING_SLOT]
        layer = pool.entry_GN[group, slot] // pool.slot_LE.shape[1]
        expert = pool.entry_GN[group, slot] - layer * pool.slot_LE.shape[1]
        if layer != run.link[LAYER_IN_USE] or run.in_use_E[expert] != run.link[EVENT_IN_USE]:
            _free(pool, group, slot)


@njit(**UNCOUNTED)
def _forget(run, at):  # type: ignore[no-untyped-def]
    """Takes the copy at this place out of the queue, which begins at `HEAD`."""
    run.queued_LE[run.queue[at, LAYER], run.queue[at, EXPERT]] = 0
    run.link[QUEUED] -= 1
    if at == run.link[HEAD]:
        run.link[HEAD] += 1
        return
    for i in range(at, run.link[HEAD] + run.link[QUEUED]):
        for field in range(run.queue.shape[1]):
            run.queue[i, field] = run.queue[i + 1, field]


@njit(**UNCOUNTED)
def _join(layer, expert, target, issued, score, run):  # type: ignore[no-untyped-def]
    link, queue = run.link, run.queue
    if link[HEAD] + link[QUEUED] == len(
        queue
    ):  # twice as long as what may wait: moved to its beginning
        for i in range(link[QUEUED]):
            for field in range(queue.shape[1]):
                queue[i, field] = queue[link[HEAD] + i, field]
        link[HEAD] = 0
    at = link[HEAD] + link[QUEUED]
    queue[at, LAYER], queue[at, EXPERT], queue[at, TARGET] = layer, expert, target
    queue[at, ISSUED], queue[at, DONE], queue[at, SCORE] = issued, 0, score
    run.queued_LE[layer, expert] = 1
    link[QUEUED] += 1


@njit(**UNCOUNTED)
def _hold(row, layer, holds, pool, run, guesses):  # type: ignore[no-untyped-def]
    """Guessed for the same event and there: not pushed out by another guess."""
    group = pool.group_L[layer]
    for i in range(guesses.ids_VW.shape[1]):
        expert = guesses.ids_VW[row, i]
        slot = pool.slot_LE[layer, expert] if expert != EMPTY else EMPTY
        if slot == EMPTY:
            continue
        if holds and pool.busy_GN[group, slot] == 0:
            pool.busy_GN[group, slot], run.held_GN[group, slot] = BUSY, 1
        elif not holds and run.held_GN[group, slot]:
            run.held_GN[group, slot] = 0
            _free(pool, group, slot)


@njit(**UNCOUNTED)
def _run_link(until, pool, run, machine, guesses, first_event, step):  # type: ignore[no-untyped-def]
    """Moves chunks of queued copies, as long as they begin before `until`."""
    link, queue, counts = run.link, run.queue, run.counts
    n_experts = pool.slot_LE.shape[1]
    while link[QUEUED]:
        head = link[HEAD]
        begin = max(link[FREE_NS], queue[head, ISSUED])
        if begin >= until:
            break
        _land(pool, run, begin)
        layer, expert, group = (
            queue[head, LAYER],
            queue[head, EXPERT],
            pool.group_L[queue[head, LAYER]],
        )
        if queue[head, DONE] == 0:
            if pool.slot_LE[layer, expert] >= 0:  # came on demand meanwhile
                counts[DROPPED] += 1
                _forget(run, head)
                continue
            pool.clock[0] += 1
            entry = layer * n_experts + expert
            meant_for = min(step + 1, queue[head, TARGET] // len(pool.group_L))
            uses, coming = pool.uses_LE[layer, expert], run.coming_LE[layer, expert]
            seen = Seen(pool.clock[0], meant_for, entry, uses, coming, queue[head, SCORE])
            row = queue[head, TARGET] - first_event
            is_guess = machine.protects and 0 <= row < len(guesses.ids_VW)
            is_guess &= pool.left_G[group] < pool.size_L[layer]
            if is_guess:
                _hold(row, layer, True, pool, run, guesses)
            has_room = _make_room(pool, run, machine, group, pool.size_L[layer], seen)
            if is_guess:
                _hold(row, layer, False, pool, run, guesses)
            if not has_room:
                counts[DROPPED] += 1
                _forget(run, head)
                continue
            slot = _enter(pool, group, layer, expert)
            run.ready_GN[group, slot], run.ahead_GN[group, slot] = NEVER, 1
            filled(pool.state_GM, group, pool.busy_GN.shape[1], slot, seen)
            counts[PREFETCHED] += 1
        took = machine.chunk_ns_LX[layer, queue[head, DONE]]
        queue[head, DONE] += 1
        link[FREE_NS] = begin + took
        counts[LINK] += took
        if queue[head, DONE] == machine.n_chunks_L[layer]:
            slot = pool.slot_LE[layer, expert]
            run.ready_GN[group, slot] = link[FREE_NS]
            link[LANDING_NS], link[LANDING_GROUP] = link[FREE_NS], group
            link[LANDING_SLOT] = slot
            counts[MOVED] += machine.bytes_L[layer]
            _forget(run, head)


@njit(**UNCOUNTED)
def _enqueue(target, host, first_event, guesses, pool, run, machine):  # type: ignore[no-untyped-def]
    """Guesses about an event join the queue, where they are neither there nor queued; the host's time after that."""
    n_layers = len(pool.group_L)
    layer, host = target % n_layers, host + machine.predict_ns
    if target - first_event >= len(guesses.ids_VW):
        return host
    for i in range(guesses.ids_VW.shape[1]):
        expert = guesses.ids_VW[target - first_event, i]
        if expert == EMPTY or run.link[QUEUED] == len(run.queue) // 2:
            break
        if pool.slot_LE[layer, expert] < 0 and run.queued_LE[layer, expert] == 0:
            host += machine.issue_ns
            score = guesses.score_VW[target - first_event, i]
            _join(layer, expert, target, host, score, run)
    return host


@njit(**UNCOUNTED)
def _promote(now, layer, expert, pool, run, machine):  # type: ignore[no-untyped-def]
    """A copy under way is needed: what is left of it goes before all others. When it will be there."""
    link, queue, group = run.link, run.queue, pool.group_L[layer]
    slot = pool.slot_LE[layer, expert]
    if link[LANDING_NS] < NEVER and link[LANDING_GROUP] == group and link[LANDING_SLOT] == slot:
        link[LANDING_NS] = NEVER
        return
    at = link[HEAD]
    while queue[at, LAYER] != layer or queue[at, EXPERT] != expert or queue[at, DONE] == 0:
        at += 1
    took = np.int64(0)
    for x in range(queue[at, DONE], machine.n_chunks_L[layer]):
        took += machine.chunk_ns_LX[layer, x]
    link[FREE_NS] = max(now, link[FREE_NS]) + took
    run.counts[LINK] += took
    run.counts[MOVED] += machine.bytes_L[layer]
    run.ready_GN[group, slot] = link[FREE_NS]
    _forget(run, at)


@njit(**UNCOUNTED)
def _drop_stale(event, pool, run, machine):  # type: ignore[no-untyped-def]
    """The routing of this event is known: what is queued for it is not needed, or is wanted at once."""
    q = run.link[HEAD]
    while q < run.link[HEAD] + run.link[QUEUED]:
        if run.queue[q, TARGET] > event:
            q += 1
            continue
        layer, expert = run.queue[q, LAYER], run.queue[q, EXPERT]
        if run.queue[q, DONE]:
            moved = min(machine.bytes_L[layer], run.queue[q, DONE] * machine.chunk_bytes)
            run.counts[MOVED] += moved
            run.counts[WASTED] += moved - machine.bytes_L[layer]  # `_leave` counts all of it
            _leave(pool, run, machine, pool.group_L[layer], pool.slot_LE[layer, expert])
        else:
            run.counts[DROPPED] += 1
        is_first = q == run.link[HEAD]
        _forget(run, q)
        q += is_first


@njit(**UNCOUNTED)
def _on_host(begin, work_ns, run, machine):  # type: ignore[no-untyped-def]
    """When the host has computed so much; copies that run meanwhile take their share of its memory."""
    copying = max(np.int64(0), run.link[FREE_NS] - begin)
    for q in range(run.link[HEAD], run.link[HEAD] + run.link[QUEUED]):
        for x in range(run.queue[q, DONE], machine.n_chunks_L[run.queue[q, LAYER]]):
            copying += machine.chunk_ns_LX[run.queue[q, LAYER], x]
    meanwhile = copying * machine.shared_per_1000 // 1000
    if work_ns <= meanwhile:
        return begin + -(-work_ns * 1000 // max(1, machine.shared_per_1000))
    return begin + copying + work_ns - meanwhile


@njit(cache=True, nogil=True, **UNCOUNTED)
def timed(events, pool, semantics, machine, guesses, run, time_S, outcome_A):  # type: ignore[no-untyped-def]
    """Runs the next events; `time_S` gets the nanoseconds of every step, `outcome_A` HIT, LATE or MISS of every access.

    `run` goes on from where it was, like the pool.
    """
    ids_A, start_V, next_A, score_A = events.ids_A, events.start_V, events.next_A, events.score_A
    slot_LE, uses_LE, clock, counts = pool.slot_LE, pool.uses_LE, pool.clock, run.counts
    n_layers, n_experts = slot_LE.shape
    n_slots, is_guessing = pool.busy_GN.shape[1], guesses.ids_VW.shape[1] > 0
    is_active = is_guessing or machine.miss_way == BOTH
    order, done_at = run.scratch_4E[0], run.scratch_4E[1]
    missing, late = run.scratch_4E[2], run.scratch_4E[3]
    wants_future, wants_score = len(next_A) > 0, len(score_A) > 0
    event, now, host = clock[1], counts[NOW], counts[NOW]
    first_event, first_step = event, event // n_layers
    is_before = semantics == ATOMIC
    nobody = Seen(np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0))
    for v in range(len(start_V) - 1):
        first, n = start_V[v], start_V[v + 1] - start_V[v]
        stop, step = first + n, event // n_layers
        layer = event - step * n_layers
        group, size, began = pool.group_L[layer], pool.size_L[layer], now
        if layer == 0 and is_guessing:  # what the steps before tell of the first layers
            host = max(host, now)
            for target in range(event, event + min(guesses.ahead, n_layers)):
                host = _enqueue(target, host, first_event, guesses, pool, run, machine)
        event += 1
        if n == 0:
            continue
        now += machine.before_S[step - first_step]
        counts[COMPUTE] += machine.before_S[step - first_step]
        host, n_late = max(host, now), 0
        if is_active:
            _run_link(now, pool, run, machine, guesses, first_event, step)
            _land(pool, run, now)
            for a in range(first, stop):
                slot = slot_LE[layer, ids_A[a]]
                if slot >= 0 and run.ready_GN[group, slot] > now:
                    _promote(now, layer, np.int64(ids_A[a]), pool, run, machine)
                    late[n_late] = a
                    n_late += 1
            if n_late == 2 and (
                run.ready_GN[group, slot_LE[layer, ids_A[late[0]]]]
                > run.ready_GN[group, slot_LE[layer, ids_A[late[1]]]]
            ):
                late[0], late[1] = late[1], late[0]
            if machine.cancels:
                _drop_stale(event - 1, pool, run, machine)

        # who is there, and who takes whose place: as in `replay`
        is_big, width = semantics == ATOMIC and n * size > pool.room_G[group], n
        if is_big:
            at = 0
            for wants_hit in range(1, -1, -1):
                for a in range(first, stop):
                    if (slot_LE[layer, ids_A[a]] >= 0) == (wants_hit == 1):
                        order[at] = a
                        at += 1
            width = max(1, pool.room_G[group] // size)
        n_missing, n_placed, n_done, gpu = 0, 0, 0, now
        late_0, late_1 = now, now
        for begin in range(0, n, width):
            end, n_new = min(begin + width, n), 0
            for i in range(begin, end):
                a = order[i] if is_big else first + i
                slot = slot_LE[layer, ids_A[a]]
                if slot < 0:
                    outcome_A[a] = MISS
                    missing[n_missing] = a
                    n_missing += 1
                    n_new += 1
                    continue
                pool.busy_GN[group, slot] = BUSY
                if run.ahead_GN[group, slot]:
                    run.ahead_GN[group, slot] = 0
                    counts[USED] += 1
                if run.ready_GN[group, slot] > now:
                    outcome_A[a] = LATE
                    if a == late[0]:
                        late_0 = run.ready_GN[group, slot]
                    else:
                        late_1 = run.ready_GN[group, slot]
                    continue
                outcome_A[a] = HIT
                tokens_ns = machine.token_ns_L[layer] * np.int64(events.tokens_A[a])
                gpu += max(machine.weight_ns_L[layer], tokens_ns)
                done_at[n_done] = gpu
                n_done += 1
            for m in range(n_missing - n_new, n_missing):
                if machine.miss_way != WAIT:
                    break
                a = missing[m]
                expert = np.int64(ids_A[a])
                coming = next_A[a] if wants_future else np.int64(0)
                score = score_A[a] if wants_score else np.int64(0)
                clock[0] += 1
                entry = layer * n_experts + expert
                seen = Seen(clock[0], step, entry, uses_LE[layer, expert], coming, score)
                if is_before and not _make_room(pool, run, machine, group, size, seen):
                    continue  # through a staging slot, and not kept
                slot = _enter(pool, group, layer, expert)
                run.ready_GN[group, slot], run.ahead_GN[group, slot] = now, 0
                filled(pool.state_GM, group, n_slots, slot, seen)
                n_placed += begin == 0
            for i in range(begin, end):
                a = order[i] if is_big else first + i
                expert = np.int64(ids_A[a])
                uses_LE[layer, expert] += 1
                slot = slot_LE[layer, expert]
                if wants_future:
                    run.coming_LE[layer, expert] = next_A[a]
                if slot >= 0:
                    coming = next_A[a] if wants_future else np.int64(0)
                    score = score_A[a] if wants_score else np.int64(0)
                    clock[0] += 1
                    entry = layer * n_experts + expert
                    seen = Seen(clock[0], step, entry, uses_LE[layer, expert], coming, score)
                    used(pool.state_GM, group, n_slots, slot, outcome_A[a] == MISS, seen)
                    if end < n or semantics == AFTER_USE:
                        _free(pool, group, slot)
            if not is_before:
                _make_room(pool, run, machine, group, np.int64(0), nobody)

        # when: hits at once, copies under way as they arrive, then the others in their order
        run.link[LAYER_IN_USE], run.link[EVENT_IN_USE] = layer, event
        for a in range(first, stop):
            slot = slot_LE[layer, ids_A[a]]
            run.in_use_E[ids_A[a]] = event
            if slot >= 0:
                pool.busy_GN[group, slot] = BUSY
        counts[COMPUTE] += gpu - now
        for i in range(n_late):
            ready = late_0 if i == 0 else late_1
            counts[LATE_STALL] += max(np.int64(0), ready - gpu)
            tokens_ns = machine.token_ns_L[layer] * np.int64(events.tokens_A[late[i]])
            took = max(machine.weight_ns_L[layer], tokens_ns)
            gpu = max(gpu, ready) + took
            counts[COMPUTE] += took
            done_at[n_done] = gpu
            n_done += 1
        asked, work_ns = host, np.int64(0)  # when the host begins to ask for copies
        for m in range(n_missing):
            if machine.miss_way == WAIT:
                host += machine.issue_ns
            else:
                tokens_ns = machine.host_token_ns_L[layer] * np.int64(events.tokens_A[missing[m]])
                work_ns += max(machine.host_weight_ns_L[layer], tokens_ns)
        if machine.miss_way == BOTH:
            for m in range(n_missing):
                host = _upload(layer, np.int64(ids_A[missing[m]]), host, pool, run, machine)
        if is_guessing and layer + guesses.ahead < n_layers:
            target = event - 1 + guesses.ahead
            host = _enqueue(target, host, first_event, guesses, pool, run, machine)
        if machine.miss_way == WAIT:
            at_once = n_placed
            if is_big or semantics == AFTER_USE:
                at_once = min(n_placed, pool.room_G[group] // size - n_done)
            at_once = max(0, at_once) + machine.staging
            for m in range(n_missing):
                may = asked + (m + 1) * machine.issue_ns
                if m >= at_once and semantics != OVERSHOOT:
                    may = max(may, done_at[m - at_once])
                if is_active:
                    _run_link(may, pool, run, machine, guesses, first_event, step)
                took = machine.whole_ns_L[layer]
                ready = max(may, run.link[FREE_NS]) + took
                run.link[FREE_NS] = ready
                counts[LINK] += took
                counts[MOVED] += machine.bytes_L[layer]
                counts[DEMAND] += 1
                slot = slot_LE[layer, ids_A[missing[m]]]
                if slot >= 0:
                    run.ready_GN[group, slot] = ready
                counts[STALL] += max(np.int64(0), ready - gpu)
                tokens_ns = machine.token_ns_L[layer] * np.int64(events.tokens_A[missing[m]])
                took = max(machine.weight_ns_L[layer], tokens_ns)
                gpu = max(gpu, ready) + took
                counts[COMPUTE] += took
                done_at[n_done] = gpu
                n_done += 1
        elif n_missing:
            finished = _on_host(asked, work_ns, run, machine)
            counts[BY_HOST] += n_missing
            counts[HOST_STALL] += max(np.int64(0), finished - gpu)
            gpu = max(gpu, finished)
            host = max(host, finished)
        now = gpu
        if is_active:
            _run_link(now, pool, run, machine, guesses, first_event, step)
            _land(pool, run, now)
        run.link[LAYER_IN_USE] = -1
        for a in range(first, stop):
            slot = slot_LE[layer, ids_A[a]]
            if slot >= 0 and run.ready_GN[group, slot] <= now:  # not an upload that has just begun
                _free(pool, group, slot)
        time_S[step - first_step] += now - began
    clock[1] = event
    counts[NOW] = now


@njit(**UNCOUNTED)
def _upload(layer, expert, host, pool, run, machine):  # type: ignore[no-untyped-def]
    """An expert that the host computes is copied behind everything else, for its next use."""
    if (
        run.link[QUEUED] >= min(machine.uploads, len(run.queue) // 2)
        or run.queued_LE[layer, expert]
    ):
        return host
    _join(layer, expert, NEVER, host + machine.issue_ns, 0, run)
    return host + machine.issue_ns
