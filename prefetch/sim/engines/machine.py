"""What the timed engine is told of a machine and of guesses, as arrays of whole nanoseconds, and what it counts.

It simulates nothing. L layers, S steps, V events, W guesses per event, X chunks of a copy, Q copies that may wait.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.engines.pool import Pool
from prefetch.sim.workload import NEVER

WAIT, ON_HOST, BOTH = 0, 1, 2  # what is done about a miss
MISSES = ("wait", "host", "both")
ADMITS = ("at_start", "on_hit")  # when a guess's copy takes a place in the cache
ORDERS = ("by_layer", "by_score")  # of guesses that wait
# of a copy that waits, or is under way
LAYER, EXPERT, TARGET, ISSUED, DONE, SCORE, RANK = range(7)
LAST_RANK = -NEVER  # of an upload: behind all guesses
# of a guess that lies beside the cache; its place there is written in `slot_LE` as BESIDE - place
ARRIVES = 3
BESIDE = -2
# of the link
(
    FREE_NS, LANDING_NS, LANDING_LAYER, LANDING_EXPERT, QUEUED, LAYER_IN_USE, EVENT_IN_USE, HEAD, N_BESIDE, SPENT,
) = range(10)  # fmt: skip
# of the disk, beside what it shares with the link: the read that a demand takes over; memory that is left
RESUMED, RESUMED_DONE, LEFT = 10, 11, 12
# of the host's memory, a ring of entries: used before and after it; from when on it is there
OLDER, NEWER, THERE_NS = range(3)
# counts
COUNTS = (
    "now_ns", "compute_ns", "stall_ns", "late_stall_ns", "host_stall_ns", "link_ns", "demand_loads",
    "prefetch_loads", "prefetch_used", "prefetch_unused", "prefetch_dropped", "moved_bytes", "wasted_bytes", "on_host",
    "disk_stall_ns", "disk_ns", "disk_loads", "disk_bytes",
)  # fmt: skip
(
    NOW, COMPUTE, STALL, LATE_STALL, HOST_STALL, LINK, DEMAND, PREFETCHED, USED, UNUSED, DROPPED, MOVED, WASTED,
    BY_HOST, DISK_STALL, DISK, DISK_LOADS, DISK_BYTES,
) = range(len(COUNTS))  # fmt: skip


class Disk(NamedTuple):
    """What lies behind a host memory that cannot hold all experts."""

    chunk_ns_LX: NDArray[np.int64]  # of every chunk of a read; the latency is in the first
    n_chunks_L: NDArray[np.int64]
    whole_ns_L: NDArray[np.int64]
    chunk_bytes: int
    room_bytes: int  # of the host's memory, for experts; NEVER: all are there


NO_DISK = Disk(
    np.zeros((0, 0), np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), 1, int(NEVER)
)


class Machine(NamedTuple):
    """Costs, layer by layer, and how the link is run."""

    before_S: NDArray[
        np.int64
    ]  # per layer, before its routing is known: attention, gate, launches, shared experts
    weight_ns_L: NDArray[np.int64]  # an expert takes the longer of reading its weights on the GPU
    token_ns_L: NDArray[np.int64]  # and of computing its tokens
    host_weight_ns_L: NDArray[np.int64]  # the same on the host
    host_token_ns_L: NDArray[np.int64]
    chunk_ns_LX: NDArray[np.int64]  # of every chunk of a copy; the latency is in the first
    n_chunks_L: NDArray[np.int64]
    whole_ns_L: NDArray[np.int64]  # of all chunks
    bytes_L: NDArray[np.int64]
    chunk_bytes: int
    miss_way: int  # WAIT, ON_HOST, BOTH
    staging: int  # copies that may be under way beside the cache
    issue_ns: int  # of the host's time, per copy
    predict_ns: int  # of the host's time, per event whose guesses are made
    uploads: int  # copies of experts computed on the host that may wait at once
    shared_per_1000: int  # of the host's memory bandwidth, what is left to it while a copy runs
    cancels: bool  # queued guesses about an event are dropped when its routing is known
    protects: bool  # a guess pushes nobody out who is guessed for the same event
    landing: int = 0  # places beside the cache for guesses that enter it on a hit; 0: they take theirs at the start
    budget_bytes: int = int(NEVER)  # that guesses may move in one step
    by_score: bool = (
        False  # of guesses that wait the best goes first, else the one about the nearest layer
    )
    disk: Disk = NO_DISK


class Guesses(NamedTuple):
    """For every event whom to copy, best first. Known `ahead` layers before; in a step's first layers as it begins."""

    ids_VW: NDArray[np.int32]  # EMPTY where there is no guess
    score_VW: NDArray[np.int64]
    ahead: int


