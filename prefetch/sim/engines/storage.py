"""A host memory that cannot hold all experts, and the disk behind it, in the compiled timed engine.

It knows no policy but its own: whoever the host's memory holds and was used longest ago leaves it first. A read goes
through a buffer beside that memory, so that it waits for no place. Guesses wait in a queue of their own (`reads`).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from prefetch.sim.engines.machine import (
    DISK,
    DISK_BYTES,
    DISK_LOADS,
    DONE,
    DROPPED,
    EXPERT,
    FREE_NS,
    HEAD,
    ISSUED,
    LAYER,
    LEFT,
    NEWER,
    OLDER,
    QUEUED,
    RANK,
    RESUMED,
    RESUMED_DONE,
    SCORE,
    TARGET,
    THERE_NS,
)
from prefetch.sim.engines.pool import EMPTY
from prefetch.sim.engines.transfers import CALLED, choose, join
from prefetch.sim.workload import NEVER


@njit(**CALLED)
def remember(entry, there_ns, run, machine):  # type: ignore[no-untyped-def]
    """Used now; who was not there is from this time on, in the place of those used longest ago."""
    memory, disk, n_experts = run.memory, run.disk, run.queued_LE.shape[1]
    ring, size = memory.shape[1] - 1, machine.bytes_L[entry // n_experts]
    if memory[THERE_NS, entry] < NEVER:
        _unlink(memory, entry)
    elif size > machine.disk.room_bytes:
        return
    else:
        while disk[LEFT] < size:
            oldest = memory[NEWER, ring]
            _unlink(memory, oldest)
            memory[THERE_NS, oldest] = NEVER
            disk[LEFT] += machine.bytes_L[oldest // n_experts]
        disk[LEFT] -= size
        memory[THERE_NS, entry] = there_ns
    newest = memory[OLDER, ring]
    memory[OLDER, entry], memory[NEWER, entry] = newest, ring
    memory[NEWER, newest], memory[OLDER, ring] = entry, entry


@njit(**CALLED)
def _unlink(memory, entry):  # type: ignore[no-untyped-def]
    older, newer = memory[OLDER, entry], memory[NEWER, entry]
    memory[NEWER, older], memory[OLDER, newer] = newer, older


@njit(**CALLED)
def read_ahead(until, run, machine):  # type: ignore[no-untyped-def]
    """Chunks of guesses that begin before `until`, to the end of one; whether it can be copied from now on."""
    disk, reads = run.disk, run.reads
    while choose(disk, reads, np.bool_(False)):
        head = disk[HEAD]
        begin = max(disk[FREE_NS], reads[head, ISSUED])
        if begin >= until:
            return False
        layer, expert = reads[head, LAYER], reads[head, EXPERT]
        took = machine.disk.chunk_ns_LX[layer, reads[head, DONE]]
        reads[head, DONE] += 1
        disk[FREE_NS] = begin + took
        run.counts[DISK] += took
        if reads[head, DONE] == machine.disk.n_chunks_L[layer]:
            run.counts[DISK_LOADS] += 1
            run.counts[DISK_BYTES] += machine.bytes_L[layer]
            remember(layer * run.queued_LE.shape[1] + expert, disk[FREE_NS], run, machine)
            target, score, rank = reads[head, TARGET], reads[head, SCORE], reads[head, RANK]
            join(run.link, run.queue, layer, expert, target, disk[FREE_NS], score, rank)
            disk[QUEUED] -= 1
            disk[HEAD] = head + 1 if disk[QUEUED] else 0
            return True  # its copy may begin before the next is read
    return False


@njit(**CALLED)
def take_over(layer, first, stop, ids_A, pool, run):  # type: ignore[no-untyped-def]
    """A guess that is being read is needed: what is left of it is read first, for whoever needs it."""
    disk, reads, head = run.disk, run.reads, run.disk[HEAD]
    if disk[QUEUED] == 0 or reads[head, DONE] == 0 or reads[head, LAYER] != layer:
        return
    expert = reads[head, EXPERT]
    entry = layer * run.queued_LE.shape[1] + expert
    for a in range(first, stop):
        is_it = ids_A[a] == expert and pool.slot_LE[layer, expert] == EMPTY
        if is_it and run.memory[THERE_NS, entry] == NEVER:
            disk[RESUMED], disk[RESUMED_DONE] = entry, reads[head, DONE]
            _drop(head, run)
            disk[HEAD] = head + 1 if disk[QUEUED] else 0
            return


@njit(**CALLED)
def _drop(at, run):  # type: ignore[no-untyped-def]
    run.queued_LE[run.reads[at, LAYER], run.reads[at, EXPERT]] = 0
    run.counts[DROPPED] += 1
    run.disk[QUEUED] -= 1


@njit(**CALLED)
def drop_reads(event, run, machine):  # type: ignore[no-untyped-def]
    """The routing of this event is known: guesses about it are read no further."""
    disk, reads = run.disk, run.reads
    kept = first = disk[HEAD]
    for at in range(first, first + disk[QUEUED]):
        if reads[at, TARGET] > event:
            for field in range(RANK + 1):
                reads[kept, field] = reads[at, field]
            kept += 1
            continue
        _drop(at, run)
        moved = reads[at, DONE] * machine.disk.chunk_bytes
        run.counts[DISK_BYTES] += min(machine.bytes_L[reads[at, LAYER]], moved)
    disk[HEAD] = first if disk[QUEUED] else 0


@njit(**CALLED)
def fetch(now, asked, layer, ids_A, missing, n_missing, there, run, machine):  # type: ignore[no-untyped-def]
    """When each missing expert is in the host's memory (`there`), `missing` in that order.

    First who is there, then who arrives, then who is being read, then the others, read one after the other.
    """
    disk, memory, base = run.disk, run.memory, layer * run.queued_LE.shape[1]
    while read_ahead(asked, run, machine):
        pass
    for m in range(n_missing):
        entry = base + np.int64(ids_A[missing[m]])
        there[m] = max(now, memory[THERE_NS, entry])
        if there[m] == NEVER and disk[RESUMED] == entry:
            there[m] = NEVER - 1
    for m in range(n_missing):
        remember(base + np.int64(ids_A[missing[m]]), now, run, machine)
    _sort(missing, there, n_missing)
    for m in range(n_missing):
        if there[m] < NEVER - 1:
            continue
        begun, took = disk[RESUMED_DONE] if there[m] < NEVER else np.int64(0), np.int64(0)
        for x in range(begun, machine.disk.n_chunks_L[layer]):
            took += machine.disk.chunk_ns_LX[layer, x]
        disk[FREE_NS] = max(asked, disk[FREE_NS]) + took
        there[m] = disk[FREE_NS]
        run.counts[DISK] += took
        run.counts[DISK_LOADS] += 1
        run.counts[DISK_BYTES] += machine.bytes_L[layer]
        entry = base + np.int64(ids_A[missing[m]])
        if memory[THERE_NS, entry] < NEVER:
            memory[THERE_NS, entry] = there[m]
    disk[RESUMED] = EMPTY


@njit(**CALLED)
def _sort(missing, there, n):  # type: ignore[no-untyped-def]
    """By time; of equals the first stays first."""
    for i in range(1, n):
        one, at, j = missing[i], there[i], i
        while j > 0 and there[j - 1] > at:
            missing[j], there[j] = missing[j - 1], there[j - 1]
            j -= 1
        missing[j], there[j] = one, at


@njit(**CALLED)
def read_by(finished, layer, tokens_A, missing, n_missing, there, machine):  # type: ignore[no-untyped-def]
    """When the host has computed them, had it `finished` by then without waiting for the disk."""
    left_ns = np.int64(0)
    for m in range(n_missing - 1, -1, -1):
        tokens_ns = machine.host_token_ns_L[layer] * np.int64(tokens_A[missing[m]])
        left_ns += max(machine.host_weight_ns_L[layer], tokens_ns)
        finished = max(finished, there[m] + left_ns)
    return finished
