"""What no policy and no predictor can be under, for fixed routing and transfers only.

Fewest loads: Belady with bypass at capacity plus staging. Time: neither less than computing everything, nor than those
loads on a link that is never idle, whose copies have no latency.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.machine import WAIT, Machine
from prefetch.sim.memory import Budget
from prefetch.sim.policies.belady import Belady
from prefetch.sim.pool import MISS
from prefetch.sim.run import replay
from prefetch.sim.start import NOBODY
from prefetch.sim.workload import Workload


def compute_S(work: Workload, machine: Machine) -> NDArray[np.int64]:
    """Of every step, with every expert resident: what stands before the experts, and the experts in turn."""
    layer_A, n_layers = layers_of(work), work.card.n_layers
    expert_A = np.maximum(
        machine.weight_ns_L[layer_A], machine.token_ns_L[layer_A] * work.tokens_A.astype(np.int64)
    )
    took_A = np.append(0, expert_A.cumsum())
    took_V = np.diff(took_A[work.start_V]) + np.where(
        np.diff(work.start_V) > 0, np.repeat(machine.before_S, n_layers), 0
    )
    took_S: NDArray[np.int64] = took_V.reshape(work.n_steps, n_layers).sum(axis=1)
    return took_S


def layers_of(work: Workload) -> NDArray[np.int64]:
    """The layer of every access."""
    layer_A: NDArray[np.int64] = np.repeat(
        np.arange(len(work.start_V) - 1) % work.card.n_layers, np.diff(work.start_V)
    )
    return layer_A


def least_ns(
    work: Workload,
    machine: Machine,
    budget: Budget,
    latency_ns: int,
    warm: NDArray[np.int64] = NOBODY,
) -> int | None:
    """Of the whole run; None where misses are not (only) copied, or experts differ in size.

    `warm`: entries that are there from the start.
    """
    if machine.miss_way != WAIT or len(set(machine.bytes_L.tolist())) > 1:
        return None
    staging = (machine.staging + machine.landing) * budget.size_L[0]
    rooms = [room + staging for room in budget.room_G]
    loads = int((replay(work, Belady(), rooms, budget.size_L, warm=warm) == MISS).sum())
    moving = int(machine.chunk_ns_LX[0, : machine.n_chunks_L[0]].sum()) - latency_ns
    return max(int(compute_S(work, machine).sum()), loads * moving)