class Running(NamedTuple):
    """What a timed run has under way: it goes on from here with the next events."""

    link: NDArray[np.int64]
    queue: NDArray[np.int64]  # [2 Q, 7], first come first, from `HEAD` on
    beside: NDArray[np.int64]  # [places, 4], guesses that lie beside the cache
    queued_LE: NDArray[np.uint8]  # 1 where an expert is in it
    ready_GN: NDArray[np.int64]  # when a slot's copy is complete
    ahead_GN: NDArray[np.uint8]  # 1 where an expert was copied ahead and not used since
    held_W: NDArray[np.int64]  # slots that a guess must not push out
    in_use_E: NDArray[np.int64]  # the event that an expert was last in use in
    brought_E: NDArray[np.int64]  # the event that an expert last came from beside the cache for
    coming_LE: NDArray[np.int64]  # the access that next needs each, where the future is known
    counts: NDArray[np.int64]
    order_I: NDArray[np.int64]  # of an event's accesses: as they stand; room for hits first
    scratch_6E: NDArray[np.int64]
    disk: NDArray[np.int64]  # as `link`
    reads: NDArray[np.int64]  # as `queue`: guesses that the host's memory does not hold
    memory: NDArray[
        np.int64
    ]  # [3, L E + 1] of the host: a ring, and from when on an expert is there


def no_guesses() -> Guesses:
    return Guesses(np.empty((0, 0), np.int32), np.empty((0, 0), np.int64), 1)


def running_of(
    pool: Pool, first_LE: NDArray[np.int64], machine: Machine, guesses: Guesses
) -> Running:
    link, n_experts = np.zeros(SPENT + 1, np.int64), pool.slot_LE.shape[1]
    link[LANDING_NS], link[LAYER_IN_USE] = NEVER, -1
    waiting = (guesses.ahead + 1) * guesses.ids_VW.shape[1] + machine.uploads
    n_kept = pool.slot_LE.size if machine.disk.room_bytes < NEVER else 0
    disk, memory = np.zeros(LEFT + 1, np.int64), np.full((3, n_kept + 1), n_kept, np.int64)
    disk[LEFT], disk[RESUMED], memory[THERE_NS] = machine.disk.room_bytes, -1, NEVER
    return Running(
        link=link,
        queue=np.zeros((2 * waiting, RANK + 1), np.int64),
        beside=np.zeros((max(1, machine.landing), ARRIVES + 1), np.int64),
        queued_LE=np.zeros(pool.slot_LE.shape, np.uint8),
        ready_GN=np.zeros_like(pool.busy_GN),
        ahead_GN=np.zeros(pool.busy_GN.shape, np.uint8),
        held_W=np.zeros(max(1, guesses.ids_VW.shape[1]), np.int64),
        in_use_E=np.full(n_experts, -1, np.int64),
        brought_E=np.full(n_experts, -1, np.int64),
        coming_LE=first_LE.copy(),
        counts=np.zeros(len(COUNTS), np.int64),
        order_I=np.arange(2 * n_experts),
        scratch_6E=np.zeros((6, n_experts), np.int64),
        disk=disk,
        reads=np.zeros((2 * waiting if n_kept else 0, RANK + 1), np.int64),
        memory=memory,
    )
