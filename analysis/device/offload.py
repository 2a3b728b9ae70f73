"""What pinning and prefetch would bring were the experts offloaded: the timed simulator on the recorded routing.

Three times per generated token at one cache: loads on demand, the most used experts pinned, and every expert asked for
ahead of time by a guess that is always right, which no predictor beats. All are simulated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import MissingData
from prefetch.sim.costs import machine_of
from prefetch.sim.engines.machine import Guesses
from prefetch.sim.engines.pool import EMPTY
from prefetch.sim.engines.run import timed_replay
from prefetch.sim.engines.start import NOBODY
from prefetch.sim.hardware import Hardware
from prefetch.sim.policies.lru import Lru
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import RoutingTrace

MOST_ROWS = 4000


@dataclass(frozen=True)
class Offloaded:
    """Simulated nanoseconds of a step, mean, with `slots` experts of each layer on the GPU."""

    slots: int
    pinned: int
    horizon: int
    demand_ns: float
    pinned_ns: float
    perfect_ns: float


def offloaded(
    trace: RoutingTrace,
    card: ModelCard,
    hardware: Hardware,
    *,
    share: float = 0.25,
    horizon: int = 4,
) -> Offloaded:
    """Half of the slots are pinned, by the use that the first half of the rows made of them; the second half is run."""
    if card.expert_bytes_L is None:
        raise MissingData(f"the card of {card.name} does not tell the bytes of an expert")
    rows = trace.rows(slice(0, MOST_ROWS))
    half = rows.n_tokens // 2
    if half == 0:
        raise MissingData("the trace has too few tokens")
    work = workload_of(rows.rows(slice(half, None)), phase="decode")
    slots = max(card.top_k, int(share * card.n_experts))
    n_pinned = min(slots // 2, slots - card.top_k)
    often = _most_used(rows.rows(slice(0, half)), n_pinned)
    ways = ((NOBODY, None), (often, None), (NOBODY, perfect(work, horizon)))
    took = [_step_ns(work, card, hardware, slots, *way) for way in ways]
    return Offloaded(slots, n_pinned, horizon, *took)


def _step_ns(
    work: Workload,
    card: ModelCard,
    hardware: Hardware,
    slots: int,
    pinned: NDArray[np.int64],
    ahead: Guesses | None,
) -> float:
    machine = machine_of(card, hardware, work)
    room, size = [slots] * card.n_layers, [1] * card.n_layers
    done = timed_replay(work, Lru(), room, size, machine, ahead, pinned=pinned)
    return float(done.time_S.mean())


def perfect(work: Workload, horizon: int) -> Guesses:
    """Every event's own experts, known `horizon` layers before."""
    lengths = np.diff(work.start_V)
    ids_VW = np.full((len(lengths), int(lengths.max(initial=1))), EMPTY, np.int32)
    event_A = np.repeat(np.arange(len(lengths)), lengths)
    ids_VW[event_A, np.arange(work.n_accesses) - work.start_V[event_A]] = work.ids_A
    return Guesses(ids_VW, np.zeros(ids_VW.shape, np.int64), horizon)


def _most_used(rows: RoutingTrace, n: int) -> NDArray[np.int64]:
    """Entries of the n most used experts of every layer."""
    n_experts = rows.card.n_experts
    entries = []
    for layer in range(rows.card.n_layers):
        ids = rows.ids_TLK[:, layer].ravel()
        counts_E = np.bincount(ids[ids < n_experts], minlength=n_experts)
        entries.append(layer * n_experts + np.argsort(-counts_E, kind="stable")[:n])
    return np.concatenate(entries).astype(np.int64) if n else NOBODY
